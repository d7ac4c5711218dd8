"""Contrastive losses of image and text embeddings that lie spread over the devices of a mesh.

No device ever holds the whole matrix of similarities: the other side's embeddings go round the
devices in a ring, and each compares its own with one block of them at a time (Zhai et al. 2023,
section 3.3, for the sigmoid; the softmax keeps running sums of exponentials). The backward pass
goes round once more instead of keeping the blocks.

n counts pairs, m those of one device, E is the width of the embeddings.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from vlm_jax.parallel.sharding import RULES

AXES = RULES["batch"]
NEVER = -1e30  # not infinity: a row of nothing else would give gradients of NaN

Loss = Callable[..., Float[Array, ""]]


def spread(loss: Loss, scalars: int = 2) -> Loss:
    """A loss of one device's part, as one of whole arrays whose pairs lie over the batch's axes.

    What it makes takes images [n, E], texts [n, E], there [n] (False for pairs that are padding),
    scale and bias of the similarities, and gives the mean over the pairs that are there. It is
    called under `jax.set_mesh`, and n is a multiple of the mesh's devices along those axes.

    Args:
      loss: one of LOSSES; or `hits`, which takes none of the last two.
      scalars: how many it takes.
    """
    specs = (P(AXES),) * 3 + (P(),) * scalars
    return jax.shard_map(loss, in_specs=specs, out_specs=P(), axis_names=set(AXES))


def sigmoid(
    images: Float[Array, "m E"],
    texts: Float[Array, "m E"],
    there: Bool[Array, " m"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """SigLIP's loss: every pair is asked on its own whether it belongs together."""
    own = jnp.eye(len(images), dtype=bool)

    def block(total, texts, others, step):
        logits = scale * images @ texts.T + bias
        signs = jnp.where(own & (step == 0), 1.0, -1.0)
        each = jnp.where(there[:, None] & others, jax.nn.log_sigmoid(signs * logits), 0.0)
        return total - each.sum()

    total = _ring(block, _varying(jnp.zeros(())), texts, there)
    return jax.lax.psum(total, AXES) / _count(there)


def softmax(
    images: Float[Array, "m E"],
    texts: Float[Array, "m E"],
    there: Bool[Array, " m"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's loss: which text is an image's, and which image a text's."""
    right = scale * jnp.sum(images * texts, axis=-1) + bias
    both = _normaliser(images, texts, there, scale, bias) + _normaliser(
        texts, images, there, scale, bias
    )
    total = jnp.sum(jnp.where(there, both / 2 - right, 0.0))
    return jax.lax.psum(total, AXES) / _count(there)


def hits(
    images: Float[Array, "m E"], texts: Float[Array, "m E"], there: Bool[Array, " m"]
) -> Float[Array, ""]:
    """How many images of all devices have no text that is nearer than their own."""
    right = jnp.sum(images * texts, axis=-1)

    def block(top, texts, others, step):
        return jnp.maximum(top, jnp.where(others, images @ texts.T, NEVER).max(axis=-1))

    top = _ring(block, _varying(jnp.full(len(images), NEVER)), texts, there)
    # The same product summed in another order may differ in its last bits.
    return jax.lax.psum(jnp.sum(there & (right >= top - 1e-5)), AXES).astype(jnp.float32)


def _normaliser(own, other, there, scale, bias) -> Float[Array, " m"]:
    """Log of the sum of exponentials of each of our similarities with all of the other side's."""

    def block(state, other, others, step):
        top, total = state
        logits = jnp.where(others, scale * own @ other.T + bias, NEVER)
        # Which number is taken off does not change the sum, so no gradient goes there.
        higher = jnp.maximum(top, jax.lax.stop_gradient(logits.max(axis=-1)))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(axis=-1)
        return higher, total

    start = (jnp.full(len(own), NEVER), jnp.zeros(len(own)))
    top, total = _ring(block, jax.tree.map(_varying, start), other, there)
    return top + jnp.log(jnp.maximum(total, 1e-37))


def _ring(block, state, embeddings, there):
    """Folds `block(state, embeddings, there, step)` over those of all devices, our own first."""
    size = jax.lax.axis_size(AXES)
    places = [(i, (i - 1) % size) for i in range(size)]
    passed = functools.partial(jax.lax.ppermute, axis_name=AXES, perm=places)

    @jax.checkpoint
    def turn(carry, step):
        state, embeddings, there = carry
        state = block(state, embeddings, there, step)
        return (state, passed(embeddings), passed(there)), None

    (state, *_), _ = jax.lax.scan(turn, (state, embeddings, there), jnp.arange(size))
    return state


def _varying(x: Array) -> Array:
    """As shard_map wants what a scan carries: different on every device."""
    return jax.lax.pcast(x, AXES, to="varying")


def _count(there: Bool[Array, " m"]) -> Float[Array, ""]:
    return jnp.maximum(jax.lax.psum(there.sum(), AXES), 1).astype(jnp.float32)


LOSSES = {"sigmoid": sigmoid, "softmax": softmax}
