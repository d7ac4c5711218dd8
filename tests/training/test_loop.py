"""Whole runs of the loop on a tiny model: logging, evaluation, interruption, continuation."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.config import Checkpoint, Eval, Parallel, Tracking
from vlm_jax.data import pipeline
from vlm_jax.errors import ConfigError, Interrupted
from vlm_jax.training import checkpoints, loop
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

CONFIG = tiny.config(
    ema=0.9,  # as in test_step.py, so that one compiled step serves both
    bag_of_words=0.5,
    log_every=5,
    checkpoint=Checkpoint(every=5),
    eval=Eval(every=12),
    tracking=Tracking(tensorboard=False),
    parallel=Parallel(data=1, fsdp=len(jax.devices())),
)


def run(workdir, monkeypatch, stop_at=-1, config=CONFIG, evaluator=None):
    """A run; the stream fails before batch `stop_at`, as if the process had died."""
    monkeypatch.setattr(pipeline, "train_stream", lambda config: tiny.Stream(stop_at))
    made = tiny.prepared(config, len(jax.devices()))
    monkeypatch.setattr(steps, "make_step", lambda *_: made.step)
    monkeypatch.setattr(states, "create", lambda *_: made.create())
    return loop.train(config, workdir, evaluator or (lambda step, flat: {"eval/x": 2.0 * step}))


def lines(workdir):
    """All lines without their wall-clock part."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, run(workdir, monkeypatch)


def equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


def test_every_step_is_logged_once_and_evaluations_stand_after_theirs(unbroken):
    found = lines(unbroken[0])
    assert [(line["step"], "loss" in line) for line in found] == [
        *((step, True) for step in range(1, 13)),
        (12, False),
        *((step, True) for step in range(13, 21)),
        (20, False),
    ]
    assert [line["eval/x"] for line in found if "eval/x" in line] == [24.0, 40.0]
    first, last = found[0], found[-2]
    assert last["objective"] < first["objective"]
    assert first["learning_rate"] == 0.0 < last["learning_rate"]
    assert [line["step"] for line in found if "rejects" in line] == [2]
    assert found[1]["rejects"] == {"emoji/truncated": 2}


def test_speeds_are_logged_with_the_shown_steps(unbroken):
    text = (unbroken[0] / "metrics.jsonl").read_text().splitlines()
    timed = [json.loads(line)["step"] for line in text if "time" in json.loads(line)]
    assert timed == [5, 10, 15, 20]


@pytest.mark.parametrize("stop_at", [2, 11, 18])
def test_a_killed_run_continues_bit_for_bit(unbroken, tmp_path, monkeypatch, stop_at):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, monkeypatch, stop_at)
    state = run(tmp_path, monkeypatch)
    assert equal(state, unbroken[1])
    assert lines(tmp_path) == lines(unbroken[0])


def test_a_finished_run_is_left_as_it_is(unbroken, monkeypatch):
    workdir, state = unbroken
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(workdir, monkeypatch, evaluator=lambda *_: pytest.fail("evaluated again"))
    assert equal(again, state) and (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_can_be_continued(unbroken, tmp_path, monkeypatch, number):
    handler = signal.getsignal(number)

    def evaluator(step, flat):
        os.kill(os.getpid(), number)
        return {"eval/x": 2.0 * step}

    with pytest.raises(Interrupted, match="stopped after step 13") as stopped:
        run(tmp_path, monkeypatch, evaluator=evaluator)
    assert stopped.value.exit_code == 75 and signal.getsignal(number) is handler
    assert (tmp_path / "checkpoints" / "13").is_dir()
    state = run(tmp_path, monkeypatch)
    assert equal(state, unbroken[1]) and lines(tmp_path) == lines(unbroken[0])


def test_the_evaluator_sees_the_averages_of_all_parameters(tmp_path, monkeypatch):
    seen = {}

    def evaluator(step, flat):
        seen[step] = {path: np.array(leaf) for path, leaf in flat.items()}
        return {}

    state = run(tmp_path, monkeypatch, evaluator=evaluator)
    assert equal(seen[20], state.ema) and not equal(seen[20], state.trainable)
    assert equal(checkpoints.load_params(tmp_path)[1], state.ema)


def test_another_config_is_refused_and_the_folder_untouched(unbroken, monkeypatch):
    workdir, _ = unbroken
    before = (workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.seed was 0 and is 3"):
        run(workdir, monkeypatch, config=dataclasses.replace(CONFIG, seed=3))
    after = (workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    assert before == after
