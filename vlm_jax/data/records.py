"""Records of JSON files by number: only where each begins and ends is kept in memory."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm_jax.data import scanning
from vlm_jax.data.example import BadExample
from vlm_jax.data.scanning import MAX_RECORD
from vlm_jax.errors import DataError, StorageError

_BLOCK = 4096  # bytes of which a fingerprint is made,
_BLOCKS = 256  # and how many of them it reads of all files of a corpus


class JsonRecords:
    """The records of a file of one JSON object per line, or of one JSON array of objects.

    Args:
      path: read again at every access, by position, so that any number of threads may.

    Raises:
      DataError: no such file, an empty one, or an array that is not whole.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():  # to open a pipe would wait for its other end
            raise DataError(f"{path} is no file; expected one of JSON")
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - as long as the records
            self.spans = self._index()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if not len(self.spans):
            raise DataError(f"{path} holds no record; expected JSON objects, one per line or in []")

    def _index(self) -> Int[np.ndarray, "n 2"]:
        return scanning.spans(self._file, self.path)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`.

        Raises:
          BadExample: it is no JSON object, or too large.
          StorageError: it cannot be read.
        """
        start, end = self.spans[index].tolist()
        if end - start > MAX_RECORD:
            raise BadExample("record_too_large", f"{end - start} bytes; expected <= {MAX_RECORD}")
        return self._parse(self._read(start, end))

    def _parse(self, data: bytes) -> dict[str, Any]:
        return parse(data)

    def _read(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), end - start, start)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of where the records are and of samples of the file."""
        return digest(self.spans, [self.path])

    def where(self, index: int) -> str:
        """The file, its line on which record `index` begins, and which it is where lines share."""
        line = self._line(index)
        neighbours = [i for i in (index - 1, index + 1) if 0 <= i < len(self)]
        shared = line in map(self._line, neighbours)
        return f"{self.path}:{line}" + (f", record {index}" if shared else "")

    def _line(self, index: int) -> int:
        return int(np.searchsorted(self._newlines, self.spans[index, 0])) + 1

    @functools.cached_property
    def _newlines(self) -> Int[np.ndarray, " lines"]:
        return np.concatenate([np.zeros(0, np.int64), *scanning.newlines(self._file)])


def digest(spans: Int[np.ndarray, "n _"], paths: Sequence[str | os.PathLike]) -> str:
    """Of where records are and of blocks spread over their files.

    It notices every edit that moves a record or changes a size, all edits of files of a megabyte,
    and another file in a larger one's place; the times of files, which copies change, it ignores.

    Raises:
      StorageError: a file cannot be read.
    """
    found = hashlib.blake2b(np.ascontiguousarray(spans), digest_size=8)
    each = max(2, _BLOCKS // len(paths))
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                found.update(size.to_bytes(8))
                for at in np.unique(np.linspace(0, max(0, size - _BLOCK), each).astype(int)):
                    found.update(os.pread(file.fileno(), _BLOCK, int(at)))
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return found.hexdigest()


class CocoRecords(JsonRecords):
    """The annotations of a COCO file, each with the file name of its image.

    Raises:
      DataError: no such file, or none of COCO's.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        ids = [self._image(i)["id"] for i in range(len(self._images))]
        self._order = np.argsort(ids, kind="stable")
        self._ids = np.array(ids)[self._order]

    def _index(self) -> Int[np.ndarray, "n 2"]:
        found = scanning.sections(self._file, self.path)
        for name in ("images", "annotations"):
            if name not in found:
                raise DataError(f"{self.path} has no list {name!r}; expected a COCO file")
        self._images = found["images"]
        return found["annotations"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Annotation `index`, with `file_name`.

        Raises:
          BadExample: it is none, or of no image.
        """
        annotation = super().__getitem__(index)
        wanted = annotation.get("image_id")
        place = np.searchsorted(self._ids, wanted) if isinstance(wanted, int) else len(self._ids)
        if place == len(self._ids) or self._ids[place] != wanted:
            raise BadExample("no_such_image", f"image_id is {wanted!r}; no image has it")
        return annotation | {"file_name": self._image(self._order[place])["file_name"]}

    def _image(self, index: int) -> dict[str, Any]:
        try:
            image = parse(self._read(*self._images[index].tolist()))
        except BadExample as error:
            raise DataError(f"{self.path}: image {index} cannot be used: {error}") from error
        if not isinstance(image.get("id"), int) or not isinstance(image.get("file_name"), str):
            raise DataError(f"{self.path}: image {index} lacks an id or a file_name")
        return image


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object of nothing but JSON: no NaN, no name twice, no text that is not Unicode.

    Raises:
      BadExample: it is none.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeError as error:
        raise BadExample("not_utf8", str(error)) from error
    except RecursionError as error:
        raise BadExample("too_deep", "nested too deeply") from error
    except ValueError as error:
        raise BadExample("not_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadExample("not_an_object", f"a {type(value).__name__}; expected an object")
    return value


def _no(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == k for k, _ in pairs) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return found
