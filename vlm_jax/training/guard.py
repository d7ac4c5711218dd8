"""The guard: steps not to be learned from are skipped within the compiled step.

It remembers the last good steps on the device and compares the next one with them, so that no step
waits for the host. What it skips, and what is no finite number, it does not remember: one such
value in the window would make every later comparison meaningless.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import config as configs

GOOD, NON_FINITE, SPIKE = range(3)
REASONS = {NON_FINITE: "non-finite", SPIKE: "spike"}


class Memory(NamedTuple):
    """What the guard knows; a part of the run's state.

    Attributes:
      losses, norms: of the last good steps, a ring buffer.
      good: good steps so far.
      skipped: skipped steps so far.
      in_row: of these, those since the last step that was not skipped.
      drawn: batches taken from the data so far; a roll-back does not turn it back.
    """

    losses: Float[Array, " W"]
    norms: Float[Array, " W"]
    good: Int[Array, ""]
    skipped: Int[Array, ""]
    in_row: Int[Array, ""]
    drawn: Int[Array, ""]


def fresh(guard: configs.Guard) -> Memory:
    """Of a new run."""
    window, none = jnp.zeros(guard.window, jnp.float32), jnp.zeros((), jnp.int32)
    return Memory(window, window, none, none, none, none)


def judge(
    guard: configs.Guard, memory: Memory, loss: Float[Array, ""], norm: Float[Array, ""]
) -> Int[Array, ""]:
    """GOOD, or why a step is to be skipped.

    Args:
      guard: what is skipped.
      memory: of the steps before.
      loss: what was minimised.
      norm: global norm of its gradient, before clipping.
    """
    verdict = jnp.int32(GOOD)
    if guard.sigmas:
        high = _above(guard, memory.losses, memory.good, loss)
        high |= _above(guard, memory.norms, memory.good, norm)
        verdict = jnp.where(high, SPIKE, verdict)
    if guard.nonfinite:
        verdict = jnp.where(_finite(loss, norm), verdict, NON_FINITE)
    return verdict


def remember(
    memory: Memory, verdict: Int[Array, ""], loss: Float[Array, ""], norm: Float[Array, ""]
) -> Memory:
    """The memory after a step."""
    good, enters = verdict == GOOD, (verdict == GOOD) & _finite(loss, norm)
    place = memory.good % memory.losses.size

    def put(window: Float[Array, " W"], value: Float[Array, ""]) -> Float[Array, " W"]:
        return jnp.where(enters, window.at[place].set(value), window)

    return Memory(
        losses=put(memory.losses, loss),
        norms=put(memory.norms, norm),
        good=memory.good + enters,
        skipped=memory.skipped + ~good,
        in_row=jnp.where(good, 0, memory.in_row + 1),
        drawn=memory.drawn + 1,
    )


def _finite(loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    return jnp.isfinite(loss) & jnp.isfinite(norm)


def _above(
    guard: configs.Guard, window: Float[Array, " W"], good: Int[Array, ""], value: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether a value lies far above those of the window, once half of it is filled."""
    there = jnp.arange(window.size) < good
    count = jnp.maximum(jnp.sum(there), 1)
    mean = jnp.sum(jnp.where(there, window, 0.0)) / count
    variance = jnp.sum(jnp.where(there, jnp.square(window - mean), 0.0)) / count
    deviation = jnp.maximum(jnp.sqrt(variance), guard.floor * jnp.abs(mean))
    return (2 * count >= window.size) & (value > mean + guard.sigmas * deviation)
