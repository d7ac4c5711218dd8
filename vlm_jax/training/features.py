"""Features of frozen encoders, made once for a picture that comes again.

A frozen encoder gives the same features of the same pixels at every epoch. They are known by a
digest of the pixels, so that whatever the data does, a step reads what the encoder would have made.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Config
from vlm_jax.data import slots
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.models.layers import Features
from vlm_jax.parallel import sharding
from vlm_jax.training import step as steps
from vlm_jax.training.adaptation import Plan

GIB = 2**30
ENCODERS = ("encoder/", "extra_encoders/")

Seen = tuple[Features, ...]


def check(config: Config, plan: Plan) -> None:
    """Whether features can be remembered in this run.

    Raises:
      ConfigError: something trains in an encoder.
    """
    trained = next((path for path in plan.lr if path.startswith(ENCODERS)), None)
    if config.train.feature_cache and trained:
        raise ConfigError(
            f"config.train.feature_cache is {config.train.feature_cache} and {trained} trains; "
            "expected 0, or encoders that config.adaptation freezes"
        )


def of(config: Config, mesh: Mesh) -> Callable[[Batch, Mapping[str, Array]], Batch]:
    """What batches and frozen parameters go through: a `Cache`, or nothing if none is asked for."""
    if config.train.feature_cache and config.data.images:
        return Cache(config, mesh)
    return lambda batch, frozen: batch


class Cache:
    """Puts features into batches in place of pixels.

    Once its memory is full, pictures that are new are encoded whenever they come: with epochs in
    random order it makes no difference which ones are kept.

    Args:
      config: the run; `train.feature_cache` is its memory, GiB of the host.
      mesh: the run's devices.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._encoders, self._mesh = config.model.encoders, mesh
        self._known: dict[bytes, Seen] = {}
        self._left = config.train.feature_cache * GIB
        names = ("connector", "decoder", "fusion", "samplers", "text")
        model = dataclasses.replace(config.model, **dict.fromkeys(names))
        self._encode = jax.jit(
            lambda frozen, images: params.build(model, frozen).features(images),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, batch: Batch, frozen: Mapping[str, Array]) -> Batch:
        """The batch with features of its images; those of empty slots are zeros.

        Args:
          batch: on the host.
          frozen: parameters by path, the encoders' among them, the same ones at every call.
        """
        images = (batch.images, *batch.extra_images)
        frozen = {path: leaf for path, leaf in frozen.items() if path.startswith(ENCODERS)}
        every = tuple(map(slots.apart, images, self._encoders))
        there = np.flatnonzero(batch.images.grids.any(axis=-1))
        found = self._found(every, [slots.digest(every, slot) for slot in there], there, frozen)
        rows, count = batch.images.grids.shape[:2]
        shapes = jax.eval_shape(self._encode, frozen, every)
        whole = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        for slot, seen in zip(there, found, strict=True):
            jax.tree.map(lambda leaf, one, slot=slot: _put(leaf, slot, one), whole, seen)
        whole = jax.tree.map(lambda x: x.reshape(rows, count, *x.shape[1:]), whole)
        first, *others = map(_shown, images, whole)
        return batch._replace(images=first, extra_images=tuple(others))

    def _found(
        self,
        every: tuple[Images, ...],
        names: Sequence[bytes],
        there: np.ndarray,
        frozen: Mapping[str, Array],
    ) -> list[Seen]:
        """Features of the slots that are there, new ones made at once and remembered."""
        new = {n: slot for n, slot in zip(names, there, strict=True) if n not in self._known}
        if not new:
            return [self._known[name] for name in names]
        # Always as many, so that there is one program: the rest repeats them.
        chosen = np.resize(list(new.values()), len(every[0].grids))
        shown = steps.place(jax.tree.map(lambda x: x[chosen], every), self._mesh)
        with jax.set_mesh(self._mesh):
            made = jax.device_get(self._encode(frozen, shown))
        fresh = {n: jax.tree.map(lambda x, i=i: x[i].copy(), made) for i, n in enumerate(new)}
        for name, seen in fresh.items():
            self._remember(name, seen)
        return [fresh.get(name) or self._known[name] for name in names]

    def _remember(self, name: bytes, seen: Seen) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(seen))
        if size <= self._left:
            self._left -= size
            self._known[name] = seen


def _put(whole: np.ndarray, slot: int, one: np.ndarray) -> None:
    whole[slot] = one


def _shown(images: Images, seen: Features) -> Images:
    return Images(images.grids, features=seen.x, feature_mask=seen.mask)
