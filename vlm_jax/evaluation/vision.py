"""Visual tokens under fixed parameters, every picture encoded once.

An evaluation shows the same picture many times: under several kinds of question, to be answered, to
be scored, and as the wrong picture of another example. On small models the encoder is most of it.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax import config as configs
from vlm_jax.batch import Batch, Images
from vlm_jax.data import packing, slots
from vlm_jax.evaluation import devices
from vlm_jax.models import params as parameters
from vlm_jax.models.sva import Visual
from vlm_jax.models.vlm import tokens_of

MEMORY = 2 * 2**30  # bytes of visual tokens that are remembered

Seen = Float[np.ndarray, "... Q D"] | Visual
Texts = Int[Array, "B N S"] | None  # what is asked, where the connector reads it
Shown = tuple[tuple[Images, ...], Texts]  # every slot as a row of its own


class Vision:
    """Visual tokens of batches.

    Args:
      config: the run; without `data.images` there are none.
      params: flat parameters.
    """

    def __init__(self, config: configs.Config, params: Mapping[str, Array]):
        self.config, self.params = config, params
        self._known: dict[bytes, Seen] = {}

    def inputs(self, batch: Batch) -> tuple[Batch, Float[Array, "B N Q D"] | Visual]:
        """On the devices: the batch without its images, and their visual tokens."""
        text = batch._replace(images=None, extra_images=(), image_texts=None)
        return devices.place((text, self(batch)))

    def __call__(self, batch: Batch) -> Seen:
        """What `vlm.visual` gives for the batch's images; zeros where there is none.

        N is always `data.images_per_row`, so that only the length of a batch decides which program
        it takes; a model without images takes the same ones.
        """
        model, data = self.config.model, self.config.data
        grids = np.asarray(batch.images.grids)
        rows, count = grids.shape[:2]
        shape = rows, max(count, data.images_per_row)
        empty = lambda one: np.zeros((*shape, *one.shape[2:]), one.dtype)  # noqa: E731
        visual = jax.tree.map(empty, _of_one_image(model))
        if data.images and count:
            images = (batch.images, *batch.extra_images)
            texts = slots.flat(batch.image_texts)[:, None] if model.instructed else None
            shown = tuple(map(slots.apart, images, model.encoders)), texts
            places = list(zip(*np.nonzero(grids.any(axis=-1)), strict=True))
            names = {(row, n): slots.digest(shown[0], row * count + n, texts) for row, n in places}
            self._remember(shown, {names[row, n]: row * count + n for row, n in places})
            for place, name in names.items():
                _put(visual, place, self._known[name])
        return visual

    def _remember(self, shown: Shown, wanted: Mapping[bytes, int]) -> None:
        """Encodes the slots, by name, that are not known yet, in batches of one shape."""
        if sum(leaf.nbytes for leaf in jax.tree.leaves(self._known)) > MEMORY:
            self._known.clear()
        new = [item for item in wanted.items() if item[0] not in self._known]
        rows = self.config.eval.rows
        for start in range(0, len(new), rows):
            names, chosen = zip(*new[start : start + rows], strict=True)
            # The last batch is filled up by repeating its pictures.
            repeated = np.resize(chosen, rows)
            picked = jax.tree.map(lambda x, which=repeated: x[which], shown)
            visual = _compiled(self.config.model)(self.params, *devices.place(picked))
            visual = jax.tree.map(devices.fetch, visual)
            for i, name in enumerate(names):
                self._known[name] = jax.tree.map(lambda leaf, i=i: leaf[i, 0], visual)


@functools.cache
def _compiled(model: configs.Model):
    """What sees, compiled once for all parameters of a model."""

    def encode(params: Mapping[str, Array], images: tuple[Images, ...], texts: Texts):
        visual = parameters.build(model, params).visual(images, texts=texts)
        tokens = tokens_of(visual).astype(model.decoder.dtype)
        return visual._replace(tokens=tokens) if isinstance(visual, Visual) else tokens

    return jax.jit(encode)


@functools.cache
def _of_one_image(model: configs.Model):
    """Shapes and dtypes of what is seen in a row of one image."""
    sizes = {"rows": 1, "tokens": 1, "images": 1, "texts": 1}
    shape = packing.Shape(**sizes, visual_tokens=model.visual_tokens, encoders=model.encoders)
    batch = packing.assemble([], shape)
    images = (batch.images, *batch.extra_images)
    texts = batch.image_texts if model.instructed else None
    return jax.eval_shape(_compiled(model), parameters.abstract(model), images, texts)


def _put(whole: Seen, place: tuple[int, int], one: Seen) -> None:
    """Writes what is seen in one image to its row and slot, in place."""
    for leaf, known in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
        leaf[place] = known
