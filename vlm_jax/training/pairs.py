"""Contrastive losses of image and text embeddings that lie spread over the devices of a mesh.

No device ever holds the whole matrix of similarities: the other side's embeddings go round the
devices in a ring, and each compares its own with one block of them at a time (Zhai et al. 2023,
section 3.3, for the sigmoid; the softmax keeps running sums of exponentials). The backward pass
goes round once more instead of keeping the blocks.

An image may have several embeddings, of which the nearest to a text counts (BLIP-2's queries).

n counts pairs, m those of one device, Q an image's embeddings, E is their width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.parallel.sharding import RULES

AXES = RULES["batch"]
REPLICATED = P()
NEVER = -1e30  # not infinity: a row of nothing else would give gradients of NaN

# The shares of a softmax that hard negatives are drawn by are no smaller (LAVIS, blip2_qformer.py).
FLOOR = 1e-4

Loss = Callable[..., Float[Array, ""]]
Similar = Callable[[Array, Array], Float[Array, "m m"]]


def spread(part: Callable, scalars: int = 2, rows: int = 3, out: Any = REPLICATED) -> Callable:
    """A function of one device's part, as one of whole arrays that lie over the batch's axes.

    What it makes of a loss takes images [n, E], texts [n, E], there [n] (False for pairs that are
    padding), scale and bias of the similarities, and gives the mean over the pairs that are there.
    It is called under `jax.set_mesh`, and n is a multiple of the mesh's devices along those axes.

    Args:
      part: one of LOSSES; or `hits`, `negatives` and `taken`, which take other arguments.
      scalars: how many whole arguments it takes, behind the others.
      rows: how many arguments it takes that lie over the devices.
      out: how what it gives lies.
    """
    specs = (P(AXES),) * rows + (P(),) * scalars
    return jax.shard_map(part, in_specs=specs, out_specs=out, axis_names=set(AXES))


def dot(images: Float[Array, "m E"], texts: Float[Array, "m E"]) -> Float[Array, "m m"]:
    """Similarities of embeddings."""
    return images @ texts.T


def nearest(images: Float[Array, "m Q E"], texts: Float[Array, "m E"]) -> Float[Array, "m m"]:
    """Similarities of the nearest of an image's embeddings (Li et al. 2023, section 3.2)."""
    return jnp.max(jnp.einsum("iqe,je->ijq", images, texts), axis=-1)


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
    similar: Similar = dot,
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """CLIP's loss: which text is an image's, and which image a text's.

    With smoothing, that share of each answer is spread over all texts, or images, that are there.
    """
    right = scale * _right(images, texts, similar) + bias
    (top, spread_), (other_top, _) = (
        _sums(*sides, there, scale, bias, similarity)
        for sides, similarity in (
            ((images, texts), similar),
            ((texts, images), _turned(similar)),
        )
    )
    count = _count(there)
    # Every pair's similarity is in the sum over images and in that over texts alike.
    each = (top + other_top) / 2 - (1 - smoothing) * right
    each = each - smoothing * spread_ / count if smoothing else each
    total = jnp.sum(jnp.where(there, each, 0.0))
    return jax.lax.psum(total, AXES) / count


def hits(
    images: Float[Array, "m E"],
    texts: Float[Array, "m E"],
    there: Bool[Array, " m"],
    similar: Similar = dot,
) -> Float[Array, ""]:
    """How many images of all devices have no text that is nearer than their own."""
    right = _right(images, texts, similar)

    def block(top, texts, others, step):
        return jnp.maximum(top, jnp.where(others, similar(images, texts), NEVER).max(axis=-1))

    top = _ring(block, _varying(jnp.full(len(images), NEVER)), texts, there)
    # The same product summed in another order may differ in its last bits.
    return jax.lax.psum(jnp.sum(there & (right >= top - 1e-5)), AXES).astype(jnp.float32)


def negatives(
    images: Float[Array, "m Q E"],
    texts: Float[Array, "m E"],
    there: Bool[Array, " m"],
    scale: Float[Array, ""],
    key: Array | None = None,
    similar: Similar = nearest,
) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """An image that is not its own for each text, and a text for each image: hard negatives.

    Drawn among all devices' by the softmax of similarities, as by LAVIS; where there is no other,
    -1. What is drawn does not depend on the mesh.

    Args:
      images, texts, there, scale: as of a loss.
      key: PRNG key; None = the likeliest.
      similar: how similarities are made.

    Returns:
      The number of an image for each of our texts, and of a text for each of our images.
    """
    images, texts, scale = jax.lax.stop_gradient((images, texts, scale))
    keys = (None, None) if key is None else jax.random.split(key)
    return (
        _drawn(texts, images, there, scale, keys[0], _turned(similar)),
        _drawn(images, texts, there, scale, keys[1], similar),
    )


def taken(x: Float[Array, "m ..."], index: Int[Array, " m"]) -> Float[Array, "m ..."]:
    """Rows of all devices by number, where no device ever holds all of them; -1 gives zeros."""
    m, size, me = len(x), jax.lax.axis_size(AXES), jax.lax.axis_index(AXES)

    def block(found, rows, _, step):
        here = index // m == (me + step) % size
        here = here.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(here, rows[index % m], found)

    # What goes round with the rows is not asked for.
    return _ring(block, _varying(jnp.zeros(x.shape, x.dtype)), x, index)


def _drawn(own, other, there, scale, key, similar: Similar) -> Int[Array, " m"]:
    m, size, me = len(own), jax.lax.axis_size(AXES), jax.lax.axis_index(AXES)
    rows = me * m + jnp.arange(m)
    normaliser, _ = _sums(own, other, there, scale, 0.0, similar)

    def block(state, other, others, step):
        best, chosen = state
        columns = (me + step) % size * m + jnp.arange(m)
        share = jnp.exp(scale * similar(own, other) - normaliser[:, None]) + FLOOR
        # The largest of logarithms with Gumbel's noise is a draw by the shares.
        score = jnp.log(share) + (0.0 if key is None else _gumbel(key, rows, columns))
        score = jnp.where(others & (rows[:, None] != columns), score, NEVER)
        top = score.max(axis=-1)
        chosen = jnp.where(top > best, columns[score.argmax(axis=-1)], chosen)
        return jnp.maximum(top, best), chosen

    start = (jnp.full(m, NEVER), jnp.full(m, -1))
    return _ring(block, jax.tree.map(_varying, start), other, there)[1]


def _gumbel(key: Array, rows: Int[Array, " m"], columns: Int[Array, " m"]) -> Float[Array, "m m"]:
    """Noise of each pair that is its own wherever the pair is looked at."""
    of = lambda row, column: jax.random.gumbel(  # noqa: E731
        jax.random.fold_in(jax.random.fold_in(key, row), column)
    )
    return jax.vmap(jax.vmap(of, (None, 0)), (0, None))(rows, columns)


def _right(images, texts, similar: Similar) -> Float[Array, " m"]:
    """Similarities of pairs that belong together."""
    one = lambda image, text: similar(image[None], text[None])[0, 0]  # noqa: E731
    return jax.vmap(one)(images, texts)


def _turned(similar: Similar) -> Similar:
    """The same with texts first."""
    return lambda texts, images: similar(images, texts).T


def _sums(
    own, other, there, scale, bias, similar: Similar
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Of each of our logits with all of the other side's: the log of the sum of exponentials, and
    the sum."""

    def block(state, other, others, step):
        top, total, plain = state
        found = scale * similar(own, other) + bias
        plain = plain + jnp.where(others, found, 0.0).sum(axis=-1)
        logits = jnp.where(others, found, NEVER)
        # Which number is taken off does not change the sum, so no gradient goes there.
        higher = jnp.maximum(top, jax.lax.stop_gradient(logits.max(axis=-1)))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(axis=-1)
        return higher, total, plain

    start = (jnp.full(len(own), NEVER), jnp.zeros(len(own)), jnp.zeros(len(own)))
    top, total, plain = _ring(block, jax.tree.map(_varying, start), other, there)
    return top + jnp.log(jnp.maximum(total, 1e-37)), plain


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
