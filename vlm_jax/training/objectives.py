"""What is minimised, and the sums that metrics are made of.

Axes: B rows, T text positions, V vocabulary, N images, Q visual tokens, S tokens of an image text.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Batch
from vlm_jax.config import Config, Train
from vlm_jax.models.layers import Features
from vlm_jax.models.matching import Matching
from vlm_jax.models.vlm import VLM, target_weights, tokens_of
from vlm_jax.training import masking, matching, pairs

Sums = dict[str, Array]

# Far from the small numbers that dropout's keys are split into.
CAPTIONED_KEY = 0x436F4361
NEVER = -1e30  # not infinity: an image without any other would give gradients of NaN


def totals(batch: Batch) -> Sums:
    """What the losses of a batch are divided by; no model is needed."""
    return {
        "weight": jnp.sum(target_weights(batch)),
        "words_images": jnp.sum(jnp.any(batch.image_texts > 0, axis=-1)),
    }


def losses(
    vlm: VLM,
    batch: Batch,
    config: Config,
    dropout: Array | None = None,
    whole: Sums | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """The scalar to minimise over a global batch, and its metrics as sums.

    The loss is the sum over the supervised tokens of the whole batch divided by their weight, so it
    does not depend on how rows are spread over devices; of a model of pairs it is `paired`.
    Metrics: `nll` (without smoothing), `weight` and `correct` over supervised tokens; `tokens`
    (real ones), `positions` (with padding) and `images`; `patches` (real ones) and `patch_room`
    where images share a row's; `z` with z-loss; with the auxiliary losses `words_nll` over
    `words_images`, `contrastive_nll` over `contrastive_images` and `pairs_nll` over `pairs_images`.

    Args:
      vlm: the model over its parameters.
      batch: a global batch.
      config: read for `data.images`, the smoothing and the weights of the auxiliary losses.
      dropout: PRNG key; None = evaluation.
      whole: `totals` of the batch that these rows are a part of, whose losses add up to its own;
        those that compare all images cannot be had in parts.
    """
    if config.model.pair:
        return paired(vlm, batch, config.train, dropout)
    whole = whole or {}
    keys = (None, None) if dropout is None else jax.random.split(dropout)
    # Without images no row looks at a visual token: the encoder need not run at all.
    visual = features = None
    if config.data.images:
        of_images = (None, None) if dropout is None else jax.random.split(keys[0])
        features = vlm.features((batch.images, *batch.extra_images), of_images[0])
        # The images' own texts are answers: only what is asked may be read.
        texts = batch.image_texts if config.model.instructed else None
        visual = vlm.connected(features, batch.images.grids.shape[:2], of_images[1], texts)
    train, read = config.train, batch
    if train.parallel and dropout is not None:
        read = masking.drawn(batch, train.parallel, config.model.decoder.tokens, dropout)
    logits = vlm.unembed(vlm.hidden(read, visual, keys[1], train.neftune))
    parts = train.label_smoothing, whole.get("weight"), train.z_loss
    loss, sums = next_token(logits, batch, *parts)
    sums |= {
        "tokens": jnp.sum(batch.segments > 0),
        "positions": jnp.asarray(batch.segments.size),
        "images": jnp.sum(batch.images.grids[..., 0] > 0),
    }
    if batch.images.starts is not None:
        owner = batch.images.patch_images
        sums |= {"patches": jnp.sum(owner >= 0), "patch_room": jnp.asarray(owner.size)}
    tokens = None if visual is None else tokens_of(visual)
    if config.train.contrastive and tokens is not None:
        apart, apart_sums = contrastive(tokens, batch.image_texts, config.train.temperature)
        loss, sums = loss + config.train.contrastive * apart, sums | apart_sums
    if config.train.bag_of_words and tokens is not None:
        words, words_sums = bag_of_words(vlm, tokens, batch.image_texts, whole.get("words_images"))
        loss, sums = loss + config.train.bag_of_words * words, sums | words_sums
    if train.pairs_weight and config.model.text is not None and features is not None:
        alike, alike_sums = captioned(vlm, features[0], batch, train.pairs, dropout)
        loss, sums = loss + train.pairs_weight * alike, sums | alike_sums
    return loss, sums


def captioned(
    vlm: VLM, features: Features, batch: Batch, kind: str, dropout: Array | None = None
) -> tuple[Float[Array, ""], Sums]:
    """Whether images and their own texts belong together, beside a decoder that tells them (CoCa).

    Args:
      vlm: a model with a text tower.
      features: what its first encoder saw.
      batch: of whose images those that have a text are compared.
      kind: a row of `pairs.LOSSES`.
      dropout: PRNG key; None = evaluation.
    """
    texts = batch.image_texts.reshape(-1, batch.image_texts.shape[-1])
    there = jnp.any(texts > 0, axis=-1) & (batch.images.grids[..., 0] > 0).reshape(-1)
    key = None if dropout is None else jax.random.fold_in(dropout, CAPTIONED_KEY)
    sides = vlm.text.images(features), vlm.text(texts, vlm.text.there(texts), key), there
    loss = pairs.spread(pairs.LOSSES[kind])(*sides, *vlm.text.scale_and_bias())
    count = jnp.sum(there)
    correct = pairs.spread(pairs.hits, scalars=0)(*sides)
    return loss, {"pairs_nll": loss * count, "pairs_images": count, "pairs_correct": correct}


def paired(
    vlm: VLM, batch: Batch, train: Train, dropout: Array | None = None
) -> tuple[Float[Array, ""], Sums]:
    """Whether images and texts belong together: `belonging`, or a Q-Former's `matching.losses`."""
    if isinstance(vlm.text, Matching):
        loss, sums = matching.losses(vlm, batch, train.label_smoothing, next_token, dropout)
    else:
        loss, sums = belonging(vlm, batch, train.pairs, dropout)
    sums |= {
        "tokens": jnp.sum(batch.segments > 0),
        "positions": jnp.asarray(batch.segments.size),
        "images": jnp.sum(batch.images.grids[..., 0] > 0),
    }
    return loss, sums


def belonging(
    vlm: VLM, batch: Batch, kind: str, dropout: Array | None = None
) -> tuple[Float[Array, ""], Sums]:
    """How well embeddings say which image and which text of the global batch belong together.

    Every row is a pair, and one that was rejected is not there. In the sums `nll` is the loss of
    all pairs, `weight` counts them, and `correct` those whose image finds its own text nearest.

    Args:
      vlm: a model of pairs.
      batch: rows of one image and one text each.
      kind: a row of `pairs.LOSSES`.
      dropout: PRNG key; None = evaluation.
    """
    read = vlm.text.there(batch.segments)
    images, texts = vlm.embeddings(batch.images, batch.tokens, read, dropout)
    there = (batch.images.grids[:, 0, 0] > 0) & jnp.any(batch.loss_weights > 0, axis=1)
    loss = pairs.spread(pairs.LOSSES[kind])(images, texts, there, *vlm.text.scale_and_bias())
    count = jnp.sum(there).astype(jnp.float32)
    sums = {
        "nll": loss * count,
        "weight": count,
        "correct": pairs.spread(pairs.hits, scalars=0)(images, texts, there),
    }
    return loss, sums


def next_token(
    logits: Float[Array, "B T V"],
    batch: Batch,
    smoothing: float = 0.0,
    whole: Float[Array, ""] | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """Cross-entropy of the token after each position, within its document, in float32.

    It is divided by the weight of the batch, or by `whole`. So is `z_loss` times the squared log of
    the softmax's normaliser, which keeps that near zero (Chowdhery et al. 2022, PaLM, section 5).
    """
    target = jnp.roll(batch.tokens, -1, axis=1)
    weight = target_weights(batch)
    top = jnp.max(logits, axis=-1)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: it fuses, and it splits over a sharded vocabulary.
    chosen = jnp.arange(logits.shape[-1]) == target[..., None]
    target_logit = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    nll = normaliser - target_logit
    spread = normaliser - jnp.mean(logits, axis=-1) if smoothing else nll
    smoothed = (1.0 - smoothing) * nll + smoothing * spread
    total = jnp.sum(weight)
    sums = {
        "nll": jnp.sum(weight * nll),
        "weight": total,
        "correct": jnp.sum(weight * (target_logit >= top)),
    }
    objective = jnp.sum(weight * smoothed)
    if z_loss:
        sums["z"] = jnp.sum(weight * jnp.square(normaliser))
        objective = objective + z_loss * sums["z"]
    divisor = total if whole is None else whole
    return objective / jnp.maximum(divisor, 1.0), sums


def bag_of_words(
    vlm: VLM,
    visual: Float[Array, "B N Q D"],
    texts: Int[Array, "B N S"],
    whole: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """How well the mean visual token of an image names the words of its text, in any order.

    Softmax cross-entropy of the decoder's own output matrix against the uniform distribution over
    the distinct tokens of the text (Joulin et al. 2016, "Learning visual features from large weakly
    supervised data"), averaged over the images that have one, or divided by `whole`. It has no
    parameters of its own.
    """
    logits = vlm.unembed(visual.mean(axis=2))
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    wanted = distinct(texts)
    words = wanted.sum(axis=-1)
    picked = jnp.take_along_axis(log_probs, texts, axis=-1)
    per_image = -jnp.sum(jnp.where(wanted, picked, 0.0), axis=-1) / jnp.maximum(words, 1)
    total, images = jnp.sum(per_image), jnp.sum(words > 0)
    divisor = jnp.maximum(images if whole is None else whole, 1)
    return total / divisor, {"words_nll": total, "words_images": images}


def contrastive(
    visual: Float[Array, "B N Q D"], texts: Int[Array, "B N S"], temperature: float
) -> tuple[Float[Array, ""], Sums]:
    """How well the mean visual token of an image tells images of the same text from all others.

    The supervised contrastive loss L_out (Khosla et al. 2020, equation 2) over all images of the
    global batch that have a text, averaged over those for which another one has the same text.
    """
    texts = texts.reshape(-1, texts.shape[-1])
    features = visual.mean(axis=2).reshape(len(texts), -1).astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-12)
    similarity = jnp.matmul(features / length, (features / length).T) / temperature
    there = jnp.any(texts > 0, axis=-1)
    others = there[:, None] & there[None, :] & ~jnp.eye(len(texts), dtype=bool)
    same = others & jnp.all(texts[:, None] == texts[None, :], axis=-1)
    log_probs = jax.nn.log_softmax(jnp.where(others, similarity, NEVER), axis=-1)
    positives = same.sum(axis=-1)
    per_image = -jnp.sum(jnp.where(same, log_probs, 0.0), axis=-1) / jnp.maximum(positives, 1)
    total, images = jnp.sum(per_image), jnp.sum(positives > 0)
    loss = total / jnp.maximum(images, 1)
    return loss, {"contrastive_nll": total, "contrastive_images": images}


def softmax_pairs(logits: Float[Array, "n n"]) -> Float[Array, ""]:
    """CLIP's loss of n images with n texts, of which the i-th belong together.

    The mean of two cross-entropies: which text is an image's, and which image a text's (Radford et
    al. 2021, figure 3).
    """
    log_probs = (jax.nn.log_softmax(logits, axis=axis) for axis in (0, 1))
    return -sum(jnp.mean(jnp.diagonal(x)) for x in log_probs) / 2


def sigmoid_pairs(logits: Float[Array, "n n"]) -> Float[Array, ""]:
    """SigLIP's loss of n images with n texts, of which the i-th belong together.

    Whether they do is asked of every pair on its own; the sum over all pairs is divided by n (Zhai
    et al. 2023, algorithm 1).
    """
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


def distinct(texts: Int[Array, "... S"]) -> Bool[Array, "... S"]:
    """True at the first place of each token of a text, False at its repeats and at padding (0)."""
    same = texts[..., :, None] == texts[..., None, :]
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)
    return (texts > 0) & ~jnp.any(same & earlier, axis=-1)
