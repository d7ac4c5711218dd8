"""Where the records of JSON files begin and end, found a chunk of a file at a time."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vlm_jax.errors import DataError

# Bytes; a longer one is bad. Python makes some forty of the worst that a byte can say.
MAX_RECORD = 2 * 2**20
_CHUNK = 16 * 2**20
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"  # editors of Windows begin files with it


def spans(file, path: Path) -> Int[np.ndarray, "n 2"]:
    """Where each record begins and ends, in bytes.

    Raises:
      DataError: an array that is not whole.
    """
    first = file.read(4096).removeprefix(_BOM).lstrip(_SPACE)[:1]
    return _elements(file, path) if first == b"[" else _lines(file)


def newlines(file) -> Iterator[Int[np.ndarray, " lines"]]:
    """Where a file's lines end, some at a time."""
    file.seek(0)
    start = 0
    while data := file.read(_CHUNK):
        yield start + np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        start += len(data)


def _lines(file) -> Int[np.ndarray, "n 2"]:
    ends = np.concatenate([np.zeros(0, np.int64), *newlines(file)])
    size = os.fstat(file.fileno()).st_size
    ends = ends if len(ends) and ends[-1] == size - 1 else np.append(ends, size)
    starts = np.concatenate([[_after_mark(file)], ends[:-1] + 1])
    found = np.stack([starts, ends], axis=1)
    # Only short lines can be blank; long ones need not be looked at.
    short = np.flatnonzero(ends - starts < 16)
    blank = [
        i for i in short if not os.pread(file.fileno(), 16, found[i, 0]).split(b"\n")[0].strip()
    ]
    return np.delete(found, blank, axis=0)


def _after_mark(file) -> int:
    file.seek(0)
    found = file.read(len(_BOM))
    file.seek(0)
    return len(_BOM) if found == _BOM else 0


def _elements(file, path: Path) -> Int[np.ndarray, "n 2"]:
    scanner = _Scanner(file, path)
    found = _array(scanner)
    scanner.end()
    return found


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
    found = np.fromiter(scanner.entries(), np.dtype((np.int64, 2)))
    scanner.end()
    return found


class _Scanner:
    """Finds where the values of a JSON file begin and end, a chunk of it at a time.

    The parser itself finds the ends. It reads latin-1: so a character is a byte, and JSON's own
    characters are what they are in UTF-8.
    """

    def __init__(self, file, path: Path):
        self._file, self._path = file, path
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._base, self._at = "", 0, _after_mark(file)
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
        at = self._file.tell()
        self._file.seek(start)
        found = self._file.read(end - start)
        self._file.seek(at)
        return found

    def _more(self) -> bool:
        data = self._file.read(max(_CHUNK, len(self._text)))
        self._text += data.decode("latin-1")
        return bool(data)

    def _wrong(self, why: str) -> DataError:
        at = self._base + self._at
        line = 1 + sum(int((ends < at).sum()) for ends in newlines(self._file))
        return DataError(f"{self._path}, line {line}: {why}")
