"""Parallel prediction: documents whose tokens are told all at once, from the image alone.

Of a captioner whose encoder is what is wanted (Tschannen et al. 2023, "Image Captioners Are
Scalable Vision Learners Too", CapPa): without the words before it, every word has to be seen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.batch import Batch

# Far from the small numbers that dropout's keys are split into.
OWN_KEY = 0x43617050


def drawn(batch: Batch, share: float, token: int, key: Array) -> Batch:
    """The batch as the decoder reads it, with that share of the documents masked.

    `key` is dropout's, of which this takes a part of its own.
    """
    key = jax.random.fold_in(key, OWN_KEY)
    # One draw per segment id: a row has no more documents than tokens.
    rows, length = batch.segments.shape
    draws: Float[Array, "B D"] = jax.random.uniform(key, (rows, length + 1))
    chosen = jnp.take_along_axis(draws, batch.segments, axis=1) < share
    return masked(batch, chosen & (batch.segments > 0), token)


def masked(batch: Batch, chosen: Bool[Array, "B T"], token: int) -> Batch:
    """The batch with all learned tokens of the chosen documents replaced.

    What is not learned, a prompt or the token that begins a text, stays. All tokens of such a
    document see each other: none of them tells what is asked of another.

    Args:
      batch: as it came.
      chosen: True on all tokens of the documents.
      token: what stands there instead.
    """
    learned = batch.loss_weights > 0
    block = batch.segments.shape[1] + 1  # no block of a document has this id
    return batch._replace(
        tokens=jnp.where(chosen & learned, token, batch.tokens),
        blocks=jnp.where(chosen, block, batch.blocks),
    )
