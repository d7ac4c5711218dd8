"""WebDataset shards: which samples they hold, and what is refused or never read."""

import io
import json
import os
import tarfile

import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import decoding, formats, images, validation
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.errors import DataError, StorageError


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/vlm_jax_trap",)


def png(colour: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path, members, links=()):
    """A tar of (name, bytes), and of links."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def opened(path):
    return formats.CorpusSource("web", configs.Corpus("webdataset", {"train": str(path)}), "train")


def test_members_of_one_name_are_a_sample_in_the_order_of_shards(tmp_path):
    shard(
        tmp_path / "cc-00001.tar",
        [
            ("2.JPEG", png(2)),
            ("2.txt", "z\u00e9bra".encode()),
            ("3.json", b'{"caption": "x"}'),
            ("3.png", png(3)),
        ],
    )
    shard(
        tmp_path / "cc-00000.tar",
        [
            ("a/0.txt", b"zero"),
            ("b/0.txt", b"other"),
            ("a/0.json", json.dumps({"caption": "not this"}).encode()),
            ("a/0.png", png(0)),
            ("b/0.png", png(1)),
            ("readme", b"none"),
            ("only.cls", b"7"),
        ],
    )
    source = opened(tmp_path / "cc-*.tar")
    made = [source.example(i, np.random.default_rng(0)) for i in range(len(source))]
    assert [example.turns[1].parts for example in made] == [
        ("zero",),
        ("other",),
        ("z\u00e9bra",),
        ("x",),
    ]
    assert all(example.turns[0] == Turn("user", (ImageRef(0),)) for example in made)
    assert [images.decode(example.images[0])[0, 0, 0] for example in made] == [0, 1, 2, 3]
    assert [example.key for example in made] == [f"web/train/{i}" for i in range(4)]
    assert source.records.where(3) == f"{tmp_path}/cc-00001.tar, sample 1"


BAD = {
    "no_image": [("0.txt", b"x")],
    "no_caption": [("0.png", png(0))],
    "no_caption json": [("0.png", png(0)), ("0.json", b'{"text": 1}')],
    "not_json": [("0.png", png(0)), ("0.json", b"{")],
    "not_utf8": [("0.png", png(0)), ("0.txt", b"\xff")],
    "empty_answer": [("0.png", png(0)), ("0.txt", b" \n")],
    "not_an_image": [("0.png", b"<html>"), ("0.txt", b"x")],
    "empty": [("0.png", b""), ("0.txt", b"x")],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_sample_is_named(tmp_path, name):
    good = [("9.png", png(9)), ("9.txt", b"nine")]
    path = shard(tmp_path / "a.tar", good + BAD[name])
    (problem,) = validation.problems(opened(path))
    assert (problem.where, problem.reason) == (f"{path}, sample 1", name.split()[0])


def test_links_pickles_and_paths_that_lead_out_are_never_read(tmp_path):
    import pickle

    members = [
        ("0.png", png(0)),
        ("0.pkl", pickle.dumps(Trap())),
        ("0.txt", b"a"),
        ("../../1.txt", b"b"),
    ]
    path = shard(
        tmp_path / "a.tar", members, [("2.png", "/etc/hostname"), ("0.jpg", "/etc/hostname")]
    )
    source = opened(path)
    assert len(source) == 2  # ../../1 has a text alone
    assert source.example(0, np.random.default_rng(0)).images == (png(0),)
    with pytest.raises(BadExample, match="no_image"):
        source.example(1, np.random.default_rng(0))
    assert not os.path.exists("/tmp/vlm_jax_trap") and sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_a_shard_that_is_no_whole_tar_is_refused_by_name(tmp_path):
    path = shard(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"x" * 5000)])
    whole = path.read_bytes()
    for name, data in {
        "cut": whole[:3000],
        "garbled": whole[:512] + b"\1" * 512 + b"\2" * 3000,
        "none": b"<html>",
        "nothing": b"",
        "two": whole + whole,
    }.items():
        bad = tmp_path / f"{name}.tar"
        bad.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.tar (is no whole tar|holds no sample)"):
            opened(bad)
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "x-*.tar")


def test_members_too_large_are_counted_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)
    source = opened(shard(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"x")]))
    with pytest.raises(BadExample, match="record_too_large"):
        source.example(0, np.random.default_rng(0))


def test_sparse_members_are_not_read(tmp_path):
    # In the old GNU form the bytes of the parts follow the header, without the holes.
    info = tarfile.TarInfo("0.png")
    info.type = tarfile.GNUTYPE_SPARSE
    path = shard(tmp_path / "a.tar", [("0.txt", b"x"), ("1.txt", b"y")])
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with pytest.raises(BadExample, match="no_image"):
        opened(path).example(0, np.random.default_rng(0))


def test_no_shard_is_held_open_and_one_that_is_gone_is_named(tmp_path):
    for i in range(3):
        shard(tmp_path / f"{i}.tar", [("0.png", png(i)), ("0.txt", b"x")])
    before = len(os.listdir("/proc/self/fd"))
    source = opened(tmp_path / "*.tar")
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "1.tar").unlink()
    with pytest.raises(StorageError, match=r"1\.tar, sample 0 cannot be read: No such file"):
        source.example(1, np.random.default_rng(0))
    (tmp_path / "1.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1\.tar is no whole tar"):
        opened(tmp_path / "*.tar")


@pytest.mark.parametrize("size", [-512, -1536])
def test_members_of_less_than_nothing_are_refused(tmp_path, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("first"))
        info = tarfile.TarInfo("0.png")
        info.pax_headers = {"size": str(size)}  # the second leads back to this header
        tar.addfile(info)
    with pytest.raises(DataError, match=f"0.png has {size} bytes"):
        opened(path)
