"""One optimizer step, jitted over plain pytrees."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vlm_jax.batch import Batch
from vlm_jax.config import Config
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.parallel import sharding
from vlm_jax.training import accumulation, guard, objectives, optimizer, schedules
from vlm_jax.training.adaptation import Plan
from vlm_jax.training.state import State, abstract, shardings

Metrics = dict[str, Array]


def make_step(
    config: Config, plan: Plan, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step function. It takes the state's buffers over: use only the state it returns.

    Metrics are the sums of `objectives.losses` with `loss`, `grad_norm` (before clipping),
    `learning_rate`, the guard's `verdict` and the counts of its memory after the step, as arrays
    that may not be computed yet.

    Raises:
      ConfigError: the rows of a batch cannot be spread over the mesh.
    """
    check_rows(config, mesh)
    state_places = shardings(abstract(config, plan, mesh))
    jitted = jax.jit(
        functools.partial(_step, config, plan, optimizer.make(config.train, plan)),
        donate_argnums=0,
        in_shardings=(state_places, sharding.batch(mesh)),
        out_shardings=(state_places, sharding.replicated(mesh)),
    )

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    return step


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the rows of a batch cannot be spread over the mesh."""
    rows, ways = config.data.rows, mesh.shape["data"] * mesh.shape["fsdp"]
    count = config.train.accumulate
    if rows % (ways * count):
        times = f", times the {count} of config.train.accumulate" if count > 1 else ""
        raise ConfigError(
            f"config.data.rows is {rows}; expected a multiple of the {ways} devices of the mesh's "
            f"data and fsdp axes{times}"
        )


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch, the same on every host, as arrays over the mesh."""
    rows = sharding.batch(mesh)

    def put(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, rows, lambda index: x[index])

    return jax.tree.map(put, batch)


def _step(
    config: Config, plan: Plan, optimize: optax.GradientTransformation, state: State, batch: Batch
) -> tuple[State, Metrics]:
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    count = config.train.accumulate
    whole = objectives.totals(batch) if count > 1 else None

    def objective(trainable: dict[str, Array], rows: Batch, key: Array):
        flat = {**state.frozen, **trainable}
        vlm = params.build(config.model, flat, plan.dropout, key)
        return objectives.losses(vlm, rows, config, key, whole)

    (loss, sums), gradient = accumulation.gradient(
        objective, state.trainable, batch, dropout, count
    )
    norm = optax.tree.norm(gradient)
    # Behind the barrier the compiler does not see what the guard can answer: with it or without, a
    # good step is the same program and rounds alike.
    verdict = jax.lax.optimization_barrier(guard.judge(config.guard, state.guard, loss, norm))

    def learned():
        updates, opt = optimize.update(gradient, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        averaged = average(state.ema, trainable, config.train.ema, state.step)
        return state.step + 1, trainable, opt, averaged

    # A branch, not a choice between two states: it needs the memory of one.
    step, trainable, opt, averaged = jax.lax.cond(
        verdict == guard.GOOD,
        learned,
        lambda: (state.step, state.trainable, state.opt, state.ema),
    )
    memory = guard.remember(state.guard, verdict, loss, norm)
    metrics = sums | {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(schedules.make(config.train)(state.step)),
        "verdict": verdict,
        "skipped": memory.skipped,
        "in_row": memory.in_row,
        "drawn": memory.drawn,
    }
    return State(step, trainable, state.frozen, opt, averaged, state.key, memory), metrics


def average(
    ema: dict[str, Array] | None,
    trainable: dict[str, Array],
    decay: float,
    step: Int[Array, ""],
) -> dict[str, Array] | None:
    """The running average after a step; early on it forgets faster, or the start would linger."""
    if ema is None:
        return None
    decay: Float[Array, ""] = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, trainable)
