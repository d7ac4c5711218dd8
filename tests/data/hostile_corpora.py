"""Corpora that mean harm, made here; run as a script, it says what each costs to read.

Every one is read to its end or refused by name; a fork validates and prepares it.
"""

import json
import os
import pathlib
import sys
import tarfile
import time

from vlm_jax.config import Corpus
from vlm_jax.data import formats, preparation, validation
from vlm_jax.errors import VlmError

GOOD = {
    "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
}


def lines(*bad: str) -> bytes:
    """JSONL whose last record is good."""
    return "\n".join([*bad, json.dumps(GOOD)]).encode("utf-8", "surrogatepass")


def said(content) -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}, GOOD["messages"][1]]})


def member(name: str, size: int, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def tar(*blocks: bytes) -> bytes:
    return b"".join(blocks) + bytes(1024)


def many_members(count: int) -> bytes:
    return tar(*(member(f"{i}.txt", 0) for i in range(count)))


def extended(size: int) -> bytes:
    """A PAX header of that many bytes before a member."""
    record = b"%d comment=" % (size - 1)
    body = record + b"x" * (size - 2 - len(record)) + b"\n"
    return tar(member("pax", size, type=tarfile.XHDTYPE), body, bytes(-size % 512), member("a", 0))


def beside(json: bytes) -> bytes:
    """A shard of one PDF, which is none, and what is said of it."""
    pdf = b"%PDF-1.4".ljust(512)
    said = member("a.json", len(json)), json, bytes(-len(json) % 512)
    return tar(*said, member("a.pdf", 512), pdf)


TARS = ("webdataset", "pages")
DEEP = 1_000_000
CORPORA = {
    "nested lists": ("messages", lines("[" * DEEP)),
    "nested objects": ("messages", lines('{"a":' * DEEP)),
    "an array nested in an array": ("messages", b"[" + b"[" * DEEP),
    "a line of 40 MB": ("messages", lines('{"messages": "' + "x" * 40_000_000 + '"}')),
    "a line of empty lists": ("messages", lines('{"messages": [' + "[]," * 600_000 + "[]]}")),
    "a list of a million images": ("messages", lines('{"images": [' + '"a",' * 400_000 + '"a"]}')),
    "a number of a million digits": ("messages", lines('{"id": ' + "9" * 1_000_000 + "}")),
    "half a surrogate pair": ("messages", lines(said("\ud800"))),
    "a million placeholders": ("messages", lines(said("<image>" * 200_000))),
    "one key ten thousand times": ("messages", lines("{" + '"a":1,' * 10_000 + '"a":1}')),
    "not text": ("messages", bytes(range(256)) * 1000),
    "zeros": ("messages", bytes(30_000_000)),
    "blank lines alone": ("messages", b"\n" * 300_000),
    "an array without end": ("messages", b"[" + b"1," * 500_000),
    "a string without end": ("messages", b'["' + b"x" * 40_000_000),
    "annotations of no image": (
        "coco",
        b'{"images": [], "annotations": [' + b'{"image_id": 1},' * 50_000 + b"{}]}",
    ),
    "a member of a terabyte": ("webdataset", tar(member("a.jpg", 10**12))),
    "a member of less than nothing": ("webdataset", tar(member("a.jpg", -512))),
    "thirty thousand members": ("webdataset", many_members(30_000)),
    "a header of 20 MB": ("webdataset", extended(20_000_000)),
    "a link out of the folder": (
        "webdataset",
        tar(member("a.jpg", 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.txt", 0)),
    ),
    "a device": ("webdataset", tar(member("a.jpg", 0, type=tarfile.CHRTYPE), member("a.txt", 0))),
    "a path that leads out": (
        "webdataset",
        tar(member("../../a.jpg", 0), member("../../a.txt", 0)),
    ),
    "a document of 300,000 pages": ("pages", beside(b'{"pages": [' + b"{}," * 300_000 + b"{}]}")),
    "a page of a million lists": ("pages", beside(b'{"pages": [[' + b"[]," * 600_000 + b"[]]]}")),
    "pages nested in pages": ("pages", beside(b'{"pages": ' + b"[" * DEEP)),
    "a PDF of a terabyte": ("pages", tar(member("a.pdf", 10**12))),
    "thirty thousand questions of nothing": ("gqa", b"{" + b'"1": 1,' * 30_000 + b'"1": {}}'),
    "an object without end": ("gqa", b'{"1": {"a": "' + b"x" * 40_000_000),
    "nested answers": (
        "textvqa",
        b'{"data": [{"question": "a?", "image_id": "a", "answers": '
        + b"[" * 900
        + b"]" * 900
        + b"}]}",
    ),
    "a page of nothing": (
        "obelics",
        json.dumps({"images": [None] * 150_000, "texts": [None] * 150_000}).encode(),
    ),
    "a page of many pictures": (
        "mmc4",
        b'{"text_list": ["a"], "image_info": ['
        + b",".join([b'{"image_name": "a", "matched_text_index": 0}'] * 30_000)
        + b"]}",
    ),
    "no tar": ("webdataset", b"x" * 10_000),
    "half a tar": ("webdataset", tar(member("a.jpg", 5000))[:900]),
}


def spend(format: str, path: pathlib.Path, out: pathlib.Path) -> dict[str, list[str]]:
    """Validates and prepares a corpus: what both said."""
    corpus, found = Corpus(format, {"all": str(path)}), {}
    for name, job in {
        "validate": lambda: [
            p.reason
            for p in validation.problems(formats.CorpusSource("corpus", corpus, "all"), True)
        ],
        "run": lambda: preparation.run(corpus, out, shard_bytes=10**6)["rejects"],
    }.items():
        try:
            found[name] = sorted(set(job()))
        except VlmError as error:
            found[name] = [f"exit {error.exit_code}"]
    return found


def measure(name: str, folder: pathlib.Path) -> dict:
    """Status, seconds of CPU, bytes of memory, and what was said of a corpus, in a fork."""
    format, data = CORPORA[name]
    path = folder / ("corpus.tar" if format in TARS else "corpus.json")
    path.write_bytes(data)
    out, into = os.pipe()
    started = time.perf_counter()
    pid = os.fork()
    if not pid:
        status = 8
        try:
            before = _resident()
            report = spend(format, path, folder / "out")
            os.write(into, json.dumps([before, report]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    _, status, used = os.wait4(pid, 0)
    with open(out) as file:
        before, said = json.loads(file.read() or "[0, {}]")
    return {
        "status": status,
        "cpu": used.ru_utime + used.ru_stime,
        "wall": time.perf_counter() - started,
        "memory": used.ru_maxrss * 1024 - before,
        "said": said,
    }


def _resident() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    from array_record.python import array_record_module  # noqa: F401  # before it is measured

    found = {}
    for number, name in enumerate(CORPORA):
        folder = pathlib.Path(sys.argv[1], str(number))
        folder.mkdir()
        found[name] = measure(name, folder)
    print(json.dumps(found))
