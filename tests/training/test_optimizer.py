"""AdamW against a plain numpy one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.config import Rule, Train
from vlm_jax.errors import ConfigError
from vlm_jax.training import adaptation, optimizer

RULES = (Rule("frozen/.*", mode="frozen"), Rule("a/.*", lr=0.5, weight_decay=0.0), Rule(".*"))


def parameters(rng):
    shapes = {"a/bias": (3,), "b/kernel": (4, 2), "frozen/kernel": (5,)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def numpy_lr(train, step):
    if step < train.warmup_steps:
        return train.lr * step / train.warmup_steps
    done = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    end = train.lr * train.end_lr
    return end + (train.lr - end) * 0.5 * (1 + math.cos(math.pi * done))


def numpy_adamw(train, start, gradients, lr_factor, decay_factor):
    """Float64 AdamW with a clipped gradient, decoupled decay and a factor per parameter."""
    p = {path: x.astype(np.float64) for path, x in start.items()}
    m = {path: np.zeros_like(x) for path, x in p.items()}
    v = {path: np.zeros_like(x) for path, x in p.items()}
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
        scale = min(1.0, train.clip / norm) if train.clip else 1.0
        for path in p:
            g = gradient[path] * scale
            m[path] = train.b1 * m[path] + (1 - train.b1) * g
            v[path] = train.b2 * v[path] + (1 - train.b2) * g**2
            m_hat = m[path] / (1 - train.b1 ** (step + 1))
            v_hat = v[path] / (1 - train.b2 ** (step + 1))
            decay = train.weight_decay * decay_factor[path] * p[path]
            rate = numpy_lr(train, step) * lr_factor[path]
            p[path] = p[path] - rate * (m_hat / (np.sqrt(v_hat) + train.eps) + decay)
    return p


@pytest.mark.parametrize("clip", [0.0, 0.7, 1e6])
def test_five_steps_equal_a_plain_numpy_adamw(clip):
    rng = np.random.default_rng(0)
    train = Train(
        steps=6, lr=0.1, warmup_steps=2, end_lr=0.1, weight_decay=0.3, b1=0.8, b2=0.9, clip=clip
    )
    flat = parameters(rng)
    plan = adaptation.plan(flat, RULES)
    start, _ = plan.split(flat)
    gradients = [plan.split(parameters(rng))[0] for _ in range(5)]
    tx = optimizer.make(train, plan)
    now, opt = jax.tree.map(jnp.asarray, start), tx.init(start)
    for gradient in gradients:
        updates, opt = tx.update(gradient, opt, now)
        now = optax.apply_updates(now, updates)
    lr, decay = {"a/bias": 0.5, "b/kernel": 1.0}, {"a/bias": 0.0, "b/kernel": 1.0}
    expected = numpy_adamw(train, start, gradients, lr, decay)
    assert now.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(now[path], expected[path], rtol=2e-5, atol=2e-6)
        assert np.abs(now[path] - start[path]).max() > 0.01


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(warmup):
    train = Train(steps=20, lr=0.5, warmup_steps=warmup, end_lr=0.2)
    rate = optimizer.schedule(train)
    got = [float(rate(step)) for step in range(21)]
    np.testing.assert_allclose(got, [numpy_lr(train, step) for step in range(21)], rtol=1e-5)
    assert got[warmup] == 0.5 and got[20] == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps is 100.*than the 20 of config"):
        optimizer.schedule(Train(steps=20, warmup_steps=100))
