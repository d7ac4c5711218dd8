"""Rows of parquet files by number: where each row group begins is kept in memory.

A group is read from its start to the rows that are asked for, in parts of bounded size: rows in
their order cost one pass, rows at random as much of a group as stands before them. Groups of 100
rows, as Hugging Face writes images, are one part; a corpus in larger ones is better prepared first.
"""

import collections
import functools
import glob
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vlm_jax.data.example import BadExample
from vlm_jax.data.records import digest
from vlm_jax.errors import ConfigError, DataError, StorageError

PART_BYTES = 64 * 2**20  # of the rows that are read at once, as the footer says
PART_ROWS = 256  # of them: a page that repeats one value unpacks to more than the footer says
CACHE_BYTES = 256 * 2**20  # of parts that are kept
FOOTERS = 16  # of files that are kept: a thousand groups take some milliseconds and MB


class _Group(NamedTuple):
    """A row group: of which file, which one there, how many rows, the first one in the file."""

    file: int
    number: int
    rows: int
    first: int
    bytes: int


class ParquetRecords:
    """The rows of all parquet files of a folder or pattern, in the order of the files' names.

    Args:
      path: of one file, of a folder of them, or with `*`, `?` and `[]` of several.
      columns: those of a file's columns that are read.

    Raises:
      ConfigError: pyarrow is not installed.
      DataError: no such file, one that is not parquet, one whose columns make no record, or no row.
    """

    def __init__(self, path: Path, columns: Callable[[Collection[str]], Sequence[str]]):
        self.paths = _files(path)
        self._footer = functools.lru_cache(FOOTERS)(_footer)
        self.columns = self._chosen(columns)
        groups = [group for i in range(len(self.paths)) for group in self._index(i)]
        self.groups: Int[np.ndarray, "n 5"] = np.array(groups, np.int64).reshape(-1, 5)
        ends = np.cumsum(self.groups[:, 2])
        self._starts, self._count = ends - self.groups[:, 2], int(ends[-1]) if len(ends) else 0
        if not self._count:
            raise DataError(f"{path} holds no row")
        self._cache: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._cached = 0  # bytes of them
        self._reading: tuple[int, int, Any] = (-1, 0, None)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: its columns as Python's own values.

        Raises:
          BadExample: the file is damaged there.
          StorageError: it cannot be read.
        """
        number, at = self._place(index)
        group = _Group(*self.groups[number].tolist())
        rows = max(1, min(PART_ROWS, PART_BYTES * group.rows // max(1, group.bytes)))
        with self._lock:
            part = self._part(number, group, at // rows, rows)
        if at % rows >= part.num_rows:
            raise BadExample("damaged", f"its row group ends before row {at}")
        try:
            return part.slice(at % rows, 1).to_pylist()[0]
        except UnicodeError as error:  # Arrow does not look before
            raise BadExample("not_utf8", str(error)) from error
        except (ValueError, OverflowError) as error:
            raise BadExample("damaged", f"row {at} of its row group: {error}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of where the rows are and of blocks of the files."""
        return digest(self.groups, self.paths)

    def where(self, index: int) -> str:
        """The file of row `index`, and how many-eth it is there."""
        number, at = self._place(index)
        group = _Group(*self.groups[number].tolist())
        return f"{self.paths[group.file]}, row {group.first + at}"

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    def _chosen(self, columns: Callable[[Collection[str]], Sequence[str]]) -> list[str]:
        names = self._footer(self.paths[0]).schema.to_arrow_schema().names
        try:
            return list(columns(names))
        except DataError as error:
            raise DataError(f"{self.paths[0]} {error}") from error

    def _index(self, file: int) -> Iterator[_Group]:
        """The row groups of a file."""
        footer, first = self._footer(self.paths[file]), 0
        missing = set(self.columns) - set(footer.schema.to_arrow_schema().names)
        if missing:
            raise DataError(f"{self.paths[file]} lacks {sorted(missing)}, which others have")
        wanted = [
            i
            for i in range(footer.num_columns)
            if footer.schema.column(i).path.split(".")[0] in self.columns
        ]
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            size = sum(group.column(i).total_uncompressed_size for i in wanted)
            yield _Group(file, number, group.num_rows, first, size)
            first += group.num_rows

    def _part(self, number: int, group: _Group, part: int, rows: int):
        """Part `part` of a row group, `rows` long."""
        if (number, part) in self._cache:
            self._cache.move_to_end((number, part))
            return self._cache[number, part]
        path = self.paths[group.file]
        try:
            found = self._read(path, number, group, part, rows)
        except OSError as error:
            self._reading = (-1, 0, None)
            if error.errno is not None:
                raise StorageError(f"{path} cannot be read: {error.strerror}") from error
            raise BadExample("damaged", f"row group {group.number}: {error}") from error
        except (ValueError, NotImplementedError) as error:  # Arrow's own are of these
            self._reading = (-1, 0, None)
            raise BadExample("damaged", f"row group {group.number}: {error}") from error
        self._cache[number, part] = found
        self._cached += found.nbytes
        while len(self._cache) > 1 and self._cached > CACHE_BYTES:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return found

    def _read(self, path: str, number: int, group: _Group, part: int, rows: int):
        """The same, from the file: goes on where the last one ended, if it can."""
        import pyarrow

        at, ahead, batches = self._reading
        if at != number or ahead > part:
            ahead, batches = 0, self._batches(path, group, rows)
        found = pyarrow.table({})
        for _ in range(ahead, part + 1):
            found = next(batches, found[:0])
        self._reading = (number, part + 1, batches)
        return found

    def _batches(self, path: str, group: _Group, rows: int) -> Iterator[Any]:
        """The rows of a group as tables of `rows` of them, the last one of what is left."""
        import pyarrow.parquet

        # Or all columns of the group are read whole before its first row.
        piecewise = {"pre_buffer": False, "buffer_size": 2**20}
        with pyarrow.parquet.ParquetFile(path, metadata=self._footer(path), **piecewise) as file:
            held = pyarrow.table({})
            for batch in file.iter_batches(
                rows, row_groups=[group.number], columns=self.columns, use_threads=False
            ):
                # Arrow promises no more than that a batch has at most so many rows.
                pieces = [*held.to_batches(), batch]
                held = pyarrow.Table.from_batches([piece for piece in pieces if piece.num_rows])
                if held.num_rows >= rows:
                    yield held[:rows]
                    held = held[rows:]
            if held.num_rows:
                yield held


def _files(path: Path) -> list[str]:
    """The files of a pattern, or below a folder."""
    pattern = os.path.join(glob.escape(path), "**", "*.parquet") if path.is_dir() else path
    found = sorted(glob.glob(os.fspath(pattern), recursive=True))
    if not found:
        raise DataError(
            f"{path} cannot be read: no such file; expected a folder of *.parquet, or a/b-*.parquet"
        )
    return found


def _footer(path: str):
    """What the end of a file says of it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "parquet files need pyarrow: install vlm_jax with the extra `corpora`"
        ) from error
    try:
        return pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file: {error}") from error
