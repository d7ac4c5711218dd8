"""Prepared corpora: ArrayRecord shards of one record a group, and a manifest beside them.

A record is msgpack of plain data: `id`, `images` (encoded bytes) and `turns`, each a role and its
parts, in which a number stands for an image.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from vlm_jax.data.example import BadExample, Example, ImageRef, Turn
from vlm_jax.errors import DataError, StorageError

MANIFEST = "manifest.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
      name: of the file.
      records: how many it holds.
      bytes: its size.
      sha256: of its bytes.
      rejects: how many records of the source it lacks, by reason.
    """

    name: str
    records: int
    bytes: int
    sha256: str
    rejects: dict[str, int]


def pack(example: Example) -> bytes:
    """An Example whose images are bytes, as a record."""
    turns = [
        [turn.role, [p.index if isinstance(p, ImageRef) else p for p in turn.parts]]
        for turn in example.turns
    ]
    images = list(example.images)
    return msgpack.packb({"id": example.meta.get("id", ""), "images": images, "turns": turns})


def unpack(data: bytes) -> tuple[str, Sequence[bytes], tuple[Turn, ...]]:
    """A record's id, images and turns.

    Raises:
      BadExample: it is none.
    """
    try:
        record = msgpack.unpackb(data)
        turns = tuple(
            Turn(role, tuple(ImageRef(p) if isinstance(p, int) else p for p in parts))
            for role, parts in record["turns"]
        )
        texts = [part for turn in turns for part in turn.parts if not isinstance(part, ImageRef)]
        if not all(isinstance(x, str) for x in [record["id"], *texts, *(t.role for t in turns)]):
            raise TypeError("an id, a role or a part is no text")
        if not turns or not all(isinstance(image, bytes) for image in record["images"]):
            raise TypeError("no turns, or an image that is no bytes")
        return record["id"], record["images"], turns
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise BadExample("not_a_record", f"{type(error).__name__}: {error}") from error


class ShardRecords:
    """The records of a prepared corpus.

    What is opened has the sizes of the manifest, which costs nothing. SHA-256 is left to
    `problems`: ArrayRecord has checksums of its own and refuses a record with a flipped bit.

    Args:
      path: its folder.

    Raises:
      DataError: there is no manifest, or a shard is not what it says.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.path, manifest = path, read_manifest(path)
        self.shards = _shards(path, manifest)
        for shard in self.shards:
            if wrong := _wrong_size(path, shard):
                raise DataError(wrong)
        filled = [str(path / shard.name) for shard in self.shards if shard.records]
        try:
            self._source = ArrayRecordDataSource(filled) if filled else []
            count = len(self)
        except Exception as error:  # the reader raises what its C++ says
            raise DataError(f"{path} holds no ArrayRecord shards: {error}") from error
        if count != manifest.get("records"):
            said = manifest.get("records")
            raise DataError(f"{path} holds {count} records; {MANIFEST} says {said}")
        if not count:
            raise DataError(f"{path} holds no record")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        """Record `index`.

        Raises:
          StorageError: it cannot be read.
        """
        try:
            return self._source[index]
        except Exception as error:  # the reader raises what its C++ says
            raise StorageError(f"{self.where(index)} cannot be read: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Of all bytes of all shards, as the manifest has them."""
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    def where(self, index: int) -> str:
        """The shard of record `index`, and how many-eth it is there."""
        for shard in self.shards:
            if index < shard.records:
                return f"{self.path / shard.name}, record {index}"
            index -= shard.records
        return f"{self.path}, record {index}"


def problems(folder: Path) -> Iterator[str]:
    """What of a prepared corpus is not as its manifest says; reads all of it.

    Raises:
      DataError: there is no manifest, or none that says what the shards are.
    """
    manifest = read_manifest(folder)
    found = _shards(folder, manifest)
    for shard in found:
        if wrong := _wrong_size(folder, shard) or _wrong_content(folder / shard.name, shard):
            yield wrong
    count = sum(shard.records for shard in found)
    if count != manifest.get("records"):
        yield (
            f"{folder / MANIFEST} says {manifest.get('records')} records; those of its shards are "
            f"{count}"
        )


def _wrong_size(folder: Path, shard: Shard) -> str:
    path = folder / shard.name
    found = path.stat().st_size if path.is_file() else None
    if found == shard.bytes:
        return ""
    said = "is missing" if found is None else f"has {found} bytes"
    return f"{path} {said}; {MANIFEST} says {shard.bytes} bytes"


def _wrong_content(path: Path, shard: Shard) -> str:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != shard.sha256:
            return f"{path} has SHA-256 {sha256}; {MANIFEST} says {shard.sha256}"
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (OSError, RuntimeError, ValueError) as error:  # the reader raises what its C++ says
        return f"{path} cannot be read: {error}"
    said = f"{path} holds {count} records; {MANIFEST} says {shard.records}"
    return "" if count == shard.records else said


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus.

    Raises:
      DataError: there is none, or of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {MANIFEST}; expected a folder that `python -m vlm_jax.prepare run` "
            "has finished"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise DataError(f"{folder / MANIFEST} is not of version {VERSION}")
    return manifest


def _shards(folder: Path, manifest: dict[str, Any]) -> list[Shard]:
    """What a manifest says of its shards, which may be anything."""
    said = manifest.get("shards")
    for shard in said if isinstance(said, list) else [said]:
        kinds = {name: type(value) for name, value in shard.items()} if type(shard) is dict else {}
        if kinds != {"name": str, "records": int, "bytes": int, "sha256": str, "rejects": dict}:
            raise DataError(f"{folder / MANIFEST} says {shard!r:.60}; expected a shard")
        if Path(shard["name"]).name != shard["name"] or shard["records"] < 0:
            given = f"{shard['name']!r:.60} with {shard['records']} records"
            raise DataError(f"{folder / MANIFEST} says {given}; expected a file of that folder")
    return [Shard(**shard) for shard in said]
