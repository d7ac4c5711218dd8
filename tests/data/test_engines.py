"""Engines: the same bytes whoever does the work, and the same errors."""

import importlib.util
import json
import subprocess
import sys

import pytest
from PIL import Image

from vlm_jax import config as configs
from vlm_jax.data import engines, preparation
from vlm_jax.errors import ConfigError, DataError, StorageError

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed here"
)


@pytest.fixture
def asked(tmp_path):
    """A corpus of 30 records with 10 pictures and one that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        Image.effect_noise((60 + i, 40), 50 + i).save(folder / f"{i}.png")
    (folder / "7.png").write_bytes(b"none")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Noise."}]
    lines = [json.dumps({"images": [f"{i % 10}.png"], "messages": turns}) for i in range(30)]
    (folder / "all.jsonl").write_text("\n".join(lines))
    corpus = configs.Corpus("messages", {"all": str(folder / "all.jsonl")})
    return {"corpus": corpus, "deduplicate": True, "shard_bytes": 10_000}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_unknown_engine_and_options_of_another_are_refused(asked, tmp_path):
    with pytest.raises(ConfigError, match="unknown engine bean; did you mean beam"):
        preparation.run(out=tmp_path / "out", engine="bean", **asked)
    with pytest.raises(ConfigError, match="use beam"):
        preparation.run(out=tmp_path / "out", beam_options="--runner=X", **asked)


def test_without_beam_the_extra_is_named(asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"vlm_jax\[prepare\]"):
        preparation.run(out=tmp_path / "out", engine="beam", **asked)


def test_what_a_runner_says_is_the_error_that_was_raised():
    trace = (
        "Traceback ...\n  File x\nvlm_jax.errors.DataError: a.jsonl changed [while running 'Map']\n"
    )
    found = engines._meant(trace)
    assert type(found) is DataError and str(found) == "a.jsonl changed"
    assert type(engines._meant("ValueError: no\n\n")) is StorageError
    assert type(engines._meant("")) is StorageError


@needs_beam
@pytest.mark.slow
def test_beam_gives_the_bytes_of_the_local_engine(asked, tmp_path):
    manifest = preparation.run(out=tmp_path / "local", **asked)
    assert len(manifest["shards"]) > 3 and manifest["rejects"]["near_duplicate"] == 18
    preparation.run(
        out=tmp_path / "beam", engine="beam", beam_options="--runner=FnApiRunner", **asked
    )
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


@needs_beam
@pytest.mark.slow
def test_beam_works_in_processes_from_the_command_line(asked, tmp_path):
    preparation.run(out=tmp_path / "local", **asked | {"shard_bytes": 10**6})
    command = [sys.executable, "-m", "vlm_jax.prepare", "run", asked["corpus"].paths["all"]]
    command += [f"--out={tmp_path / 'beam'}", "--deduplicate", "--shard_mb=1", "--workers=2"]
    done = subprocess.run([*command, "--engine=beam"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


@needs_beam
@pytest.mark.slow
def test_what_fails_on_beam_is_what_fails_locally(asked, tmp_path, monkeypatch):
    keep = preparation.plans.keep_to

    def and_change(plan, out):
        keep(plan, out)
        with open(asked["corpus"].paths["all"], "a") as file:
            file.write("\n{}")

    monkeypatch.setattr(preparation.plans, "keep_to", and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        preparation.run(out=tmp_path / "out", engine="beam", **asked)
