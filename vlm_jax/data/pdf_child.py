"""A process apart that renders pages of PDFs: whatever a file does, it does it here.

It imports nothing of vlm_jax. `pdf.py` starts it and writes requests to its standard input: a line
of JSON (`size` of the file in bytes, `page` or -1, `dpi`, `side`, `characters`, `seconds`) and the
file. It answers with a line of JSON, either `reason` and `detail` or `pages` and `text`, with the
`size` of the PNG that follows. A file that takes more seconds of the processor ends it, as one does
that takes more memory or breaks PDFium.
"""

import io
import json
import resource
import sys

import pypdfium2

MEMORY = 2 * 2**30  # address space: a page of `side` pixels takes 20 MB, PDFium's own limit is 1 GB


class Refused(Exception):
    """A reason and its detail."""


def answer(data: bytes, page: int, dpi: float, side: int, characters: int) -> tuple[dict, bytes]:
    """How many pages there are; text and PNG of one, if it is not -1."""
    try:
        # Without its forms initialised, a document runs no script; this build has no engine either.
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise Refused("not_a_pdf", str(error)) from error
    count = len(document)
    if page < 0:
        return {"pages": count}, b""
    if page >= count:
        raise Refused("no_such_page", f"page {page + 1} of {count}")
    try:
        found = document[page]
        return {"pages": count, "text": _text(found, characters)}, _picture(found, dpi, side)
    except pypdfium2.PdfiumError as error:
        raise Refused("damaged", f"page {page + 1}: {error}") from error


def _text(page: pypdfium2.PdfPage, characters: int) -> str:
    text = page.get_textpage()
    if text.count_chars() > characters:
        raise Refused("record_too_large", f"{text.count_chars()} characters on a page")
    # PDFium ends lines as Windows does; what is no Unicode comes as halves of pairs.
    found = text.get_text_bounded().replace("\r\n", "\n").replace("\x00", "")
    return found.encode("utf-8", "ignore").decode()


def _picture(page: pypdfium2.PdfPage, dpi: float, side: int) -> bytes:
    width, height = page.get_size()  # in points
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise Refused("bad_page_size", f"{width} x {height} points")
    scale = min(dpi / 72, (side - 1) / max(width, height))  # sizes are rounded up
    file = io.BytesIO()
    page.render(scale=scale, may_draw_forms=False).to_pil().convert("RGB").save(
        file, "PNG", compress_level=1
    )
    return file.getvalue()


def main() -> None:
    """Answers until its standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := source.readline():
        request = json.loads(line)
        data = source.read(request.pop("size"))
        _limit(request.pop("seconds"))
        try:
            said, picture = answer(data, **request)
        except Refused as refused:
            said, picture = dict(zip(("reason", "detail"), refused.args)), b""
        except MemoryError:
            said, picture = {"reason": "too_large", "detail": "more memory than a page may"}, b""
        sink.write(json.dumps({**said, "size": len(picture)}).encode() + b"\n" + picture)
        sink.flush()


def _limit(seconds: int) -> None:
    """How long the processor may work on what comes: a busy machine changes no answer."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
