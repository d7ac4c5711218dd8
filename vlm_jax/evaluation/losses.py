"""Held-out losses per example, and the seeing gap.

The *seeing gap* is the loss of an answer when the images of another example stand in the prompt,
minus its loss with the right ones, in nats per answer token: how much of the answer the model read
off the picture. A model that ignores its images has a gap of 0.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax import config as configs
from vlm_jax.batch import Batch
from vlm_jax.data.packing import Info
from vlm_jax.evaluation import devices
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models import params as parameters
from vlm_jax.models.sva import Visual
from vlm_jax.models.vlm import target_weights

CHUNK = 64  # text positions whose logits exist at once


class Loss(NamedTuple):
    """Sums over the answer tokens of one example; `nats / tokens` is its loss."""

    nats: float
    tokens: float


def per_example(vision: Vision, batches: Iterable[tuple[Batch, Info]]) -> dict[str, Loss]:
    """The loss of every example by its key.

    Args:
      vision: the model: its config, parameters, and what they see.
      batches: (Batch, Info) pairs; `Info.documents` names the example of each segment.
    """
    losses = {}
    for batch, info in batches:
        compiled = _compiled(vision.config.model)
        nats = devices.fetch(compiled(vision.params, *vision.inputs(batch)))
        losses.update(_per_document(nats, batch, info.documents))
    return losses


def total(losses: Mapping[str, Loss]) -> float:
    """Nats per answer token over all examples."""
    sums = np.sum(list(losses.values()), axis=0)
    return float(sums[0] / sums[1])


def gap(right: Mapping[str, Loss], other: Mapping[str, Loss]) -> float:
    """The seeing gap over the examples that both have."""
    both = right.keys() & other.keys()
    return total({key: other[key] for key in both}) - total({key: right[key] for key in both})


@functools.cache
def _compiled(model: configs.Model):
    """One compiled function for all parameters of a model."""
    return jax.jit(functools.partial(token_nats, model))


def token_nats(
    model: configs.Model,
    params: Mapping[str, Array],
    batch: Batch,
    visual: Float[Array, "B N Q D"] | Visual,
) -> Float[Array, "B T-1"]:
    """Weighted negative log-likelihood of each next token; 0 where nothing is supervised."""
    vlm = parameters.build(model, params)
    hidden = vlm.hidden(batch, visual)[:, :-1]
    targets = batch.tokens[:, 1:]
    positions = targets.shape[1]
    chunk = min(CHUNK, positions)
    padding = -positions % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def nats(inputs: tuple[Array, Array]) -> Array:
        logits = vlm.unembed(inputs[0])
        chosen = jnp.take_along_axis(logits, inputs[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    # All logits of a batch at once would be the largest array of an evaluation.
    parts = jax.lax.map(nats, (chunks(hidden), chunks(targets)))
    rows = parts.swapaxes(0, 1).reshape(targets.shape[0], -1)[:, :positions]
    weights = target_weights(batch)[:, :-1]
    return jnp.where(weights > 0, rows * weights, 0.0)


def _per_document(
    nats: np.ndarray, batch: Batch, documents: Sequence[Sequence[tuple[str, str]]]
) -> dict[str, Loss]:
    """Sums over each packed document, by its key."""
    weights = np.asarray(target_weights(batch))[:, :-1]
    segments = np.asarray(batch.segments)[:, 1:]
    losses = {}
    for row, names in enumerate(documents):
        count = len(names) + 1
        sums = np.bincount(segments[row], nats[row], count)
        tokens = np.bincount(segments[row], weights[row], count)
        for segment, (key, _) in enumerate(names, start=1):
            # A sample that was rejected is not supervised and has no loss.
            if tokens[segment]:
                losses[key] = Loss(float(sums[segment]), float(tokens[segment]))
    return losses
