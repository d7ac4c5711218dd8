"""Samples of WebDataset shards by number: where each one's image and text lie is kept in memory.

Members that belong together share a name up to its first dot, as in the output of img2dataset:
`000013.jpg`, `000013.txt`, `000013.json`. Only regular files with the endings below are ever read,
by position: nothing is extracted, and nothing of a pickle is looked at.
"""

import functools
import glob
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vlm_jax.data import decoding
from vlm_jax.data.example import BadExample
from vlm_jax.data.records import MAX_RECORD, digest, parse
from vlm_jax.errors import DataError, StorageError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".json")  # the first one there is says the caption


class Sample(NamedTuple):
    """What a sample says.

    Attributes:
      image: encoded bytes.
      caption: its text.
    """

    image: bytes
    caption: str


class _Place(NamedTuple):
    """Where a sample lies: -1 for what it lacks."""

    shard: int
    image: int
    image_size: int
    text: int
    text_size: int
    is_json: int


class Tars:
    """Records that lie in tars, and where: `spans` has a row for each, with the tar's number first.

    Args:
      path: of one shard, or with `*`, `?` and `[]` of several, taken in the order of their names.
      index: where the records of a shard lie, given its number and path.
      expected: what a shard's members are called.

    Raises:
      DataError: no such file, a shard that is no whole tar, or no record in any.
    """

    def __init__(
        self,
        path: Path,
        index: Callable[[int, str], Iterator[Sequence[int]]],
        expected: str,
    ):
        self.paths = sorted(glob.glob(os.fspath(path)))
        if not self.paths:
            raise DataError(f"{path} cannot be read: no such file; expected shards, as a/b-*.tar")
        # As arrays at once: ten million places as Python's numbers would take gigabytes.
        places = [np.array(list(index(i, shard)), np.int64) for i, shard in enumerate(self.paths)]
        filled = [found for found in places if len(found)]
        if not filled:
            raise DataError(f"{path} holds no sample; expected members such as {expected}")
        self.spans = np.concatenate(filled)

    def __len__(self) -> int:
        return len(self.spans)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of where the samples are and of blocks of the shards."""
        return digest(self.spans, self.paths)

    def where(self, index: int) -> str:
        """The shard of sample `index`, and how many-eth it is there."""
        shard = self.spans[index, 0]
        return (
            f"{self.paths[shard]}, sample {index - int(np.searchsorted(self.spans[:, 0], shard))}"
        )

    def read(self, index: int, *parts: tuple[int, int]) -> list[bytes]:
        """Parts of the shard of sample `index`, each by its place and size.

        Raises:
          StorageError: the shard cannot be read.
        """
        try:
            # Opened anew: a process may hold 1,024 files, and CC12M alone has 1,242 shards.
            with open(self.paths[self.spans[index, 0]], "rb", buffering=0) as file:
                return [os.pread(file.fileno(), size, at) for at, size in parts]
        except OSError as error:
            raise StorageError(f"{self.where(index)} cannot be read: {error.strerror}") from error


class TarRecords(Tars):
    """The samples of all shards that a pattern names, in the order of the shards' names.

    Args:
      path: of one shard, or with `*`, `?` and `[]` of several.

    Raises:
      DataError: no such file, or a shard that is no whole tar.
    """

    def __init__(self, path: Path):
        super().__init__(path, _index, "000013.jpg")

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
          BadExample: it lacks an image or a caption, or they are too large or unreadable.
          StorageError: the shard cannot be read.
        """
        place = _Place(*self.spans[index].tolist())
        if place.image < 0:
            raise BadExample("no_image", f"expected a member that ends in {', '.join(IMAGES)}")
        if place.text < 0:
            raise BadExample("no_caption", f"expected a member that ends in {' or '.join(TEXTS)}")
        if place.image_size > decoding.MAX_BYTES or place.text_size > MAX_RECORD:
            sizes = f"{place.image_size} bytes of image and {place.text_size} of text"
            raise BadExample("record_too_large", sizes)
        text, image = self.read(
            index, (place.text, place.text_size), (place.image, place.image_size)
        )
        return Sample(image, _caption(text, place.is_json))


def _index(number: int, path: str) -> Iterator[_Place]:
    """Where the samples of a shard lie, in the order of their first members."""
    for members in grouped(path):
        image = next((members[e] for e in IMAGES if e in members), None)
        text = next((e for e in TEXTS if e in members), None)
        if image is not None or text is not None:
            yield _Place(number, *span(image), *span(members.get(text)), int(text == ".json"))


def grouped(path: str) -> Iterable[dict[str, tarfile.TarInfo]]:
    """A shard's members by their endings, for each name that they share.

    Raises:
      DataError: it is no whole tar.
    """
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # or it keeps them all
                if member.size < 0:  # PAX headers may say so, and tarfile would go back and loop
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                folder, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                # Of a sparse file only the parts between its holes are there.
                if not member.isreg() or member.issparse() or not dot or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends behind the file")
                ending = "." + ending.lower()
                # The first of a name counts, as in WebDataset's own reader.
                found.setdefault(f"{folder}/{stem}", {}).setdefault(ending, member)
            # tarfile takes a damaged header for the end, and would lose what comes behind it.
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
            if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
            _expect_zeros(tar.fileobj)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole tar: {error}") from error
    return found.values()


def _expect_zeros(file: BinaryIO) -> None:
    """Raises ReadError where something follows the end: `cat a.tar b.tar` would lose b."""
    while block := file.read(2**20):
        if block.strip(b"\0"):
            at = file.tell() - len(block)
            raise tarfile.ReadError(
                f"more behind its end, after byte {at}; expected one tar per file: name several as "
                "a/b-*.tar"
            )


def span(member: tarfile.TarInfo | None) -> tuple[int, int]:
    """Where a member lies and its size; -1 for none."""
    return (-1, 0) if member is None else (member.offset_data, member.size)


def _caption(text: bytes, is_json: int) -> str:
    if not is_json:
        try:
            return text.decode("utf-8")
        except UnicodeError as error:
            raise BadExample("not_utf8", str(error)) from error
    caption = parse(text).get("caption")
    if not isinstance(caption, str):
        raise BadExample("no_caption", f"caption of its .json is {caption!r}; expected text")
    return caption
