"""The guard: bad steps leave no trace, and five in a row roll the run back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.config import Checkpoint, Eval, Guard, Parallel, Tracking, check
from vlm_jax.data import pipeline
from vlm_jax.errors import ConfigError
from vlm_jax.training import guard, loop, objectives
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

SPIKES = Guard(sigmas=6.0, window=16)


def judged(config, values):
    """Verdicts over a run of (loss, norm), by the compiled guard; and its memory at the end."""

    @jax.jit
    def one(memory, value):
        verdict = guard.judge(config, memory, *value)
        return guard.remember(memory, verdict, *value), verdict

    memory, found = guard.fresh(config), []
    for loss, norm in values:
        memory, verdict = one(memory, (jnp.float32(loss), jnp.float32(norm)))
        found.append(int(verdict))
    return found, memory


def judged_plainly(config, values):
    """The same in numpy and plain lists."""
    kept, found = [], []
    for value in values:
        spike = False
        if 2 * len(kept) >= config.window:
            for last, x in zip(np.float64(kept).T, value, strict=True):
                spread = max(last.std(), config.floor * abs(last.mean()))
                spike |= x > last.mean() + config.sigmas * spread
        finite = np.isfinite(value).all()
        found.append(1 if not finite else 2 if spike else 0)
        if found[-1] == 0:
            kept = [*kept, value][-config.window :]
    return found, kept


def test_verdicts_and_window_are_those_of_a_plain_guard():
    rng = np.random.default_rng(0)
    values = rng.normal([3.0, 1.0], [0.05, 0.3], (300, 2))
    for step, column, value in (
        (2, 0, np.nan),
        (90, 0, 300.0),
        (91, 1, np.inf),
        (140, 1, 2.5),
        (141, 1, 9.0),
        (150, 0, np.nan),
        (200, 0, -np.inf),
    ):
        values[step, column] = value
    found, memory = judged(SPIKES, values)
    wanted, kept = judged_plainly(SPIKES, values)
    assert found == wanted and {1, 2} < set(found) | {3}
    assert found.count(1) == 4 and found[90] == found[141] == 2
    assert int(memory.good) == found.count(0) and int(memory.skipped) == 300 - found.count(0)
    assert int(memory.drawn) == 300 and int(memory.in_row) == 0
    window = np.stack([memory.losses, memory.norms], -1)
    np.testing.assert_allclose(sorted(window.tolist()), sorted(map(list, kept)), rtol=1e-6)


def test_one_value_that_is_no_number_costs_one_step_of_400():
    values = np.random.default_rng(1).normal(3.0, 0.05, (400, 2))
    values[150] = np.nan
    found, memory = judged(Guard(sigmas=6.0), values)
    assert found == [int(step == 150) for step in range(400)]
    assert np.isfinite(memory.losses).all() and np.isfinite(memory.norms).all()


def test_without_the_guard_nothing_is_skipped_and_no_bad_value_is_remembered():
    found, memory = judged(Guard(nonfinite=False), [(1.0, 1.0), (np.nan, 1.0), (2.0, np.inf)])
    assert found == [0, 0, 0] and int(memory.good) == 1 and int(memory.skipped) == 0
    assert np.isfinite(memory.losses).all()


def equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


def after(config, batches, step=None):
    """The state after a step on each batch."""
    mesh, _, compiled, create = tiny.prepared(config)
    state = create()
    for batch in batches:
        state, _ = (step or compiled)(state, steps.place(batch, mesh))
    return state


FIELDS = {"ema": 0.9, "clip": 0.5}


@pytest.mark.parametrize("name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_a_healthy_run_is_bit_for_bit_that_without_a_guard(name):
    batches = [tiny.batch(number) for number in range(6)]
    runs = [
        after(tiny.config(guard=Guard(nonfinite=on), optimizer=name, **FIELDS), batches)
        for on in (True, False)
    ]
    assert equal(*runs)


def test_a_batch_of_nan_leaves_no_trace():
    batches = [tiny.batch(number) for number in range(5)]
    config = tiny.config(**FIELDS)
    clean = after(config, batches)
    bad = after(config, [*batches[:2], tiny.poisoned(tiny.batch(9)), *batches[2:]])
    assert (int(bad.guard.skipped), int(bad.guard.drawn), bad.done) == (1, 6, 6)
    undo = {"skipped": clean.guard.skipped, "drawn": clean.guard.drawn}
    assert equal(dataclasses.replace(bad, guard=bad.guard._replace(**undo)), clean)


@pytest.mark.parametrize(
    ("sigmas", "skipped"), [(6.0, 1), pytest.param(0.0, 0, marks=pytest.mark.slow)]
)
def test_a_loss_a_hundred_times_as_large_is_skipped_if_asked(monkeypatch, sigmas, skipped):
    plainly = objectives.losses

    def losses(vlm, batch, *rest):
        loss, sums = plainly(vlm, batch, *rest)
        return loss * jnp.where(batch.tokens[0, -1] == 0, 100.0, 1.0), sums

    monkeypatch.setattr(objectives, "losses", losses)
    config = tiny.config(guard=Guard(sigmas=sigmas, window=8), **FIELDS)
    mesh, plan, *_ = tiny.prepared(config)
    step = steps.make_step(config, plan, mesh)
    batches = [tiny.batch(number) for number in range(10)]
    spike = tiny.batch(7)
    spike.tokens[0, -1] = 0  # a position of padding, which no document sees
    bad, clean = after(config, [*batches, spike], step), after(config, batches, step)
    assert int(bad.guard.skipped) == skipped
    assert equal((bad.trainable, bad.opt, bad.ema), (clean.trainable, clean.opt, clean.ema)) == (
        skipped == 1
    )


CONFIG = tiny.config(
    ema=0.9,
    checkpoint=Checkpoint(every=5),
    eval=Eval(every=0),
    tracking=Tracking(tensorboard=False),
    parallel=Parallel(data=1),
)
ROW = (13, 14, 15, 16, 17)


def run(workdir, monkeypatch, config=CONFIG, **stream):
    """A run over a tiny stream; see `tiny.Stream`."""
    monkeypatch.setattr(pipeline, "train_stream", lambda config: tiny.Stream(**stream))
    made = tiny.prepared(config)
    monkeypatch.setattr(loop, "prepare", lambda *_: (made.mesh, made.plan))
    monkeypatch.setattr(steps, "make_step", lambda *_: made.step)
    monkeypatch.setattr(states, "create", lambda *_: made.create())
    return loop.train(config, workdir, lambda step, flat: {"eval/x": float(step)})


def lines(workdir, name):
    found = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found]


def learned(state):
    return state.step, state.trainable, state.opt, state.ema, state.guard.losses, state.guard.good


def test_a_bad_batch_costs_one_step_of_a_run(tmp_path, monkeypatch):
    bad = run(tmp_path / "bad", monkeypatch, bad=(7,))
    clean = run(tmp_path / "clean", monkeypatch, without=(7,))
    assert equal(learned(bad), learned(clean)) and int(bad.step) == 20
    found = lines(tmp_path / "bad", "metrics.jsonl")
    assert [line["step"] for line in found if "learning_rate" in line] == list(range(1, 22))
    (line,) = [line for line in found if "skipped" in line]
    assert (line["step"], line["skipped"]) == (7, "non-finite") and "loss" not in line
    assert lines(tmp_path / "bad", "skipped.jsonl") == [
        {
            "batch": 7,
            "step": 7,
            "skipped": "non-finite",
            "documents": [["emoji/train/7", "emoji"]],
        }
    ]
    assert lines(tmp_path / "clean", "skipped.jsonl") == []


def test_a_bad_last_batch_is_made_up_for(tmp_path, monkeypatch):
    bad = run(tmp_path, monkeypatch, bad=(20, 21))
    assert int(bad.step) == 20 and bad.done == 22
    assert lines(tmp_path, "metrics.jsonl")[-1]["step"] == 22


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rolled_back")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, run(workdir, monkeypatch, bad=ROW)


def test_five_in_a_row_roll_back_skip_the_window_and_go_on(rolled_back, tmp_path, monkeypatch):
    workdir, state = rolled_back
    # Back to step 10; the batches up to that after the row are not read again.
    straight = run(tmp_path, monkeypatch, without=tuple(range(11, 19)))
    assert equal(learned(state), learned(straight))
    assert (int(state.step), int(state.guard.skipped), int(state.guard.drawn)) == (20, 0, 28)
    assert lines(workdir, "metrics.jsonl") == lines(tmp_path, "metrics.jsonl")
    listed = lines(workdir, "skipped.jsonl")
    assert [line["batch"] for line in listed] == [*ROW, 18]
    assert listed[-1] == {"batch": 18, "step": 17, "rolled_back_to": 10}


@pytest.mark.parametrize("stop_at", [12, 15, 17, 19, 26])
def test_a_killed_run_rolls_back_to_the_same_state(rolled_back, tmp_path, monkeypatch, stop_at):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, monkeypatch, bad=ROW, stop_at=stop_at)
    state = run(tmp_path, monkeypatch, bad=ROW)
    assert equal(state, rolled_back[1])
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert lines(tmp_path, name) == lines(rolled_back[0], name)


@pytest.mark.parametrize("every", [15, 17])
def test_when_the_host_learns_of_the_row_does_not_matter(rolled_back, tmp_path, monkeypatch, every):
    config = dataclasses.replace(CONFIG, eval=Eval(every=every))
    assert equal(run(tmp_path, monkeypatch, config, bad=ROW), rolled_back[1])


def test_without_a_checkpoint_it_starts_anew_with_later_data(tmp_path, monkeypatch):
    state = run(tmp_path / "bad", monkeypatch, bad=(1, 2, 3, 4, 5))
    straight = run(tmp_path / "straight", monkeypatch, without=(1, 2, 3, 4, 5, 6))
    assert equal(learned(state), learned(straight)) and int(state.guard.drawn) == 26


def test_a_run_that_cannot_go_on_ends(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="after step 10 it came 4 times to 5 skipped steps"):
        run(tmp_path, monkeypatch, bad=tuple(range(12, 99)))
    rolled = [line for line in lines(tmp_path, "skipped.jsonl") if "rolled_back_to" in line]
    assert len(rolled) == 3


@pytest.mark.parametrize("fields", [{"patience": 0}, {"window": 1}, {"sigmas": -1.0}])
def test_settings_that_mean_nothing_are_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"config\.guard\.{name} is"):
        check(tiny.config(guard=Guard(**fields)))
