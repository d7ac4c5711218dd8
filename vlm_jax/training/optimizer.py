"""AdamW, Adafactor, Lion or Muon, clipped, with learning-rate and decay factors by path."""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from vlm_jax.config import Train
from vlm_jax.training import schedules
from vlm_jax.training.adaptation import Plan


def make(train: Train, plan: Plan) -> optax.GradientTransformation:
    """The optimizer over the trainable parameters by path.

    "adamw" is AdamW (Loshchilov and Hutter 2019), "lion" Lion (Chen et al. 2023). "adafactor" is
    Adafactor (Shazeer and Stern 2018) as big_vision's `scale_by_adafactor` has it (Zhai et al.
    2022): see `_adafactor`. "muon" orthogonalises the momentum of matrices
    and convolutions (Jordan et al. 2024), scaled to the size of Adam's updates (Liu et al. 2025,
    "Muon is scalable for LLM training"), and leaves the rest to AdamW at `adam_lr`.

    The gradient is clipped by its global norm first. Weight decay is decoupled: a step subtracts
    lr * factor * (update + weight_decay * decay_factor * parameter).
    """
    shapes = {path: plan.shapes[path] for path in plan.lr}
    matrices = _matrices(shapes) if train.optimizer == "muon" else {}
    rates = dict(plan.lr)
    if train.optimizer == "muon":
        other = train.adam_lr / train.lr
        rates = {path: lr * (1.0 if path in matrices else other) for path, lr in rates.items()}
    return optax.chain(
        optax.clip_by_global_norm(train.clip) if train.clip else optax.identity(),
        _direction(train, shapes, matrices),
        _add_decay(
            {path: train.weight_decay * factor for path, factor in plan.weight_decay.items()}
        ),
        _scale_each(rates),
        optax.scale_by_learning_rate(schedules.make(train)),
    )


# Which axes of a parameter are a matrix's inputs and outputs, layers' axis aside; what no row
# matches is no matrix of a linear map (embeddings, positions, queries, norms, biases).
MATRICES = (
    (r".*attention/(query|key|value)/kernel", (0,), (1, 2)),
    (r".*attention/out/kernel", (0, 1), (2,)),
    (r".*/kernel", (0,), (1,)),
    (r".*/conv", (0, 1, 2), (3,)),
)


def _matrices(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, MuonDimensionNumbers]:
    """The paths that Muon takes, with their axes."""
    found = {}
    for path in shapes:
        stacked = int("/stack/blocks/" in path)
        for pattern, inputs, outputs in MATRICES:
            if re.fullmatch(pattern, path):
                axes = [tuple(axis + stacked for axis in side) for side in (inputs, outputs)]
                found[path] = MuonDimensionNumbers(*axes)
                break
    return found


def _adam(train: Train) -> optax.GradientTransformation:
    return optax.scale_by_adam(train.b1, train.b2, train.eps, mu_dtype=jnp.float32)


def _lion(train: Train) -> optax.GradientTransformation:
    return optax.scale_by_lion(train.b1, train.b2, mu_dtype=jnp.float32)


def _adafactor(train: Train) -> optax.GradientTransformation:
    """Adafactor with a bfloat16 momentum of the updates, and neither clipping nor scale of its own.

    The second moment, factored over the two longest axes where both have 32 entries, is averaged
    with min(0.999, 1 - t^-0.8) in step t = 1, 2, ...; layers stacked on the first axis count as an
    axis, as in big_vision's scanned towers. big_vision's `clipping_threshold` is None by default.
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=lambda step, power: jnp.minimum(0.999, 1.0 - (step + 1.0) ** -power),
        ),
        optax.ema(train.b1, debias=False, accumulator_dtype=jnp.bfloat16)
        if train.b1
        else optax.identity(),
    )


DIRECTIONS = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion}


def _direction(
    train: Train,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    matrices: Mapping[str, MuonDimensionNumbers],
) -> optax.GradientTransformation:
    """Where a step goes, before decay and learning rate."""
    other = DIRECTIONS.get(train.optimizer, _adam)(train)
    if not matrices:
        return other
    numbers = {path: matrices.get(path, optax.MaskedNode()) for path in shapes}
    sizes = {path: _longer_side(shapes[path].shape, axes) for path, axes in matrices.items()}
    # An orthogonal matrix has entries of 1 / sqrt(longer side); 0.2 is the usual size of Adam's.
    muon = optax.chain(
        scale_by_muon(beta=0.95, mu_dtype=jnp.float32, weight_dimension_numbers=numbers),
        _scale_each({path: 0.2 * math.sqrt(size) for path, size in sizes.items()}),
    )
    labels = {path: "muon" if path in matrices else "adam" for path in shapes}
    return optax.partition({"muon": muon, "adam": other}, labels)


def _longer_side(shape: tuple[int, ...], axes: MuonDimensionNumbers) -> int:
    sides = (axes.reduction_axis, axes.output_axis)
    return max(math.prod(shape[axis] for axis in side) for side in sides)


def _add_decay(decay: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: {
            path: update + decay[path] * params[path] if decay[path] else update
            for path, update in updates.items()
        }
    )


def _scale_each(factors: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: {
            path: u * factors[path] if path in factors else u for path, u in updates.items()
        }
    )
