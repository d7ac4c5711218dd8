"""What a preparation was asked for: all that its output depends on, fixed before it begins."""

import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vlm_jax.config import Corpus
from vlm_jax.data import decoding, filters, formats
from vlm_jax.data.example import Example
from vlm_jax.errors import ConfigError, DataError

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Known:
    """A corpus as it was when the plan was made.

    Attributes:
      format, path, images: of the corpus; absolute, because workers may start elsewhere.
      fingerprint: of its records.
      records: how many it has.
    """

    format: str
    path: str
    images: str
    fingerprint: str
    records: int

    @functools.lru_cache(16)  # noqa: B019 - indexed once per process, not once per shard
    def open(self) -> formats.CorpusSource:
        """The corpus.

        Raises:
          DataError: it is no longer the one that was planned.
        """
        source = _open(self.format, self.path, self.images)
        if (source.fingerprint, len(source)) != (self.fingerprint, self.records):
            raise DataError(
                f"{self.path} changed while it was read: run again, into an empty folder"
            )
        return source


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which records go where.

    Attributes:
      corpus: what is prepared.
      per_shard: how many of its records, good or bad, make a shard.
      limits: what a record must keep to.
      deduplicate: whether records are left out whose pictures an earlier one has.
      against: corpora for evaluation: records with any of their pictures are left out.
      near: bits of a hash in which pictures that are the same may differ.
    """

    corpus: Known
    per_shard: int
    limits: filters.Limits = filters.FILTERS["none"]
    deduplicate: bool = False
    against: tuple[Known, ...] = ()
    near: int = 4

    @property
    def screened(self) -> bool:
        """Whether pictures are compared before the first shard is made."""
        return self.deduplicate or bool(self.against)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.corpus.records // self.per_shard)

    def name(self, number: int) -> str:
        """The file of a shard."""
        return f"shard-{number:05d}-of-{self.shards:05d}.arrayrecord"

    def span(self, number: int) -> range:
        """The records of a shard."""
        first = number * self.per_shard
        return range(first, min(first + self.per_shard, self.corpus.records))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def find(corpus: Corpus) -> tuple[Known, formats.CorpusSource]:
    """A corpus of one split as it is now, and what reads it.

    Raises:
      ConfigError: an unknown format.
      DataError: it cannot be read.
    """
    (path,) = map(_absolute, corpus.paths.values())
    images = _absolute(corpus.images) if corpus.images else ""
    source = _open(corpus.format, path, images)
    return Known(corpus.format, path, images, source.fingerprint, len(source)), source


def loaded(source: formats.CorpusSource, index: int, limits: filters.Limits) -> Example:
    """An example with the bytes of its images, which are not looked at; its text is.

    Raises:
      BadExample, BadImage: there is none.
    """
    example = source.example(index, np.random.default_rng(0))
    filters.check_text(example, limits)
    return dataclasses.replace(example, images=tuple(map(decoding.read, example.images)))


def cleaned(
    source: formats.CorpusSource,
    index: int,
    limits: filters.Limits,
    see: Callable[[UInt8[np.ndarray, "h w 4"]], Any] = lambda rgba: None,
) -> tuple[Example, list]:
    """An example all of whose images can be used, and what `see` makes of the pixels of each.

    Raises:
      BadExample, BadImage: there is none.
    """
    example, seen = loaded(source, index, limits), []
    for image in example.images:  # one at a time: pixels of many would fill the memory
        rgba = decoding.decode(image)
        filters.check_image(image, *rgba.shape[:2], limits)
        seen.append(see(rgba))
    return example, seen


def keep_to(plan: Plan, out: Path) -> None:
    """Writes the plan, or refuses to mix two.

    Raises:
      ConfigError: the folder holds another one's, or shards of an unknown one.
    """
    path, said = out / PLAN, plan.plain()
    if not path.exists():
        if any(out.glob("shard-*")):
            raise ConfigError(f"{out} holds shards without a {PLAN}; choose another folder")
        write(path, json.dumps(said).encode())
    try:
        known = dict(json.loads(path.read_text()).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no plan: choose another folder, or empty this one") from error
    known, said = _flat(known), _flat(said)
    for name in {**known, **said}:
        if known.get(name) != said.get(name):
            raise ConfigError(
                f"{out} was begun with {name} {known.get(name)!r}, not {said.get(name)!r}: go on "
                "with the old one, or choose another folder"
            )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """What a plan says, by the names of single settings."""
    inner = {
        n: v for name, value in tree.items() if isinstance(value, dict) for n, v in value.items()
    }
    return {name: value for name, value in tree.items() if not isinstance(value, dict)} | inner


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _open(format: str, path: str, images: str) -> formats.CorpusSource:
    return formats.CorpusSource("corpus", Corpus(format, {"all": path}, images), "all")


def temporary(path: Path) -> Path:
    """A name beside a file's, for what becomes it.

    No two writers have the same: an engine may give one task to two workers.
    """
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def replace(new: Path, path: Path) -> None:
    """Puts a whole file in its place, at once or not at all."""
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


def write(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all."""
    new = temporary(path)
    new.write_bytes(data)
    replace(new, path)
