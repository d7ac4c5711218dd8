"""The three losses of BLIP-2's first stage: a Q-Former that compares, matches and tells.

Images and texts of the global batch are compared in a ring over the mesh (`pairs.py`), and hard
negatives are drawn from all of it, as LAVIS does from what it gathers. Unlike there, embeddings of
other devices have gradients too, and every loss is a mean over the global batch: the number of
devices changes nothing.

n counts pairs, S the tokens of a text.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Batch
from vlm_jax.models.layers import Features
from vlm_jax.models.vlm import VLM, seen_by
from vlm_jax.training import pairs

Sums = dict[str, Array]
Negatives = tuple[Int[Array, " n"], Int[Array, " n"]]


def draw(
    images: Float[Array, "n Q E"],
    texts: Float[Array, "n E"],
    there: Bool[Array, " n"],
    scale: Float[Array, ""],
    key: Array | None,
) -> Negatives:
    """An image for each text and a text for each image, see `pairs.negatives`."""
    part = functools.partial(pairs.negatives, key=key)
    out = P(pairs.AXES)
    return pairs.spread(part, scalars=1, out=(out, out))(images, texts, there, scale)


def losses(
    vlm: VLM,
    batch: Batch,
    smoothing: float,
    next_token: Callable[..., tuple[Float[Array, ""], Sums]],
    dropout: Array | None = None,
    draw: Callable[..., Negatives] = draw,
) -> tuple[Float[Array, ""], Sums]:
    """The sum of the three, and metrics as sums.

    `nll` is the loss of comparing over the pairs, which `weight` counts, and `correct` those whose
    image finds its own text nearest; `matching_nll` over `matching_pairs`, and `told_nll` over the
    `told_tokens`.

    Args:
      vlm: an encoder, a Q-Former and its heads.
      batch: rows of one image and one text each; of a pair that was rejected nothing is supervised.
      smoothing: of the answers in comparing and of the tokens (LAVIS: 0.1 of both).
      next_token: `objectives.next_token`.
      dropout: PRNG key, by which negatives are drawn too; None = evaluation, with the likeliest.
      draw: which negatives are matched.
    """
    keys = (None,) * 4 if dropout is None else jax.random.split(dropout, 4)
    heads, there = vlm.text, batch.segments > 0
    paired = (batch.images.grids[:, 0, 0] > 0) & jnp.any(batch.loss_weights > 0, axis=1)
    seen = seen_by(vlm.encoder, batch.images, keys[0])
    read = heads.read(vlm.connector, seen, batch.tokens, there, keys[1], generate=True)
    scale = heads.scale()
    alike, sums = compared(read.images, read.texts, paired, scale, smoothing)
    negatives = draw(read.images, read.texts, paired, scale, keys[2])
    matches, matched_sums = matched(vlm, seen, batch.tokens, there, paired, negatives, keys[3])
    logits = heads.unembed(vlm.connector, read.generated)
    told, told_sums = next_token(logits, batch, smoothing)
    sums |= matched_sums
    sums |= {"told_nll": told_sums["nll"], "told_tokens": told_sums["weight"]}
    return alike + matches + told, sums


def compared(
    images: Float[Array, "n Q E"],
    texts: Float[Array, "n E"],
    there: Bool[Array, " n"],
    scale: Float[Array, ""],
    smoothing: float,
) -> tuple[Float[Array, ""], Sums]:
    """Which text is an image's, by the nearest of its queries, and which image a text's."""
    loss = functools.partial(pairs.softmax, similar=pairs.nearest, smoothing=smoothing)
    hits = functools.partial(pairs.hits, similar=pairs.nearest)
    loss = pairs.spread(loss)(images, texts, there, scale, jnp.zeros(()))
    count = jnp.sum(there).astype(jnp.float32)
    correct = pairs.spread(hits, scalars=0)(images, texts, there)
    return loss, {"nll": loss * count, "weight": count, "correct": correct}


def matched(
    vlm: VLM,
    seen: Features,
    tokens: Int[Array, "n S"],
    there: Bool[Array, "n S"],
    paired: Bool[Array, " n"],
    negatives: Negatives,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Whether an image and a text belong together: each pair, each text with an image that is like
    its own, and each image with a text that is like its own."""
    image, text = negatives
    take = pairs.spread(pairs.taken, scalars=0, rows=2, out=P(pairs.AXES))
    other = jax.tree.map(lambda x: take(x, image), seen)
    other_tokens, other_there = take(tokens, text), take(there, text)
    images = jax.tree.map(_beside, seen, other, seen)
    texts, marks = _beside(tokens, tokens, other_tokens), _beside(there, there, other_there)
    logits = vlm.text.matches(vlm.connector, images, texts, marks, key)
    weight = _beside(paired, paired & (image >= 0), paired & (text >= 0)).astype(jnp.float32)
    answer = jnp.arange(len(weight)) % 3 == 0
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.sum(weight * jnp.where(answer, log_probs[:, 1], log_probs[:, 0]))
    count = jnp.sum(weight)
    right = jnp.sum(weight * ((logits[:, 1] > logits[:, 0]) == answer))
    sums = {"matching_nll": nll, "matching_pairs": count, "matching_correct": right}
    return nll / jnp.maximum(count, 1.0), sums


def _beside(*parts: Array) -> Array:
    """Arrays [n, ...] as one, the rows of a pair side by side: each stays on its device."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
