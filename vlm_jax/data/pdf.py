"""Pages of PDF files as pictures, rendered by PDFium in a process apart that a bad file may end."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from vlm_jax.data.example import BadExample
from vlm_jax.errors import ConfigError

DPI = 150  # as chug renders both corpora (doc_read_processor.py); A4 has 1240 x 1754 pixels
MAX_SIDE = 2200  # pixels of the longer side: larger pages are rendered at fewer dots per inch
MAX_CHARACTERS = 1_000_000  # on a page
SECONDS = 5  # of the processor, for one page

_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pdf_child.py")
_idle: list[tuple[int, subprocess.Popen]] = []  # with the process that started each


class Page(NamedTuple):
    """A page: a PNG, and the text that the file has for it."""

    image: bytes
    text: str


def require() -> None:
    """Raises ConfigError where pypdfium2 is not installed."""
    if importlib.util.find_spec("pypdfium2") is None:
        raise ConfigError("pages of PDFs need pypdfium2: install vlm_jax with the extra `corpora`")


def page(data: bytes, number: int) -> Page:
    """Page `number`, from 0, of a PDF at `DPI`; a page larger than `MAX_SIDE` at fewer.

    Raises:
      BadExample: it is no PDF, has no such page, or takes too much time or memory.
    """
    said, image = _ask(data, number)
    return Page(image, said["text"])


def pages(data: bytes) -> int:
    """How many pages a PDF has.

    Raises:
      BadExample: it is none.
    """
    return _ask(data, -1)[0]["pages"]


def _ask(data: bytes, number: int) -> tuple[dict[str, Any], bytes]:
    request = {
        "size": len(data),
        "page": number,
        "dpi": DPI,
        "side": MAX_SIDE,
        "characters": MAX_CHARACTERS,
        "seconds": SECONDS,
    }
    with _child() as child:
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n" + data)
            child.stdin.flush()
            said = json.loads(child.stdout.readline())
            image = child.stdout.read(said.pop("size"))
        except (OSError, ValueError) as error:  # it died
            raise _death(child) from error
    if "reason" in said:
        raise BadExample(said["reason"], said["detail"])
    return said, image


def _death(child: subprocess.Popen) -> BadExample:
    code = child.wait()
    if code == -signal.SIGXCPU:
        return BadExample("too_slow", f"the page takes more than {SECONDS} s")
    return BadExample("crashed", f"the renderer ended with {code}")


@contextlib.contextmanager
def _child() -> Iterator[subprocess.Popen]:
    """A renderer that nobody else has: as many as threads ask at once are kept."""
    try:
        owner, child = _idle.pop()
    except IndexError:
        owner, child = -1, None
    if owner != os.getpid():  # none, or of the process that this one was forked from
        child = _started()
    try:
        yield child
    except BaseException:  # there may be half an answer in its pipe
        child.kill()
        child.wait()
        raise
    _idle.append((os.getpid(), child))


def _started() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
