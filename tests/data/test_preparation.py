"""Prepared corpora: what goes in comes out or is counted, the same however often it is killed."""

import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import msgpack
import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import filters, formats, plans, preparation, shards, validation
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.errors import ConfigError, DataError

COUNT = 40


@pytest.fixture
def corpus(tmp_path):
    """Conversations of 0 to 2 pictures of noise, some of them bad, and their config."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(7):
        PIL.Image.effect_noise((60 + i, 40), 50 + i).save(folder / f"{i}.png")
    PIL.Image.new("RGB", (3, 40)).save(folder / "small.png")
    PIL.Image.new("RGB", (600, 4)).save(folder / "narrow.png")
    (folder / "cut.png").write_bytes((folder / "3.png").read_bytes()[:900])
    lines = []
    for i in range(COUNT):
        names = [f"{(i + n) % 7}.png" for n in range(i % 3)]
        names = {7: ["small.png"], 13: ["narrow.png"], 22: ["cut.png"], 31: ["none.png"]}.get(
            i, names
        )
        says = ["<image>" * len(names) + f"What is {i}?", f"It is {i} \u20ac."]
        turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), says)]
        lines.append(json.dumps({"id": i, "images": names, "messages": turns}))
    lines[5] = "{"
    (folder / "all.jsonl").write_text("\n".join(lines))
    return configs.Corpus("messages", {"all": str(folder / "all.jsonl")})


REJECTS = {"missing": 1, "not_json": 1, "too_narrow": 1, "too_small": 1, "truncated": 1}
LIMITS = {"shard_bytes": 20_000, "limits": filters.Limits(min_side=4, max_aspect=100.0)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_comes_in_goes_out_or_is_counted(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = preparation.run(corpus, out, **LIMITS)
    assert manifest["rejects"] == REJECTS and manifest["records"] == COUNT - 5
    assert len(manifest["shards"]) > 3
    assert sum(shard["records"] for shard in manifest["shards"]) == COUNT - 5
    lacking = list(preparation.rejected(out))
    assert [reject["reason"] for reject in lacking] == [
        "not_json", "too_small", "too_narrow", "truncated", "missing",
    ]  # fmt: skip
    assert lacking[0]["where"].endswith("all.jsonl:6")
    before = formats.CorpusSource("a", corpus, "all")
    after = formats.CorpusSource("a", configs.Corpus("shards", {"all": str(out)}), "all")
    assert len(after) == COUNT - 5 and not list(validation.problems(after, decode=True))
    kept = [i for i in range(COUNT) if i not in (5, 7, 13, 22, 31)]
    for number, index in enumerate(kept):
        old, new = (
            s.example(i, np.random.default_rng(0)) for s, i in ((before, index), (after, number))
        )
        assert (new.turns, new.meta) == (old.turns, old.meta)
        assert list(new.images) == [path.read_bytes() for path in old.images]
    sizes = [shard["records"] for shard in manifest["shards"]]
    assert f"{manifest['shards'][1]['name']}, record 2" in after.records.where(sizes[0] + 2)


def test_processes_and_interrupted_runs_give_the_same_bytes(corpus, tmp_path, monkeypatch):
    preparation.run(corpus, tmp_path / "one", **LIMITS)
    expected = contents(tmp_path / "one")
    preparation.run(corpus, tmp_path / "two", workers=2, **LIMITS)
    assert contents(tmp_path / "two") == expected
    # Some shards are there, one of them cut; another was being written.
    whole = tmp_path / "two"
    names = sorted(path.name for path in whole.glob("*.arrayrecord"))
    (whole / names[1]).write_bytes(b"half")
    (whole / names[2]).with_suffix(".json").unlink()
    (whole / "shard-x.tmp").write_bytes(b"begun")
    (whole / shards.MANIFEST).unlink()
    made = []
    make = preparation.make_shard
    monkeypatch.setattr(preparation, "make_shard", lambda p, o, n: (made.append(n), make(p, o, n)))
    preparation.run(corpus, whole, **LIMITS)
    assert made == [1, 2] and contents(whole) == expected


def test_two_plans_do_not_mix(corpus, tmp_path):
    preparation.run(corpus, tmp_path / "out", **LIMITS)
    with pytest.raises(ConfigError, match="was begun with min_side 4, not 5"):
        preparation.run(corpus, tmp_path / "out", **LIMITS | {"limits": filters.Limits(5, 100.0)})
    (tmp_path / "out" / plans.PLAN).unlink()
    with pytest.raises(ConfigError, match="shards without a plan"):
        preparation.run(corpus, tmp_path / "out", **LIMITS)


def test_shards_that_are_not_what_the_manifest_says_are_refused(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = preparation.run(corpus, out, **LIMITS)
    first = out / manifest["shards"][0]["name"]
    whole = first.read_bytes()
    opened = lambda: formats.CorpusSource("a", configs.Corpus("shards", {"all": str(out)}), "all")  # noqa: E731
    first.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard-00000.* has \d+ bytes; manifest\.json says"):
        opened()
    first.unlink()
    with pytest.raises(DataError, match=r"shard-00000.* is missing"):
        opened()
    first.write_bytes(whole)
    (out / shards.MANIFEST).write_text('{"version": 9}')
    with pytest.raises(DataError, match="not of version 1"):
        opened()
    (out / shards.MANIFEST).unlink()
    with pytest.raises(DataError, match="has no manifest"):
        opened()


def test_every_byte_of_the_shards_is_checked_on_demand(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = preparation.run(corpus, out, **LIMITS)
    assert list(shards.problems(out)) == []
    first, second, third = (out / shard["name"] for shard in manifest["shards"][:3])
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.unlink()
    manifest["shards"][2]["records"] += 1
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    flipped, missing, miscounted, total = shards.problems(out)
    assert first.name in flipped and "SHA-256" in flipped
    assert second.name in missing and "is missing" in missing
    assert third.name in miscounted and "records" in miscounted
    assert total.endswith(f"those of its shards are {COUNT - 4}")


def prepare(*words):
    command = [sys.executable, "-m", "vlm_jax.prepare", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_wrong_with_shards_or_with_the_command_is_an_exit_code(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = preparation.run(corpus, out, **LIMITS)
    name = manifest["shards"][1]["name"]
    (out / name).write_bytes(b"half")
    done = prepare("check", out)
    assert done.returncode == 65 and f"{name} has 4 bytes" in done.stdout
    assert "1 problems; prepare it again" in done.stderr
    run = "run", corpus.paths["all"], f"--out={tmp_path / 'other'}"
    done = prepare(*run, "--max_aspect=nan")
    assert done.returncode == 78 and "max_aspect is nan" in done.stderr
    done = prepare(*run, "--against=all.jsonl")
    assert done.returncode == 78 and "expected FORMAT:PATH[:IMAGES]" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": [5]},
        {"shards": [{}]},
        {"records": None},
        {"shards": [], "records": 0},
        {"name": "../out/x"},
        {"name": 5},
        {"records of it": -1},
    ],
    ids=str,
)
def test_manifests_that_lie_are_refused(corpus, tmp_path, change):
    out = tmp_path / "out"
    manifest = preparation.run(corpus, out, **LIMITS)
    changes = {"name": change.pop("name", None), "records": change.pop("records of it", None)}
    manifest["shards"][0] |= {k: v for k, v in changes.items() if v is not None}
    (out / shards.MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=r"manifest\.json says|no record"):
        shards.ShardRecords(out)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_plan_that_is_none_is_refused(corpus, tmp_path, text):
    (tmp_path / plans.PLAN).write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json is no plan"):
        preparation.run(corpus, tmp_path, **LIMITS)


def test_two_runs_do_not_write_to_one_folder(corpus, tmp_path):
    with preparation._alone(tmp_path), pytest.raises(ConfigError, match="another run writes to"):
        preparation.run(corpus, tmp_path, **LIMITS)


def test_a_corpus_that_changes_meanwhile_is_refused(corpus, tmp_path, monkeypatch):
    keep = plans.keep_to

    def and_change(plan, out):
        keep(plan, out)
        with open(corpus.paths["all"], "a") as file:
            file.write("\n{}")

    monkeypatch.setattr(plans, "keep_to", and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        preparation.run(corpus, tmp_path / "out", **LIMITS)


LIMITED = """
import resource, sys
from vlm_jax import config, errors
from vlm_jax.data import preparation
from pathlib import Path
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    try:
        corpus = config.Corpus("messages", {"all": sys.argv[1]})
        preparation.run(corpus, Path(sys.argv[2]), shard_bytes=20_000)
    except errors.StorageError as error:
        print(error)
"""


def test_a_full_disk_is_named(corpus, tmp_path):
    command = [sys.executable, "-c", LIMITED, corpus.paths["all"], str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "write() failed" in done.stdout, done.stderr


def test_workers_end_with_a_run_that_is_killed(corpus, tmp_path):
    folder = os.path.dirname(corpus.paths["all"])
    for i in range(7):
        PIL.Image.effect_noise((900 + i, 700), 90).save(f"{folder}/{i}.png")
    command = [sys.executable, "-m", "vlm_jax.prepare", "run", corpus.paths["all"]]
    command += [f"--out={tmp_path / 'out'}", "--shard_mb=1", "--workers=1"]
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    job.wait()
    try:
        while time.monotonic() < deadline:
            os.killpg(job.pid, 0)
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail("workers outlive the run")
    except ProcessLookupError:
        pass


def test_a_corpus_of_nothing_good_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n[")
    bad = configs.Corpus("messages", {"all": str(tmp_path / "bad.jsonl")})
    with pytest.raises(DataError, match="validate it"):
        preparation.run(bad, tmp_path / "out", **LIMITS)
    assert not (tmp_path / "out").exists()


def test_records_of_other_kinds_are_bad():
    record = {"id": "", "images": [b"x"], "turns": [["user", [0, "hi"]]]}
    assert shards.unpack(msgpack.packb(record))[2] == (Turn("user", (ImageRef(0), "hi")),)
    changes = {"id": 3}, {"images": ["/etc/passwd"]}, {"turns": []}, {"turns": [["user", [b"x"]]]}
    bad = [msgpack.packb(record | change) for change in changes]
    for data in (*bad, b"", b"\xc1", b"\x01", b"\x81\xa2id\x01"):
        with pytest.raises(BadExample, match="not_a_record"):
            shards.unpack(data)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bytes(corpus, tmp_path):
    path = corpus.paths["all"]

    def start(out):
        command = [sys.executable, "-m", "vlm_jax.prepare", "run", path, f"--out={out}"]
        command += ["--shard_mb=1", "--workers=2", "--min_side=4", "--max_aspect=100"]
        command += ["--deduplicate", f"--against=messages:{evaluated}"]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)

    # Large enough pictures for several shards of a megabyte.
    folder = os.path.dirname(path)
    for i in range(7):
        PIL.Image.effect_noise((900 + i, 700), 90).save(f"{folder}/{i}.png")
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "It."}]
    evaluated = tmp_path / "in/evaluated.jsonl"
    evaluated.write_text(json.dumps({"images": ["6.png"], "messages": turns}))
    assert start(tmp_path / "whole").wait() == 0
    whole, out = tmp_path / "whole", tmp_path / "out"
    rng, during = random.Random(0), collections.Counter()
    while during.total() < 20:
        job = start(out)
        # Each kill after some more files, or in the middle of one; or before there is any.
        more = len(list(out.glob("*"))) + rng.randint(0, 9)
        while job.poll() is None and len(list(out.glob("*"))) < more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if job.poll() is not None:  # it came to its end: once more from nothing
            for left in out.iterdir():
                left.unlink()
            continue
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        during["shards" if (out / "dropped.json").exists() else "screening"] += 1
    assert min(during["shards"], during["screening"]) >= 4
    assert start(out).wait() == 0
    assert contents(out) == contents(whole)
    manifest = json.loads((out / shards.MANIFEST).read_text())
    assert manifest["records"] + sum(manifest["rejects"].values()) == COUNT
    assert manifest["rejects"].keys() == {*REJECTS, "near_duplicate", "evaluation_image"}
    assert len(manifest["shards"]) > 3


def test_a_plan_names_its_shards():
    known = plans.Known("messages", "x", "", "f", records=21)
    plan = plans.Plan(known, per_shard=10)
    assert plan.shards == 3 and plan.name(2) == "shard-00002-of-00003.arrayrecord"
    assert plan.span(2) == range(20, 21)
    assert plans.Plan(dataclasses.replace(known, records=20), per_shard=10).shards == 2
