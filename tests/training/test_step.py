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

FROZEN = tiny.config(adaptation=(Rule("encoder/.*", mode="frozen"), Rule(".*")), ema=0.5)


def run(config, count, devices=1):
    """Losses of `count` steps, each awaited, and the state after them."""
    mesh, _, step, create = tiny.prepared(config, devices)
    state, losses = create(), []
    for number in range(count):
        state, metrics = step(state, steps.place(tiny.batch(number % 4), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    losses, state = run(tiny.config(), 20)
    return losses, {path: np.asarray(leaf) for path, leaf in state.trainable.items()}


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(data=1, fsdp=8),
        Parallel(data=4, tensor=2),
        pytest.param(Parallel(2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_twenty_losses_do_not_depend_on_the_mesh(one_device, parallel):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    losses, state = run(tiny.config(parallel=parallel), 20, devices=8)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    spread = [leaf for leaf in state.trainable.values() if not leaf.sharding.is_fully_replicated]
    assert len(spread) > len(state.trainable) / 3 or parallel.fsdp == 1
    assert spread


def test_moments_lie_where_their_parameters_lie():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    config = tiny.config(parallel=Parallel(1, 4, 2), ema=0.9)
    mesh, plan, *_ = tiny.prepared(config, 8)
    state = states.abstract(config, plan, mesh)
    places = {path: leaf.sharding for path, leaf in state.trainable.items()}
    adam = next(part for part in state.opt if hasattr(part, "mu"))
    for tree in (adam.mu, adam.nu, state.ema):
        assert {path: leaf.sharding for path, leaf in tree.items()} == places


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
    step = functools.partial(steps._step, FROZEN, optimizer.make(FROZEN.train, plan))
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
    mesh, _, step, create = tiny.prepared(tiny.config())
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
    config = tiny.config()
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
