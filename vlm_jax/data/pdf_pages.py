"""Pages of scanned and printed documents with their text: PDFA and OCR-IDL as they are published.

Both are WebDataset shards of PDFs, each beside a .json of the same name whose `pages` hold the text
of each page: PDFA's as `lines` and `words` of `text`, OCR-IDL's as a list of lines (chug's
doc_read_processor.py reads both). A page is an example: a picture of it, and its lines in the order
of the file. A page that the JSON says no text of has that of the PDF itself. How many pages there
are is read from the JSON, or else from the PDF, when the corpus is opened: prepare a large one.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int

from vlm_jax.data import decoding, pdf
from vlm_jax.data.conversations import short
from vlm_jax.data.example import BadExample
from vlm_jax.data.records import MAX_RECORD, parse
from vlm_jax.data.scanning import sections
from vlm_jax.data.tars import Sample, Tars, grouped, span
from vlm_jax.errors import DataError

MAX_JSON = 64 * 2**20  # bytes of the text and boxes of a whole document
MAX_PAGES = 1000  # of a document; one with more is one bad record

_NONE = np.zeros((0, 2), np.int64)


class _Place(NamedTuple):
    """Where a page lies: its document's PDF, and of the JSON its own part, or all of it if `whole`.

    -1 for what it lacks.
    """

    shard: int
    pdf: int
    pdf_size: int
    json: int
    json_size: int
    whole: int
    page: int
    pages: int


class PageRecords(Tars):
    """The pages of all documents of all shards that a pattern names.

    Args:
      path: of one shard, or with `*`, `?` and `[]` of several.

    Raises:
      ConfigError: pypdfium2 is not installed.
      DataError: no such file, or a shard that is no whole tar.
    """

    def __init__(self, path: Path):
        pdf.require()
        super().__init__(path, _index, "000013.pdf")

    def __getitem__(self, index: int) -> Sample:
        """Page `index`.

        Raises:
          BadExample: it has no PDF or no text, or either is too large or cannot be read.
          StorageError: the shard cannot be read.
        """
        place = _Place(*self.spans[index].tolist())
        if place.pdf < 0:
            raise BadExample("no_pdf", "expected a member that ends in .pdf")
        if place.pages > MAX_PAGES:
            raise BadExample("too_many_pages", f"{place.pages}; expected at most {MAX_PAGES}")
        if place.pdf_size > decoding.MAX_BYTES or place.json_size > MAX_RECORD:
            sizes = f"{place.pdf_size} bytes of PDF and {place.json_size} of JSON"
            raise BadExample("record_too_large", sizes)
        data, said = self.read(
            index, (place.pdf, place.pdf_size), (max(place.json, 0), place.json_size)
        )
        text = page_text(parse(said)) if place.json >= 0 and not place.whole else ""
        if place.whole:
            _expect_no_pages(parse(said))
        page = pdf.page(data, place.page)
        if not (text or page.text).strip():
            raise BadExample("no_text", f"page {place.page + 1} has none, in JSON or PDF")
        return Sample(page.image, text or page.text)

    def where(self, index: int) -> str:
        """The shard of page `index`, how many-eth it is there, and which of its document."""
        return f"{super().where(index)}, page {self.spans[index, 6] + 1}"


def page_text(page: Mapping[str, Any]) -> str:
    """The text of a page as its JSON has it; "" where it says none.

    Raises:
      BadExample: it is not as PDFA or OCR-IDL write it.
    """
    for part, between in ((page.get("lines"), "\n"), (page, "\n"), (page.get("words"), " ")):
        texts = part.get("text") if isinstance(part, dict) else None
        if texts and not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            raise BadExample("bad_page", f"text is {short(texts)}; expected a list of texts")
        if texts:
            return between.join(texts)
    return ""


def _expect_no_pages(document: Mapping[str, Any]) -> None:
    """Raises BadExample where pages stand that are no list: what a PDF says is not taken for it."""
    if document.get("pages"):
        given = short(document["pages"])
        raise BadExample("bad_pages", f"pages is {given}; expected a list of objects")


def _index(number: int, path: str) -> Iterator[_Place]:
    """Where the pages of a shard lie, in the order of its documents."""
    with open(path, "rb") as file:
        for members in grouped(path):
            document, said = span(members.get(".pdf")), span(members.get(".json"))
            if max(document[0], said[0]) < 0:
                continue
            parts = _parts(_raw(file, *said, MAX_JSON), said[0])
            whole = said[0] >= 0 and not len(parts)
            count = len(parts) or _pages_there(_raw(file, *document, decoding.MAX_BYTES))
            for page in range(count if count <= MAX_PAGES else 1):
                own = parts[page].tolist() if len(parts) else said
                yield _Place(number, *document, *own, whole, page, count)


def _parts(said: Callable[[], bytes], at: int) -> Int[np.ndarray, "n 2"]:
    """Where each page's part of a document's JSON begins, and its size; none where it has none."""
    try:
        found = sections(io.BytesIO(said()), Path("its .json")).get("pages", _NONE)
    except DataError:
        return _NONE
    return np.stack([at + found[:, 0], found[:, 1] - found[:, 0]], axis=1)


def _raw(file: BinaryIO, at: int, size: int, most: int) -> Callable[[], bytes]:
    """What reads a member, if that is asked for; nothing of none and of one too large."""

    def read() -> bytes:
        file.seek(at)
        return file.read(size)

    return read if at >= 0 and size <= most else bytes


def _pages_there(document: Callable[[], bytes]) -> int:
    """How many pages a PDF has; one where that cannot be known, and reading it says why."""
    try:
        return max(1, pdf.pages(document()))
    except BadExample:
        return 1
