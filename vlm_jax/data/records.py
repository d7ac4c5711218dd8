"""Records of JSON files by number: only where each begins and ends is kept in memory."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm_jax.data.example import BadExample
from vlm_jax.errors import DataError, StorageError

# Bytes; a longer one is bad. Python makes some forty of the worst that a byte can say.
MAX_RECORD = 2 * 2**20
_CHUNK = 16 * 2**20
_BLOCK = 4096  # bytes of which a fingerprint is made,
_BLOCKS = 256  # and how many of them it reads of all files of a corpus
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"  # editors of Windows begin files with it


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
        return _spans(self._file, self.path)

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
        return np.concatenate([np.zeros(0, np.int64), *_newlines(self._file)])


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
        found = sections(self._file, self.path)
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


def _spans(file, path: Path) -> Int[np.ndarray, "n 2"]:
    """Where each record begins and ends, in bytes."""
    first = file.read(4096).removeprefix(_BOM).lstrip(_SPACE)[:1]
    return _elements(file, path) if first == b"[" else _lines(file)


def _newlines(file) -> Iterator[Int[np.ndarray, " lines"]]:
    file.seek(0)
    start = 0
    while data := file.read(_CHUNK):
        yield start + np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        start += len(data)


def _lines(file) -> Int[np.ndarray, "n 2"]:
    ends = np.concatenate([np.zeros(0, np.int64), *_newlines(file)])
    size = os.fstat(file.fileno()).st_size
    ends = ends if len(ends) and ends[-1] == size - 1 else np.append(ends, size)
    starts = np.concatenate([[_after_mark(file)], ends[:-1] + 1])
    spans = np.stack([starts, ends], axis=1)
    # Only short lines can be blank; long ones need not be looked at.
    short = np.flatnonzero(ends - starts < 16)
    blank = [
        i for i in short if not os.pread(file.fileno(), 16, spans[i, 0]).split(b"\n")[0].strip()
    ]
    return np.delete(spans, blank, axis=0)


def _after_mark(file) -> int:
    return len(_BOM) if os.pread(file.fileno(), len(_BOM), 0) == _BOM else 0


def _elements(file, path: Path) -> Int[np.ndarray, "n 2"]:
    scanner = _Scanner(file, path)
    spans = _array(scanner)
    scanner.end()
    return spans


def _array(scanner: "_Scanner") -> Int[np.ndarray, "n 2"]:
    # As they come: a million pairs of Python's numbers would take 130 MB.
    return np.fromiter(scanner.elements(), np.dtype((np.int64, 2)))


def sections(file, path: Path) -> dict[str, Int[np.ndarray, "n 2"]]:
    """Where the elements of each array of a file's one object begin and end, by its name.

    Raises:
      DataError: it is no whole JSON object.
    """
    return members(file, path)[0]


def members(
    file, path: Path
) -> tuple[dict[str, Int[np.ndarray, "n 2"]], dict[str, tuple[int, int]]]:
    """Where the elements of each array of a file's one object begin and end, and its other values.

    Raises:
      DataError: it is no whole JSON object.
    """
    scanner, arrays, others = _Scanner(file, path), {}, {}
    for name in scanner.members():
        if scanner.next() == "[":
            arrays[name] = _array(scanner)
        else:
            others[name] = scanner.value()
    scanner.end()
    return arrays, others


def entries(file, path: Path) -> Int[np.ndarray, "n 2"]:
    """Where each member of a file's one object begins, with its name, and ends.

    Raises:
      DataError: it is no whole JSON object.
    """
    scanner = _Scanner(file, path)
    spans = np.fromiter(scanner.entries(), np.dtype((np.int64, 2)))
    scanner.end()
    return spans


class _Scanner:
    """Finds where the values of a JSON file begin and end, a chunk of it at a time.

    The parser itself finds the ends. It reads latin-1: so a character is a byte, and JSON's own
    characters are what they are in UTF-8.
    """

    def __init__(self, file, path: Path):
        self._file, self._path = file, path
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._base, self._at = "", 0, 0
        file.seek(0)
        self._at = _after_mark(file)
        while len(self._text) < self._at and self._more():
            pass

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def value(self) -> tuple[int, int]:
        """Where the next value begins and ends, in bytes; goes behind it."""
        self.next()
        while True:
            try:
                _, end = self._parse(self._text, self._at)
                # A number could go on in the next chunk; of "1." and "1e" the parser takes the 1.
                whole = end < len(self._text) and self._text[end] not in ".eE"
                problem = "the file ends behind it"
            except (ValueError, RecursionError) as error:
                # Its lines would be those of a chunk.
                whole, problem = False, f"not JSON: {getattr(error, 'msg', error)}"
            if whole:
                break
            if len(self._text) - self._at > 2 * MAX_RECORD or not self._more():
                raise self._wrong(problem)
        span = self._base + self._at, self._base + end
        self._at = end
        if self._at > _CHUNK:
            self._text, self._base, self._at = self._text[end:], self._base + end, 0
        return span

    def elements(self) -> Iterator[tuple[int, int]]:
        """Where each element of the next value, an array, begins and ends."""
        for _ in self._list("[]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """The names of the next value, an object; whoever asks goes behind each one's value."""
        for start, end in self._names():
            name = json.loads(self._raw(start, end).decode("utf-8", "replace"))
            if not isinstance(name, str):
                raise self._wrong("a name is expected")
            yield name

    def entries(self) -> Iterator[tuple[int, int]]:
        """Where each member of the next value, an object, begins and ends."""
        for start, _ in self._names():
            yield start, self.value()[1]

    def _names(self) -> Iterator[tuple[int, int]]:
        """Where each name of the next value, an object, is; stands behind its colon."""
        for _ in self._list("{}"):
            span = self.value()
            self._expect(":")
            yield span

    def end(self) -> None:
        """Raises DataError where something follows: `cat a.json b.json` would lose b."""
        if found := self.next():
            raise self._wrong(f"{found!r} stands where the file should end")

    def _list(self, ends: str) -> Iterator[None]:
        """Once for each thing between two ends, with commas between them."""
        self._expect(ends[0])
        if self.next() == ends[1]:
            self._at += 1
            return
        while True:
            yield
            if self._expect("," + ends[1]) == ends[1]:
                return

    def _expect(self, among: str) -> str:
        found = self.next()
        if not found or found not in among:
            given = repr(found) if found else "the end"
            raise self._wrong(f"{given} stands where one of {among} is expected")
        self._at += 1
        return found

    def _raw(self, start: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - start, start)

    def _more(self) -> bool:
        data = self._file.read(max(_CHUNK, len(self._text)))
        self._text += data.decode("latin-1")
        return bool(data)

    def _wrong(self, why: str) -> DataError:
        at = self._base + self._at
        line = 1 + sum(int((ends < at).sum()) for ends in _newlines(self._file))
        return DataError(f"{self._path}, line {line}: {why}")
