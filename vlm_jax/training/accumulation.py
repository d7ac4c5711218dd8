"""Gradients of a large batch in the memory of a small one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.batch import Batch
from vlm_jax.models import params
from vlm_jax.parallel import sharding

Sums = dict[str, Array]
Objective = Callable[[dict[str, Array], Batch, Array], tuple[Float[Array, ""], Sums]]


def gradient(
    objective: Objective, trainable: dict[str, Array], batch: Batch, dropout: Array, count: int
) -> tuple[tuple[Float[Array, ""], Sums], dict[str, Array]]:
    """(loss, sums) of a batch and the gradient of the loss, one micro-batch after the other.

    Args:
      objective: of (parameters by path, rows, PRNG key): their loss, of which those of all rows add
        up to that of the batch, and sums.
      trainable: what to differentiate by.
      batch: the global batch.
      dropout: PRNG key.
      count: micro-batches; 1 is one pass over the batch.
    """
    whole = jax.value_and_grad(objective, has_aux=True)
    if count == 1:
        return whole(trainable, batch, dropout)

    def add(total, part):
        rows, number = part
        found = whole(trainable, rows, jax.random.fold_in(dropout, number))
        return jax.tree.map(jnp.add, total, found), None

    parts = split(batch, count)
    like = jax.eval_shape(whole, trainable, jax.tree.map(lambda x: x[0], parts), dropout)
    figures = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like[0])
    # Without a word of where it lies, the compiler may hold the sum whole on every device.
    slopes = {
        path: sharding.constrain(jnp.zeros_like(leaf), *params.axes(path))
        for path, leaf in trainable.items()
    }
    total, _ = jax.lax.scan(add, (figures, slopes), (parts, jnp.arange(count)))
    return total


def split(batch: Batch, count: int) -> Batch:
    """The batch as [count, rows / count, ...]: micro-batch i has rows i, i + count, ...

    So each device finds the rows of every micro-batch among its own, and which rows are together
    does not depend on the mesh.
    """

    def deal(x: Array) -> Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(deal, batch)
