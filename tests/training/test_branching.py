"""Branches off a trunk against runs that decay at once."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from vlm_jax import main
from vlm_jax.config import Checkpoint, Eval, Parallel, Tracking
from vlm_jax.data import pipeline
from vlm_jax.errors import ConfigError, StorageError
from vlm_jax.training import branching, loop
from vlm_jax.training import state as states
from vlm_jax.training import step as steps
from vlm_jax.training.branching import Branch

TRUNK = tiny.config(
    ema=0.9,
    schedule="wsd",
    decay_steps=5,
    decay_shape="sqrt",
    checkpoint=Checkpoint(every=6, keep=1, milestones=(7,)),
    eval=Eval(every=0),
    tracking=Tracking(tensorboard=False),
    parallel=Parallel(data=1),
)


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def run(workdir, config, branch=None, **stream):
    """A run over a tiny stream; see `tiny.Stream`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pipeline, "train_stream", lambda config: tiny.Stream(**stream))
        made = tiny.prepared(config)
        monkeypatch.setattr(loop, "prepare", lambda *_: (made.mesh, made.plan))
        monkeypatch.setattr(steps, "make_step", lambda *_: made.step)
        monkeypatch.setattr(states, "create", lambda *_: made.create())
        return loop.train(config, workdir, lambda step, flat: {}, branch=branch)


def equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trunk")
    run(workdir, TRUNK)
    return workdir


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), with_train(TRUNK, steps=12))


def test_milestones_are_kept_beside_the_last_checkpoint(trunk):
    assert {path.name for path in (trunk / "checkpoints").iterdir()} == {"7", "20"}


@pytest.mark.parametrize("stop_at", [-1, 9])
def test_a_branch_is_bit_for_bit_the_run_that_decays_there(trunk, straight, tmp_path, stop_at):
    copy, workdir = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(trunk, copy)
    branch = Branch(copy, 7)
    config = branching.ended(TRUNK, branch)
    assert config.train.steps == 12
    if stop_at > 0:
        with pytest.raises(RuntimeError, match="killed"):
            run(workdir, config, branch, stop_at=stop_at)
        shutil.rmtree(copy)  # once it has started, a branch needs its own folder alone
    assert equal(run(workdir, config, branch), straight)
    logged = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in logged if "loss" in line] == [8, 9, 10, 11, 12]


def test_a_constant_trunk_may_decay_too_and_another_run_is_left_alone(trunk, tmp_path):
    constant = with_train(TRUNK, schedule="constant", decay_steps=0)
    run(tmp_path, with_train(constant, steps=8))
    with pytest.raises(ConfigError, match="holds another run, not a branch of"):
        run(tmp_path, branching.ended(TRUNK, Branch(trunk, 7)), Branch(trunk, 7))
    config = branching.ended(TRUNK, Branch(tmp_path, 8))
    assert int(run(tmp_path / "branch", config, Branch(tmp_path, 8)).step) == 13


def refused(trunk, workdir, config, step):
    branch = Branch(trunk, step)
    run(workdir, branching.ended(config, branch), branch)


@pytest.mark.parametrize(
    ("fields", "step", "error", "message"),
    [
        ({}, 8, StorageError, r"no checkpoint of step 8; it has \[7, 20\]"),
        ({}, 20, ConfigError, r"rate at step 16 was .* not in a stable phase"),
        ({"lr": 1.0}, 7, ConfigError, r"config\.train\.lr was 0\.003 and is 1\.0"),
        ({"warmup_steps": 4}, 7, ConfigError, r"config\.train\.warmup_steps was 3 and is 4"),
        ({"schedule": "rsqrt"}, 7, ConfigError, r"rate at step 4 was 3\.000e-03, the branch's"),
        ({"schedule": "cosine", "decay_steps": 0}, 7, ConfigError, r"decay_steps is 0; expected"),
    ],
)
def test_what_is_no_branch_is_refused_by_name(trunk, tmp_path, fields, step, error, message):
    with pytest.raises(error, match=message):
        refused(trunk, tmp_path, with_train(TRUNK, **fields), step)
    assert not (tmp_path / branching.FILE).exists()


def test_the_flags_come_together(tmp_path):
    assert main.asked_branch(None, None) is None
    assert main.asked_branch(str(tmp_path), 5) == (tmp_path, 5)
    for trunk, step in ((None, 5), ("x", None), ("x", 0)):
        with pytest.raises(ConfigError, match="--branch_from is"):
            main.asked_branch(trunk, step)
