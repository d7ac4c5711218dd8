"""The optimizers against plain numpy ones, and those of torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.config import Rule, Train
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


MATRICES = {
    "decoder/output/kernel": ((12, 30), (12, 30)),
    "decoder/stack/blocks/attention/query/kernel": ((2, 12, 3, 4), (2, 12, 12)),
    "decoder/stack/blocks/attention/out/kernel": ((2, 3, 4, 24), (2, 12, 24)),
    "encoder/stem/0/conv": ((3, 3, 2, 9), (18, 9)),
}
VECTORS = {"decoder/embedding": (6, 4), "decoder/norm/scale": (5,), "connector/queries": (4, 4)}


def first_muon_update(train, rng):
    shapes = {path: shape for path, (shape, _) in MATRICES.items()} | VECTORS
    gradient = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    plan = adaptation.plan(gradient, (Rule("decoder/output/.*", lr=0.5), Rule(".*")))
    tx = optimizer.make(train, plan)
    flat = jax.tree.map(jnp.zeros_like, gradient)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(flat), flat)
    return gradient, updates


def test_muon_steps_along_the_orthogonal_factor_of_each_layers_matrix():
    train = Train(optimizer="muon", steps=9, warmup_steps=0, lr=0.1, adam_lr=0.03, clip=0.0)
    gradient, updates = first_muon_update(train, np.random.default_rng(0))
    for path, (_, flat_shape) in MATRICES.items():
        gradients = gradient[path].reshape(-1, *flat_shape[-2:])
        steps = -np.asarray(updates[path]).reshape(gradients.shape)
        rate = 0.1 * (0.5 if path == "decoder/output/kernel" else 1.0)
        for g, step in zip(gradients, steps, strict=True):
            u, _, v = np.linalg.svd(g, full_matrices=False)
            scaled = step / (rate * 0.2 * math.sqrt(max(g.shape)))
            # Five Newton-Schulz steps bring singular values to about 1 (0.7 to 1.2, Jordan 2024)
            # and leave the singular vectors alone.
            inner = u.T @ scaled @ v.T
            assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.02, path
            assert np.diag(inner).min() > 0.3 and np.diag(inner).max() < 1.3, path


def test_muon_leaves_embeddings_and_vectors_to_adam_at_its_own_rate():
    train = Train(optimizer="muon", steps=9, warmup_steps=0, lr=0.1, adam_lr=0.03, clip=0.0)
    gradient, updates = first_muon_update(train, np.random.default_rng(0))
    for path in VECTORS:  # Adam's first step is the sign of the gradient
        np.testing.assert_allclose(updates[path], -0.03 * np.sign(gradient[path]), rtol=1e-4)


def walked(train, start, gradients):
    """The parameters after a step along each gradient."""
    plan = adaptation.plan(start, (Rule(".*"),))
    tx, now = optimizer.make(train, plan), jax.tree.map(jnp.asarray, start)
    opt, update = tx.init(now), jax.jit(tx.update)
    for gradient in gradients:
        updates, opt = update(gradient, opt, now)
        now = optax.apply_updates(now, updates)
    return now


def drawn(rng, shapes):
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


CONSTANT = {"schedule": "constant", "warmup_steps": 0, "steps": 100, "clip": 0.0}


def test_lion_is_its_papers_algorithm():
    rng, shapes = np.random.default_rng(1), {"a/kernel": (6, 5), "a/bias": (5,)}
    train = Train(optimizer="lion", lr=0.02, b1=0.9, b2=0.99, weight_decay=0.3, **CONSTANT)
    start, gradients = drawn(rng, shapes), [drawn(rng, shapes) for _ in range(30)]
    for path, leaf in walked(train, start, gradients).items():
        # Chen et al. 2023, algorithm 2, in float64.
        x, m = start[path].astype(np.float64), np.zeros(shapes[path])
        for gradient in gradients:
            g = gradient[path].astype(np.float64)
            x = x - 0.02 * (np.sign(0.9 * m + 0.1 * g) + 0.3 * x)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(leaf, x, rtol=1e-5, atol=1e-6)


# Below 32 entries an axis is not factored.
WIDE, NARROW = {"w/kernel": (48, 40), "stack/kernel": (3, 40, 64)}, {"n/kernel": (40, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "atol"), [(0.0, 1e-5), (0.9, 4e-3)])
def test_adafactor_is_that_of_transformers_where_the_two_agree(momentum, atol):
    import torch
    from transformers import Adafactor

    rng = np.random.default_rng(2)
    shapes = WIDE | {"a/bias": (50,)}
    train = Train(optimizer="adafactor", lr=0.01, b1=momentum, weight_decay=0.2, **CONSTANT)
    start, gradients = drawn(rng, shapes), [drawn(rng, shapes) for _ in range(40)]
    theirs = {path: torch.nn.Parameter(torch.tensor(leaf)) for path, leaf in start.items()}
    walker = Adafactor(
        theirs.values(),
        lr=0.01,
        eps=(1e-30, 1e-3),
        clip_threshold=1e30,
        decay_rate=-0.8,
        beta1=momentum or None,
        weight_decay=0.2,
        scale_parameter=False,
        relative_step=False,
    )
    for gradient in gradients:
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[path])
        walker.step()
    for path, leaf in walked(train, start, gradients).items():
        # Our momentum is bfloat16: 40 updates of up to 0.01 with 8 bits each, of which ten linger.
        np.testing.assert_allclose(leaf, theirs[path].detach(), rtol=0, atol=atol)
        assert np.abs(leaf - start[path]).max() > 0.05


def test_adafactors_moments_are_factored_and_average_with_the_papers_rate_up_to_its_cap():
    rng, shapes = np.random.default_rng(3), WIDE | NARROW
    train = Train(optimizer="adafactor", lr=1.0, b1=0.9, **CONSTANT)
    plan = adaptation.plan(drawn(rng, shapes), (Rule(".*"),))
    tx = optimizer.make(train, plan)
    flat = drawn(rng, shapes)
    opt = tx.init(flat)
    factored, momentum = opt[1]
    assert {leaf.dtype for leaf in momentum.ema.values()} == {jnp.dtype(jnp.bfloat16)}
    sizes = {path: factored.v_row[path].size + factored.v_col[path].size for path in shapes}
    assert sizes == {"w/kernel": 88, "stack/kernel": 312, "n/kernel": 2}
    assert factored.v["n/kernel"].shape == (40, 8)
    for step, rate in ((0, 0.0), (1, 1 - 2**-0.8), (999, 1 - 1000**-0.8), (50_000, 0.999)):
        at = jax.tree.map(lambda x: x, opt)
        at = optax.tree.set(at, count=jnp.int32(step), v=jax.tree.map(jnp.ones_like, factored.v))
        _, after = tx.update(flat, at, flat)
        got = optax.tree.get(after, "v")["n/kernel"]
        np.testing.assert_allclose(
            got, rate + (1 - rate) * flat["n/kernel"] ** 2, rtol=1e-4, atol=1e-6
        )
