"""Learning rates against their closed forms, at every step."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from vlm_jax.config import Train, scaled_lr
from vlm_jax.errors import ConfigError
from vlm_jax.training import schedules

STEPS, LR, END = 200, 0.5, 0.2


def done(step, start, steps):
    return min(max((step - start) / steps, 0.0), 1.0)


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1 - math.sqrt(x),
}


def closed_form(train, step):
    """In plain floats, written from the papers; big_vision's rsqrt and cool-down among them."""
    if step < train.warmup_steps:
        return train.lr * step / train.warmup_steps
    since = step - train.warmup_steps
    whole = done(step, train.warmup_steps, train.steps - train.warmup_steps)
    rate = {
        "cosine": lambda: train.end_lr + (1 - train.end_lr) * SHAPES["cosine"](whole),
        "linear": lambda: train.end_lr + (1 - train.end_lr) * SHAPES["linear"](whole),
        "constant": lambda: 1.0,
        "wsd": lambda: 1.0,
        "rsqrt": lambda: 1 / math.sqrt(1 + since / train.timescale),
    }[train.schedule]()
    if train.decay_steps:
        left = SHAPES[train.decay_shape](
            done(step, train.steps - train.decay_steps, train.decay_steps)
        )
        rate *= train.end_lr + (1 - train.end_lr) * left
    return train.lr * rate


CASES = [
    {"schedule": "cosine"},
    {"schedule": "linear"},
    {"schedule": "constant"},
    {"schedule": "rsqrt", "timescale": 30},
    {"schedule": "rsqrt", "timescale": 30, "decay_steps": 50},
    *({"schedule": "wsd", "decay_steps": 60, "decay_shape": shape} for shape in SHAPES),
]


@pytest.mark.parametrize("warmup", [0, 15])
@pytest.mark.parametrize("end", [0.0, END])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_schedule_is_its_closed_form_at_every_step(case, warmup, end):
    train = Train(steps=STEPS, lr=LR, warmup_steps=warmup, end_lr=end, **case)
    rate = jax.jit(schedules.make(train))
    got = [float(rate(step)) for step in range(STEPS + 5)]
    wanted = [closed_form(train, min(step, STEPS)) for step in range(STEPS + 5)]
    if case["schedule"] == "rsqrt":  # it goes on falling
        got, wanted = got[: STEPS + 1], wanted[: STEPS + 1]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6 * LR)
    assert got[warmup] == LR and (warmup == 0 or got[0] == 0.0)


WRONG = [
    ({"warmup_steps": 200}, r"warmup_steps is 200.*fewer than the 200 of config\.train\.steps"),
    ({"schedule": "wsd"}, r"decay_steps is 0; expected 1 to 190 with the schedule 'wsd'"),
    ({"schedule": "wsd", "decay_steps": 191}, r"decay_steps is 191; expected 1 to 190"),
    ({"decay_steps": 5}, r"decay_steps is 5; expected 0 to 0 with the schedule 'cosine'"),
    ({"schedule": "rsqrt", "timescale": 0}, r"timescale is 0; expected more than 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_does_not_fit_the_run_is_refused(fields, message):
    train = dataclasses.replace(Train(steps=STEPS, warmup_steps=10), **fields)
    with pytest.raises(ConfigError, match=message):
        schedules.make(train)


def test_learning_rates_go_from_one_batch_size_to_another():
    assert scaled_lr(1e-3, rows=1024, at=256, rule="linear") == pytest.approx(4e-3)
    assert scaled_lr(1e-3, rows=1024, at=256) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, rows=64, at=256) == pytest.approx(5e-4)
    with pytest.raises(ConfigError, match="rule is 'cube'; expected one of linear, sqrt"):
        scaled_lr(1e-3, 1, 1, "cube")
