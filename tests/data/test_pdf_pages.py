"""Pages of PDFs: what is rendered, and that whatever a file does stays in the process apart."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import corpora
import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import formats, images, pdf, pdf_pages
from vlm_jax.data.example import BadExample
from vlm_jax.errors import ConfigError, DataError


def size(data: bytes, page: int = 0):
    return PIL.Image.open(io.BytesIO(pdf.page(data, page).image)).size


def test_a_page_is_its_size_at_150_dots_per_inch():
    assert size(corpora.pdf(b"", box=b"0 0 144 72")) == (300, 150)
    assert size(corpora.pdf(b"", box=b"0 0 72 2000")) == (80, pdf.MAX_SIDE - 1)  # at fewer
    assert pdf.pages(corpora.pdf(b"", b"", b"")) == 3


def test_a_drawing_is_where_it_was_drawn():
    # A red square of an inch, whose lower left corner is an inch from that of the page.
    data = corpora.pdf(b"1 0 0 rg 72 72 72 72 re f", box=b"0 0 288 360")
    drawn = images.decode(pdf.page(data, 0).image)[..., 1] == 0
    expected = np.zeros((750, 600), bool)
    expected[750 - 300 : 750 - 150, 150:300] = True
    assert drawn.shape == expected.shape and (drawn != expected).mean() < 0.002


def test_pictures_saved_as_a_pdf_by_pillow_come_back():
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).resize((200, 300))
        for _ in range(2)
    ]
    file = io.BytesIO()
    pictures[0].save(file, "PDF", save_all=True, append_images=pictures[1:], resolution=150)
    for number, picture in enumerate(pictures):
        found = images.decode(pdf.page(file.getvalue(), number).image)[..., :3]
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG")  # as Pillow embeds it
        expected = images.decode(jpeg.getvalue())[..., :3]
        assert np.abs(found.astype(int) - expected).max() <= 3


def test_the_text_is_the_files_own_line_by_line():
    lines = b"BT /F 24 Tf 50 700 Td (Hello \\(there\\)) Tj 0 -40 Td (caf\\351) Tj ET"
    assert pdf.page(corpora.pdf(b"", lines), 1).text == "Hello (there)\ncaf\u00e9"


SCRIPT = corpora.pdf(b"").replace(
    b"/Catalog", b"/Catalog/OpenAction<</S/JavaScript/JS(app.launchURL\\('x'\\);while\\(1\\);)>>"
)
HOSTILE = {
    "not_a_pdf": b"<html>",
    "not_a_pdf empty": b"",
    "not_a_pdf cut": corpora.pdf(b"")[:200],
    "not_a_pdf without pages": corpora.pdf(),
    "record_too_large": corpora.pdf(b"BT /F 1 Tf (" + b"a" * 1_100 + b") Tj ET"),
}
HARMLESS = {
    "script": SCRIPT,
    "no contents": corpora.pdf(b"q q q Q Q garbage ] >> ("),
    "page of itself": corpora.pdf(b"").replace(b"Kids[4 0 R]", b"Kids[2 0 R]"),
    "endless size": corpora.pdf(b"", box=b"0 0 1e30 1e-9"),
    "negative size": corpora.pdf(b"", box=b"100 100 -5 -5"),
    "a line": corpora.pdf(b"", box=b"0 0 14400 0.001"),
    "a million pages": corpora.pdf(b"").replace(b"Count 1", b"Count 1000000"),
    "large picture": corpora.pdf(
        b"q 100 0 0 100 0 0 cm BI /W 60000 /H 60000 /BPC 8 /CS /RGB ID xxxx EI Q"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_rendered_is_named(name, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_CHARACTERS", 1_000)
    with pytest.raises(BadExample) as bad:
        pdf.page(HOSTILE[name], 0)
    assert bad.value.reason == name.split()[0] and bad.value.detail


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_file_does_takes_neither_time_nor_memory(name):
    pdf.pages(corpora.pdf(b""))  # the renderer has started
    started = time.process_time(), time.monotonic()
    try:
        width, height = size(HARMLESS[name])
        assert max(width, height) <= pdf.MAX_SIDE
    except BadExample as bad:
        assert bad.reason in ("not_a_pdf", "damaged", "bad_page_size", "no_such_page", "too_large")
    assert time.process_time() - started[0] < 1 and time.monotonic() - started[1] < 10


def test_a_page_that_takes_too_long_is_bad_and_the_next_is_rendered(monkeypatch):
    monkeypatch.setattr(pdf, "SECONDS", 0)  # and what is left of the second it is in
    slow = b"BT /F 1 Tf (" + b"a" * 50 + b") Tj ET\n"
    with pytest.raises(BadExample, match="too_slow: the page takes more"):
        pdf.page(corpora.pdf(slow * 300_000), 0)
    assert size(corpora.pdf(b"")) == (1240, 1755)


def test_a_renderer_that_dies_takes_one_page_with_it():
    pdf.pages(corpora.pdf(b""))
    for _, child in pdf._idle:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    dead = len(pdf._idle)
    for _ in range(dead):
        with pytest.raises(BadExample, match="crashed"):
            pdf.page(corpora.pdf(b""), 0)
    assert size(corpora.pdf(b"")) == (1240, 1755)


def test_a_renderer_ends_with_the_process_that_started_it():
    program = (
        "import corpora, os; from vlm_jax.data import pdf; pdf.pages(corpora.pdf(b''));"
        "print(pdf._idle[0][1].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": path})
    pid = int(done.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or b"pdf_child" not in _command(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} still runs")


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_documents_too_long_or_too_large_are_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf_pages, "MAX_PAGES", 1)
    corpora.pages(tmp_path)
    source = formats.CorpusSource("own", configs.Corpus("pages", {"all": f"{tmp_path}/*"}), "all")
    with pytest.raises(BadExample, match="too_many_pages: 2; expected at most 1"):
        source.example(0, np.random.default_rng(0))
    assert source.example(1, np.random.default_rng(0)).turns[1].parts == ("FIRST LINE\nsecond",)
    monkeypatch.setattr(pdf_pages.decoding, "MAX_BYTES", 10)
    with pytest.raises(BadExample, match="record_too_large"):
        source.example(1, np.random.default_rng(0))


def test_without_the_renderer_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(pdf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra `corpora`"):
        pdf_pages.PageRecords("none.tar")


def test_text_beside_a_pdf_is_never_passed_over(tmp_path):
    # Without pages in the JSON the text is that of the PDF; JSON that is broken is no such thing.
    said = {
        "0": b"{}",
        "1": b'{"pages": []}',
        "2": b"{",
        "3": b'{"pages": 3}',
        "4": b'{"pages": [1]}',
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in said.items():
            whole = corpora.pdf(corpora.red_page(1, b"layer"))
            for ending, content in ((".json", data), (".pdf", whole)):
                info = tarfile.TarInfo(name + ending)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = pdf_pages.PageRecords(tmp_path / "a.tar")
    assert [found[i].caption for i in range(2)] == ["layer"] * 2
    for index, reason in ((2, "not_json"), (3, "bad_pages"), (4, "not_an_object")):
        with pytest.raises(BadExample, match=reason):
            found[index]


def test_no_shard_is_no_corpus(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        pdf_pages.PageRecords(tmp_path / "*.tar")
