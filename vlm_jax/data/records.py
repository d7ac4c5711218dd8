"""Records of JSON files by number: only where each begins and ends is kept in memory."""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm_jax.data.example import BadExample
from vlm_jax.errors import DataError

MAX_RECORD = 16 * 2**20  # bytes; a longer one is bad
_CHUNK = 16 * 2**20
_SPACE = b" \t\r\n"


class JsonRecords:
    """The records of a file of one JSON object per line, or of one JSON array of objects.

    Args:
      path: read again at every access, by position, so that any number of threads may.

    Raises:
      DataError: no such file, an empty one, or an array that is not whole.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - as long as the records
            self.spans = _spans(self._file, path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if not len(self.spans):
            raise DataError(f"{path} holds no record; expected JSON objects, one per line or in []")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`.

        Raises:
          BadExample: it is no JSON object, or too large.
        """
        start, end = self.spans[index].tolist()
        if end - start > MAX_RECORD:
            raise BadExample("record_too_large", f"{end - start} bytes; expected <= {MAX_RECORD}")
        return parse(os.pread(self._file.fileno(), end - start, start))

    def where(self, index: int) -> str:
        """The file, and its line on which record `index` begins."""
        return f"{self.path}:{int(np.searchsorted(self._newlines, self.spans[index, 0])) + 1}"

    @functools.cached_property
    def _newlines(self) -> Int[np.ndarray, " lines"]:
        return np.concatenate([np.zeros(0, np.int64), *_newlines(self._file)])


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
    first = file.read(4096).lstrip(b"\xef\xbb\xbf" + _SPACE)[:1]
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
    starts = np.concatenate([[0], ends[:-1] + 1])
    spans = np.stack([starts, ends], axis=1)
    # Only short lines can be blank; long ones need not be looked at.
    short = np.flatnonzero(ends - starts < 16)
    blank = [
        i for i in short if not os.pread(file.fileno(), 16, spans[i, 0]).split(b"\n")[0].strip()
    ]
    return np.delete(spans, blank, axis=0)


def _elements(file, path: Path) -> Int[np.ndarray, "n 2"]:
    """Those of one array, found by the parser itself, a chunk of the file at a time."""
    # As latin-1 a character is a byte, and JSON's own characters are what they are in UTF-8.
    decoder, spans = json.JSONDecoder(), []
    file.seek(0)
    text, base = "", 0

    def wrong(at: int, why: str) -> DataError:
        before = sum(len(n) - (n >= base + at).sum() for n in _newlines(file))
        return DataError(f"{path}, line {before + 1}: {why}")

    def more() -> bool:
        nonlocal text
        data = file.read(max(_CHUNK, len(text)))
        text += data.decode("latin-1")
        return bool(data)

    def token(at: int) -> int:
        """The next position that is no white space."""
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text) or not more():
                return at

    while len(text) < 3 and more():
        pass
    at = token(3 if text.startswith("\xef\xbb\xbf") else 0) + 1
    while True:
        at = token(at)
        if text[at : at + 1] == "]" and not spans:
            break
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text):  # a number could go on in the next chunk
                    break
                whole = True
            except (ValueError, RecursionError) as error:
                whole, problem = False, error
            if len(text) - at > 2 * MAX_RECORD or not more():
                if whole:
                    raise wrong(end, "the array does not end with ]")
                raise wrong(at, f"not JSON: {problem}")
        spans.append((base + at, base + end))
        at = token(end)
        separator = text[at : at + 1]
        if separator == "]":
            break
        if separator != ",":
            raise wrong(at, f"{separator!r} behind an element; expected ',' or ']'")
        at += 1
        if at > _CHUNK:
            text, base, at = text[at:], base + at, 0
    return np.array(spans, np.int64).reshape(-1, 2)
