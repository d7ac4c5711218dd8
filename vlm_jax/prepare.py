"""Corpora before they are trained on.

python -m vlm_jax.prepare validate PATH --format=messages [--images=DIR] [--decode]

`validate` names what is wrong with a corpus of one's own, record by record and by the reasons that
a run would count: 0 where nothing is, 65 otherwise. `vlm_jax/data/formats.py` says how each format
is written.
"""

import collections
from collections.abc import Sequence

from absl import flags

from vlm_jax import doors
from vlm_jax.config import Corpus
from vlm_jax.errors import ConfigError, DataError

_FORMAT = flags.DEFINE_string("format", "messages", "How the corpus is written.")
_IMAGES = flags.DEFINE_string("images", "", "Folder of its images, if not the file's own.")
_DECODE = flags.DEFINE_bool("decode", False, "Also decode every image, not its header alone.")


def main(argv: Sequence[str]) -> None:
    """Validates."""
    command, words = (argv[1] if len(argv) > 1 else ""), argv[2:]
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; expected {', '.join(COMMANDS)}")
    if len(words) != 1:
        raise ConfigError(f"{command} was given {len(words)} words; expected PATH")
    COMMANDS[command](words[0])


def validate(path: str) -> None:
    """Prints every problem of a corpus and how many there are of each kind.

    Raises:
      ConfigError: an unknown format.
      DataError: there are problems, or the file cannot be read at all.
    """
    from vlm_jax.data import formats, validation

    corpus = Corpus(_FORMAT.value, {"all": path}, _IMAGES.value)
    source = formats.CorpusSource("corpus", corpus, "all")
    counts, places = collections.Counter(), set()
    for problem in validation.problems(source, _DECODE.value):
        print(f"{problem.where}: {problem.reason}: {problem.detail}")
        counts[problem.reason] += 1
        places.add(problem.where)
    if counts:
        listed = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        raise DataError(f"{len(places)} of {len(source)} records have problems: {listed}")
    print(f"{path}: {len(source)} records, nothing wrong")


COMMANDS = {"validate": validate}

if __name__ == "__main__":
    doors.run(main)
