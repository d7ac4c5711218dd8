"""The pictures of a sample: places in the sequence from their headers, pixels from what follows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL.Image import Image as PilImage

from vlm_jax.config import Augment, Config
from vlm_jax.data import images, layout
from vlm_jax.data.example import Image
from vlm_jax.data.images import Views
from vlm_jax.data.layout import Layout
from vlm_jax.data.pieces import Rendered
from vlm_jax.data.steps import Plan, Size


class Pictures:
    """The pictures of a sample: how each stands in the sequence, from its header, then its pixels.

    Args:
      given: encoded, or files.
      config: its encoders' resize modes decide how many images a picture is.
      augment: random changes; None = evaluation, which changes nothing.
      rng: where they are drawn from.
    """

    def __init__(
        self,
        given: Sequence[Image],
        config: Config,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
    ):
        self.config = config
        self._given, self._change = given, (augment, rng)
        self._alike = layout.alike(config.model)
        self._plans: dict[int, _Planned] = {}

    def layout(self, index: int) -> Layout:
        """How the picture stands in the sequence; one that cannot be used has a place too."""
        if self._alike:
            return self._alike.layout
        return layout.layout(self._plan(index).plans[0], self.config.model)

    def shown(self, rendered: Rendered) -> tuple[int, ...]:
        """Which pictures are shown, in reading order; one may be shown again."""
        found, spans, at = [], rendered.image_spans, 0
        while at < len(spans):
            found.append(spans[at].index)
            at += self.layout(spans[at].index).images
        return tuple(found)

    def sizes(self, shown: Sequence[int]) -> tuple[Size, ...]:
        """Of all images of the pictures that are shown, as the first encoder will see them."""
        if self._alike:  # nothing is planned: what is drawn for a picture is drawn when it is seen
            return self._alike.sizes * len(shown)
        return tuple(size for index in shown for size in self._plan(index).plans[0].sizes)

    def see(self, index: int) -> tuple[Views, ...]:
        """The views of the picture for each encoder.

        Raises:
          BadImage: it cannot be used.
        """
        made = self._plan(index)
        if made.header is None:
            raise made.bad
        picture = images.picture(made.header)
        if (picture.height, picture.width) != made.size:
            size = f"{picture.height} x {picture.width}"
            raise images.BadImage("corrupt", f"{size} pixels, not as the header says: {made.size}")
        return images.see(picture, made.plans, self.config.model.encoders, *self._change)

    def blank(self, index: int) -> tuple[Views, ...]:
        """Views of the same sizes without content."""
        dtype = images.dtype(self._change[0])
        return tuple(
            tuple(np.zeros((*size, 3), dtype) for size in plan.sizes)
            for plan in self._plan(index).plans
        )

    def forget(self) -> None:
        """Gives back the memory of what was decoded; `see` would make something else of it."""
        self._plans.clear()

    def _plan(self, index: int) -> "_Planned":
        """A picture without a readable header is planned as if it had the encoder's size."""
        if index in self._plans:
            return self._plans[index]
        encoders = self.config.model.encoders
        header, size, bad = None, encoders[0].size, None
        try:
            header = images.opened(self._at(index))
            size = images.size(header)
        except images.BadImage as error:
            bad = error
        found = _Planned(header, size, bad, images.plans(size, encoders, *self._change))
        self._plans[index] = found
        return found

    def _at(self, index: int) -> Image:
        if not 0 <= index < len(self._given):
            raise images.BadImage("no_such_image", f"{index} of {len(self._given)}")
        return self._given[index]


class _Planned(NamedTuple):
    header: PilImage | None
    size: Size
    bad: images.BadImage | None
    plans: tuple[Plan, ...]
