"""Blocks between the layers of a decoder: what fusion and samplers inside it have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.models.layers import UNROLLED_LAYERS, Stack


class Hook(NamedTuple):
    """Blocks that stand before every so many layers of a stack.

    Attributes:
      stack: the blocks, one per place.
      first: the layer before which the first stands.
      every: layers from one block to the next; the last block may stand after the last layer.
      apply: one block's step, `apply(block, carry, inputs, key) -> carry`.
      per_place: what goes in as `inputs`, a pytree whose leaves have the places as first axis.
    """

    stack: Stack
    first: int
    every: int
    apply: Callable
    per_place: Any = None


def run(
    stack: Stack,
    hook: Hook | None,
    apply: Callable,
    carry,
    per_layer=None,
    key: Array | None = None,
):
    """Runs a stack as its own call does, with the hook's blocks in their places.

    A scan over the layers before the first block, one over groups of a block and the layers up to
    the next, and what is left: a last block with fewer layers after it, or layers alone.

    Raises:
      ValueError: a block stands where the stack has no layer.
    """
    if hook is None:
        return stack(apply, carry, per_layer=per_layer, key=key)
    places, depth, every = hook.stack.layers, stack.layers, hook.every
    if hook.first + (places - 1) * every > depth:
        raise ValueError(f"{places} blocks every {every} layers do not fit {depth} layers")
    groups = min(places, (depth - hook.first) // every)
    start, end = hook.first, hook.first + groups * every
    layers = (stack.blocks, per_layer, _split(key, depth))
    hook_key = None if key is None else jax.random.fold_in(key, depth)
    blocks = (hook.stack.blocks, hook.per_place, _split(hook_key, places))
    step, between = stack.step(apply), hook.stack.step(_quiet(hook.apply))

    def layers_of(carry, inputs):
        return jax.lax.scan(step, carry, inputs, unroll=_unroll(stack, inputs))

    def group(carry, inputs):
        block, inner = inputs
        carry, _ = between(carry, block)
        return layers_of(carry, inner)

    carry, before = layers_of(carry, _cut(layers, 0, start))
    whole = _cut(layers, start, end)
    grouped = jax.tree.map(lambda x: x.reshape(groups, every, *x.shape[1:]), whole)
    inputs = (_cut(blocks, 0, groups), grouped)
    carry, inside = jax.lax.scan(group, carry, inputs, unroll=_unroll(stack, whole))
    inside = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inside)
    if groups < places:
        carry, _ = between(carry, jax.tree.map(lambda x: x[groups], blocks))
    carry, after = layers_of(carry, _cut(layers, end, depth))
    parts = [(before, start), (inside, end - start), (after, depth - end)]
    found = [part for part, length in parts if length]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _quiet(apply: Callable) -> Callable:
    return lambda *inputs: (apply(*inputs), None)


def _split(key: Array | None, count: int) -> Array | None:
    return None if key is None else jax.random.split(key, count)


def _cut(tree, start: int, end: int):
    """Some of the layers; where these are all, XLA sees that nothing is cut."""
    return jax.tree.map(lambda x: x[start:end], tree)


def _unroll(stack: Stack, inputs) -> bool:
    layers = len(jax.tree.leaves(inputs)[0])
    return not stack.remat and layers <= UNROLLED_LAYERS
