"""Corpora before they are trained on.

python -m vlm_jax.prepare validate PATH --format=messages [--images=DIR] [--decode]
python -m vlm_jax.prepare run PATH --format=messages --out=DIR [--images=DIR] [--workers=N]
    [--filters=datacomp_basic] [--min_side=N] [--max_aspect=R]
    [--deduplicate] [--against=FORMAT:PATH[:IMAGES] ...] [--near=BITS]
    [--engine=beam --beam_options="--runner=..."]
python -m vlm_jax.prepare check DIR
python -m vlm_jax.prepare show --config=configs/tiny.py [--batches=N] [--rows=N] [--out=FILE.html]
    [--of=STAGE] [--stage=STAGE.FIELD=VALUE ...]

`validate` names what is wrong with a corpus of one's own, record by record and by the reasons that
a run would count: 0 where nothing is, 65 otherwise. `run` writes what can be used as ArrayRecord
shards with a manifest, images and all, which the format `shards` reads; killed and started again it
goes on and ends with the same bytes. `vlm_jax/data/formats.py` says how each format is written.
`show` draws the first batches that a run of a config would train on: pictures as the encoders see
them, tokens coloured by loss weight, packed documents apart, padding and counts by source. It makes
whole batches: for a config of pods, `--config.data.rows=8 --config.data.pool=32` is quicker.

What is left out is counted by reason and listed in shard-*.rejects.jsonl. `--filters` is a row of
`vlm_jax/data/filters.py`. `--deduplicate` leaves out records whose pictures an earlier record has
nearly the same, whatever is said of them: it is meant for captions, not for a corpus that says
several things of one picture (COCO, LLaVA), nor for pages of documents. `--against` leaves out
records with a picture of a corpus for evaluation. `vlm_jax/data/duplicates.py` says what near is.

`--engine=beam` runs the same functions on any runner of Apache Beam (extra `prepare`, in an
environment of its own: it needs an older Pillow than ours). Workers on other machines must have
vlm_jax installed and see the corpus and --out at the same paths, as on a shared file system.

`check` reads prepared shards again and compares them with their manifest: 65 where one differs.
"""

import collections
import itertools
import os
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from vlm_jax import config as configs
from vlm_jax import doors
from vlm_jax.config import Corpus
from vlm_jax.errors import ConfigError, DataError, StorageError

_FORMAT = flags.DEFINE_string("format", "messages", "How the corpus is written.")
_IMAGES = flags.DEFINE_string("images", "", "Folder of its images, if not the file's own.")
_OUT = flags.DEFINE_string("out", "", "run: folder for the shards; show: the page.")
_SHARD_MB = flags.DEFINE_integer("shard_mb", 256, "run: size of a shard, in MB.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", None, "run: processes; by default one per core.")
_MIN_SIDE = flags.DEFINE_integer(
    "min_side", None, "run: leave out images with a shorter side.", lower_bound=1
)
_MAX_ASPECT = flags.DEFINE_float(
    "max_aspect", None, "run: leave out images that are narrower.", lower_bound=1
)
_FILTERS = flags.DEFINE_string("filters", "none", "run: which records are worth keeping.")
_DEDUPLICATE = flags.DEFINE_bool("deduplicate", False, "run: keep the first of near-duplicates.")
_AGAINST = flags.DEFINE_multi_string(
    "against", [], "run: leave out what has a picture of this corpus, FORMAT:PATH[:IMAGES]."
)
_NEAR = flags.DEFINE_integer(
    "near", 4, "run: bits of 64 in which near pictures differ.", lower_bound=0, upper_bound=12
)
_ENGINE = flags.DEFINE_string("engine", "local", "run: what does the work, local or beam.")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "run: for Beam, as on a command line.")
# Of doors that one process imports, as tests do, the last one's flag holds.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "show: file of configs/.", allow_override=True
)
_STAGE = flags.DEFINE_multi_string(
    "stage", [], "show: change of one stage, NAME.FIELD=VALUE; repeat.", allow_override=True
)
_OF = flags.DEFINE_string("of", "", "show: which of a config's stages; by default the last.")
_BATCHES = flags.DEFINE_integer("batches", 4, "show: how many.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 16, "show: rows drawn of each batch.", lower_bound=0)
_DECODE = flags.DEFINE_bool("decode", False, "Also decode every image, not its header alone.")


def main(argv: Sequence[str]) -> None:
    """Validates, prepares or shows."""
    command, words = (argv[1] if len(argv) > 1 else ""), argv[2:]
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; expected {', '.join(COMMANDS)}")
    function, *expected = COMMANDS[command]
    if len(words) != len(expected):
        wanted = " ".join(expected) or "flags alone"
        raise ConfigError(f"{command} was given {len(words)} words; expected {wanted}")
    function(*words)


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
        print(_line(f"{problem.where}: {problem.reason}: {problem.detail}"))
        counts[problem.reason] += 1
        places.add(problem.where)
    if counts:
        listed = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        raise DataError(f"{len(places)} of {len(source)} records have problems: {listed}")
    print(f"{path}: {len(source)} records, nothing wrong")


def _line(text: str) -> str:
    """As one line of a terminal: names of files may hold anything, its commands included."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run(path: str) -> None:
    """Prepares a corpus.

    Raises:
      ConfigError: no `--out`, an unknown format, filter or engine, or a folder that holds
        something else.
      DataError: a corpus cannot be read.
      StorageError: the folder cannot be written.
    """
    from vlm_jax.data import filters, preparation

    if not _OUT.value:
        raise ConfigError("run needs --out=DIR, where the shards shall stand")
    manifest = preparation.run(
        Corpus(_FORMAT.value, {"all": path}, _IMAGES.value),
        doors.folder(_OUT.value),
        shard_bytes=_SHARD_MB.value * 10**6,
        limits=filters.limits(
            _FILTERS.value, min_side=_MIN_SIDE.value, max_aspect=_MAX_ASPECT.value
        ),
        deduplicate=_DEDUPLICATE.value,
        against=[_corpus(said) for said in _AGAINST.value],
        near=_NEAR.value,
        engine=_ENGINE.value,
        workers=os.cpu_count() if _WORKERS.value is None else _WORKERS.value,
        beam_options=_BEAM_OPTIONS.value,
    )
    rejects = manifest["rejects"]
    listed = ", ".join(f"{reason} {count}" for reason, count in rejects.items()) or "nothing"
    print(f"{_OUT.value}: {manifest['records']} records in {len(manifest['shards'])} shards")
    print(f"left out: {listed}" + (" (shard-*.rejects.jsonl)" if rejects else ""))
    for path, count in manifest.get("unread", {}).items():
        if count:
            print(f"{path}: {count} records could not be read, and were not looked for")


def _corpus(said: str) -> Corpus:
    format, _, rest = said.partition(":")
    path, _, images = rest.partition(":")
    if not path:
        raise ConfigError(f"--against={said}; expected FORMAT:PATH[:IMAGES], e.g. coco:val.json")
    return Corpus(format, {"all": path}, images)


def check(path: str) -> None:
    """Compares prepared shards with their manifest, byte by byte.

    Raises:
      DataError: there is no manifest, or a shard differs.
    """
    from vlm_jax.data import shards

    folder, wrong = doors.folder(path), 0
    for problem in shards.problems(folder):
        print(_line(problem))
        wrong += 1
    if wrong:
        raise DataError(f"{path} is not what its manifest says: {wrong} problems; prepare it again")
    manifest = shards.read_manifest(folder)
    print(f"{path}: {manifest['records']} records in {len(manifest['shards'])} shards, all whole")


def show() -> None:
    """Writes a page about the first batches of a config.

    Raises:
      ConfigError: no `--config`, or a wrong one.
      DataError: its data cannot be used.
      StorageError: the page cannot be written.
    """
    if _CONFIG.value is None:
        raise ConfigError("show needs --config=FILE, a file of configs/")
    whole = configs.overridden(doors.config(_CONFIG), _STAGE.value)
    config = configs.one_stage(whole, _OF.value)
    from vlm_jax.data import pipeline, showing

    path = doors.folder(_OUT.value or "show.html")
    with pipeline.train_stream(config) as stream:
        page = showing.page(config, itertools.islice(stream, _BATCHES.value), _ROWS.value)
    try:
        path.write_text(page, "utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    print(f"{path}: {_BATCHES.value} batches of {config.data.rows} rows, {len(page) / 1e6:.1f} MB")


# By name: the function, and the words that it takes.
COMMANDS = {
    "validate": (validate, "PATH"),
    "run": (run, "PATH"),
    "check": (check, "DIR"),
    "show": (show,),
}

if __name__ == "__main__":
    doors.run(main)
