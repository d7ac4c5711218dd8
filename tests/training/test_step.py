"""The jitted step: one code path from one device to many, two trees, averages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from vlm_jax.config import Parallel, Rule
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.training import objectives, optimizer
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

BASE = {"ema": 0.9, "bag_of_words": 0.5, "contrastive": 0.5}
FROZEN = tiny.config(adaptation=(Rule("encoder/.*", mode="frozen"), Rule(".*")), ema=0.5)


def run(config, count, devices=1):
    """Losses of `count` steps, each awaited, and the state after them."""
    mesh, _, step, create = tiny.prepared(config, devices)
    state, losses = create(), []
    for number in range(count):
        state, metrics = step(state, steps.place(tiny.batch(number % 4), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@functools.cache
def losses_on_one_device(optimizer_name):
    return run(tiny.config(**BASE, optimizer=optimizer_name), 20)[0]


@pytest.mark.parametrize(
    ("parallel", "optimizer_name"),
    [
        (Parallel(data=1, fsdp=8), "adamw"),
        (Parallel(data=4, tensor=2), "adamw"),
        pytest.param(Parallel(2, 2, 2), "adamw", marks=pytest.mark.slow),
        pytest.param(Parallel(2, 2, 2), "muon", marks=pytest.mark.slow),
    ],
)
def test_twenty_losses_do_not_depend_on_the_mesh(parallel, optimizer_name):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    losses, state = run(
        tiny.config(**BASE, parallel=parallel, optimizer=optimizer_name), 20, devices=8
    )
    # Five Newton-Schulz steps of slope 3.4 magnify what rounding leaves of small singular values.
    rtol = {"adamw": 1e-5, "muon": 1e-4}[optimizer_name]
    np.testing.assert_allclose(losses, losses_on_one_device(optimizer_name), rtol=rtol)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])  # the same four batches
    spread = [leaf for leaf in state.trainable.values() if not leaf.sharding.is_fully_replicated]
    assert len(spread) > len(state.trainable) / 4


def test_kept_bytes_are_two_moments_for_adam_one_for_muon_and_the_average():
    for config, matrix, other in (
        (tiny.config(), 8, 8),
        (tiny.config(ema=0.9), 12, 12),
        (tiny.config(ema=0.9, optimizer="muon"), 8, 12),
    ):
        mesh, plan, *_ = tiny.prepared(config)
        state = states.abstract(config, plan, mesh)
        kept = states.kept_bytes(state)
        assert kept.keys() == state.trainable.keys()
        for path, per_parameter in (
            ("decoder/stack/blocks/mlp/up/kernel", matrix),
            ("decoder/embedding", other),
        ):
            assert kept[path] == state.trainable[path].size * per_parameter


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(optimizer_name):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    config = tiny.config(parallel=Parallel(1, 4, 2), ema=0.9, optimizer=optimizer_name)
    mesh, plan, *_ = tiny.prepared(config, 8)
    state = states.abstract(config, plan, mesh)
    seen = set()
    for keys, leaf in jax.tree_util.tree_leaves_with_path((state.opt, state.ema)):
        path = getattr(keys[-1], "key", None)
        if path in state.trainable:
            assert leaf.sharding == state.trainable[path].sharding
            seen.add(path)
    assert seen == state.trainable.keys()


def test_frozen_leaves_are_bitwise_unchanged_and_have_no_optimizer_state():
    mesh, _, step, create = tiny.prepared(FROZEN)
    state = create()
    before = {path: np.array(leaf) for path, leaf in state.frozen.items()}
    moving = {path: np.array(leaf) for path, leaf in state.trainable.items()}
    for number in range(3):
        state, _ = step(state, steps.place(tiny.batch(number), mesh))
    assert before and all(path.startswith("encoder/") for path in before)
    for path, leaf in before.items():
        np.testing.assert_array_equal(state.frozen[path], leaf)
    assert all((state.trainable[path] != leaf).any() for path, leaf in moving.items())
    held = {str(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state.opt)}
    assert not any("encoder/" in keys for keys in held)
    assert any("decoder/" in keys for keys in held)


def test_frozen_leaves_keep_their_dtype():
    _, plan, _, create = tiny.prepared(FROZEN)
    step = functools.partial(steps._step, FROZEN, plan, optimizer.make(FROZEN.train, plan))
    state = create()
    small = {path: leaf.astype(jnp.bfloat16) for path, leaf in state.frozen.items()}
    state, _ = jax.eval_shape(step, dataclasses.replace(state, frozen=small), tiny.batch(0))
    assert {leaf.dtype for leaf in state.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype(jnp.float32)}


def test_the_average_follows_its_formula():
    mesh, _, step, create = tiny.prepared(FROZEN)
    state = create()
    expected = {path: np.array(leaf) for path, leaf in state.trainable.items()}
    for number in range(12):
        state, _ = step(state, steps.place(tiny.batch(number), mesh))
        decay = min(0.5, (1 + number) / (10 + number))
        for path, leaf in state.trainable.items():
            expected[path] = decay * expected[path] + (1 - decay) * np.asarray(leaf)
    evaluated = state.evaluated()
    assert evaluated.keys() == params.abstract(FROZEN.model).keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(evaluated[path], leaf, rtol=1e-5, atol=1e-7)
    assert any((state.trainable[path] != evaluated[path]).any() for path in expected)


def test_dropout_differs_between_steps_and_repeats_with_the_seed():
    # The warm-up starts at a learning rate of zero: only dropout tells the first two steps apart.
    mesh, _, step, create = tiny.prepared(tiny.config(**BASE))
    runs = []
    for _ in range(2):
        state, losses = create(), []
        for _ in range(2):
            state, metrics = step(state, steps.place(tiny.batch(0), mesh))
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_rows_that_do_not_divide_are_refused():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    with pytest.raises(ConfigError, match=r"config.data.rows is 12; expected a multiple of the 8"):
        tiny.prepared(tiny.config(data={"rows": 12}), 8)


def test_a_step_is_the_gradient_of_the_loss_through_the_optimizer():
    config = tiny.config(**BASE)
    mesh, plan, step, create = tiny.prepared(config)
    state, flat = create(), create().trainable

    @jax.jit
    def gradient(flat, batch, key):
        def loss(flat):
            vlm = params.build(config.model, flat)
            return objectives.losses(vlm, batch, config, key)[0]

        return jax.grad(loss)(flat)

    tx = optimizer.make(config.train, plan)
    opt = tx.init(flat)
    for number in range(3):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)
        wanted = gradient(flat, tiny.batch(number), key)
        updates, opt = tx.update(wanted, opt, flat)
        flat = optax.apply_updates(flat, updates)
        state, metrics = step(state, steps.place(tiny.batch(number), mesh))
        norm = np.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert int(state.step) == 3
    for path, leaf in flat.items():
        np.testing.assert_allclose(state.trainable[path], leaf, atol=1e-4)
