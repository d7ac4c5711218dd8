"""Which records are worth keeping, by what their text and pictures are like: a table of rules.

Only rules that need no model and no word list stand here: of DataComp's basic filter the language
is left out, of OBELICS's filters those by language, stop words and flagged words.
"""

import collections
import dataclasses
import math

from vlm_jax.data.example import BadExample, Example
from vlm_jax.errors import ConfigError
from vlm_jax.schema import unknown_key

_REPEATED = 5  # words that count as repeated if they follow each other twice, as in OBELICS


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is kept. The text is what the assistant says, all turns of it; words end at white space.

    Attributes:
      min_side, max_aspect: pixels of an image's shorter side, and longer side over shorter.
      min_bytes: of an encoded image.
      min_words, max_words: of the text.
      min_characters: of the text.
      max_repeated: share of its runs of five words that occur more than once.
      max_special: share of its characters that are no letters, white space among them.

    Raises:
      ConfigError: a limit is no number.
    """

    min_side: int = 1
    max_aspect: float = 200.0
    min_bytes: int = 1
    min_words: int = 0
    max_words: int = 10**9
    min_characters: int = 0
    max_repeated: float = 1.0
    max_special: float = 1.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise ConfigError(f"{name} is {value}; expected a number")


FILTERS = {
    "none": Limits(),
    # mlfoundations/datacomp, baselines/apply_filter.py: load_uids_with_basic_filter_helper.
    "datacomp_basic": Limits(min_side=200, max_aspect=3.0, min_words=3, min_characters=6),
    # arXiv 2111.02114, section 2.
    "laion_400m": Limits(min_bytes=5_000, min_characters=5),
    # huggingface/OBELICS, config_filter_web_documents.yaml, for single paragraphs and images.
    "obelics": Limits(
        min_side=150, max_aspect=2.0, min_words=4, max_words=1000, max_repeated=0.1, max_special=0.3
    ),
}


def limits(name: str, **changes: float | None) -> Limits:
    """A row of FILTERS with some limits changed; None changes nothing.

    Raises:
      ConfigError: no such row, or a limit that is no number.
    """
    if name not in FILTERS:
        raise ConfigError(unknown_key(name, FILTERS).replace("config key", "filter"))
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(FILTERS[name], **given)


def check_text(example: Example, limits: Limits) -> None:
    """Raises BadExample where the text is outside the limits."""
    text = "\n".join(
        "".join(part for part in turn.parts if isinstance(part, str)).strip()
        for turn in example.turns
        if turn.role == "assistant"
    )
    words = text.split()
    if not limits.min_words <= len(words) <= limits.max_words:
        reason = "too_few_words" if len(words) < limits.min_words else "too_many_words"
        raise BadExample(reason, f"{len(words)}; expected {limits.min_words} to {limits.max_words}")
    if len(text) < limits.min_characters:
        raise BadExample(
            "too_few_characters", f"{len(text)}; expected at least {limits.min_characters}"
        )
    if (share := _repeated(words)) > limits.max_repeated:
        raise BadExample(
            "repeats_itself", f"{share:.3f} of it; expected at most {limits.max_repeated}"
        )
    if (share := _special(text)) > limits.max_special:
        raise BadExample(
            "too_few_letters", f"{share:.3f} of it are none; expected at most {limits.max_special}"
        )


def _repeated(words: list[str]) -> float:
    lower = [word.lower() for word in words]
    runs = collections.Counter(zip(*(lower[i:] for i in range(_REPEATED)), strict=False))
    return sum(n for n in runs.values() if n > 1) / max(1, runs.total())


def _special(text: str) -> float:
    return sum(not c.isalpha() for c in text) / max(1, len(text))


def check_image(encoded: bytes, height: int, width: int, limits: Limits) -> None:
    """Raises BadExample where an image is outside the limits."""
    if len(encoded) < limits.min_bytes:
        raise BadExample("too_few_bytes", f"{len(encoded)}; expected at least {limits.min_bytes}")
    if min(height, width) < limits.min_side:
        raise BadExample("too_small", f"{width} x {height}; expected sides of {limits.min_side}")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise BadExample(
            "too_narrow", f"{width} x {height}; expected at most 1 to {limits.max_aspect}"
        )
