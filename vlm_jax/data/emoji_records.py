"""The embedded pictures: read from their shards, pooled by split for questions to draw from.

The shards in `embedded/` are built by `tools/build_embedded.py` and described in
`embedded/DATASHEET.md`.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt8

from vlm_jax.data import scenes
from vlm_jax.errors import ConfigError

SPLITS = ("train", "validation", "unseen_style", "unseen_concept")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One embedded picture: 64x64 RGBA PNG bytes and what is known about it.

    Attributes:
      key: the concept, an emoji's hexcode or "word-" and the word.
      root: the concept that stands for all that share its caption or picture.
      style: the artist ("noto", "twemoji", "fluent") or the font.
    """

    key: str
    root: str
    style: str
    caption: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    split: str
    image: bytes

    @property
    def flag(self) -> bool:
        return self.group == "flags"


@functools.cache  # records live as long as the process; a shrunk picture takes 2 to 4 kB
def thumbnail(record: Record, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """The record's picture as scenes place it."""
    return scenes.thumbnail(record.image, size)


def embedded(name: str):
    """A file of the embedded data, as `importlib.resources` sees it."""
    return importlib.resources.files("vlm_jax.data") / "embedded" / name


@functools.cache
def load_records(corpus: str) -> tuple[Record, ...]:
    """All records of "emoji" or "words", in shard order."""
    shards = json.loads(embedded("manifest.json").read_text())["shards"]
    names = [shard["name"] for shard in shards if shard["name"].startswith(f"{corpus}-")]
    return tuple(record for name in names for record in read_shard(name))


def read_shard(name: str) -> list[Record]:
    """The records of one shard."""
    with importlib.resources.as_file(embedded(name)) as path:
        reader = ArrayRecordReader(str(path))
        fields = [msgpack.unpackb(data) for data in reader.read_all()]
        reader.close()
    return [Record(**{**field, "tags": tuple(field["tags"])}) for field in fields]


class Pool:
    """Records to draw from at random, wholly or within a group, subgroup or style."""

    def __init__(self, records: Sequence[Record]):
        self.records = tuple(records)
        self._by: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            for field in ("group", "subgroup", "style", "key"):
                self._by.setdefault((field, getattr(record, field)), []).append(record)

    def where(self, field: str, value: str) -> Sequence[Record]:
        return self._by.get((field, value), ())

    def other(
        self, taken: Sequence[Record], rng: np.random.Generator, among: Sequence[Record] = ()
    ) -> Record:
        """A record whose concept and caption differ from those of all `taken`.

        Looks `among` the given ones first and falls back to the whole pool where they hold
        nothing else (a subgroup of one concept).
        """
        for place in (among, self.records):
            for _ in range(16 if place else 0):
                record = place[int(rng.integers(len(place)))]
                if all(record.root != t.root and record.caption != t.caption for t in taken):
                    return record
        raise ValueError(f"a pool of {len(self.records)} records has no concept beside {taken}")


@dataclasses.dataclass(frozen=True)
class World:
    """What the questions of one split may use.

    Attributes:
      anchors: the split's pictures, one Example each.
      names: where other captions and the second pictures of comparisons come from: what `train`
        shows, and for `unseen_concept` that split itself, since a familiar name would give itself
        away beside an unseen one.
    """

    anchors: Pool
    names: Pool


@functools.cache
def world(corpus: str, split: str) -> World:
    """The pools of one split, built once per process."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; the embedded data has {', '.join(SPLITS)}")
    records = load_records(corpus)
    names = split if split == "unseen_concept" else "train"
    return World(
        anchors=Pool([r for r in records if r.split == split]),
        names=Pool([r for r in records if r.split == names]),
    )
