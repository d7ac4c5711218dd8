"""Spatial Vision Aggregators as rows of fields: a grid of queries, each looking at its own window
of every encoder's features."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.connectors import Work, feature_grid
from vlm_jax.presets.encoders import Encoder


@dataclasses.dataclass(frozen=True)
class Sva:
    """Cambrian's connector.

    Attributes:
      side: rows, and columns, of the grid of queries.
      sides: for each encoder, rows and columns that its features are resized to; multiples of
        `side`.
      width: inner width.
      layers: joint cross-attention layers.
      heads: of each.
      newline: whether a learned token stands behind every row.
      norm_eps: of every norm.
      dropout: on visual tokens.
      dtype, remat: as for an encoder.
    """

    sides: tuple[int, ...]
    side: int = 24
    width: int = 1024
    layers: int = 3
    heads: int = 16
    newline: bool = True
    norm_eps: float = 1e-5
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = False
    kind: str = "sva"

    CHOICES: ClassVar = {"kind": ("sva",), "dtype": ("bfloat16", "float32")}

    @property
    def windows(self) -> tuple[int, ...]:
        """Rows, and columns, of the window that a query sees of each encoder."""
        return tuple(side // self.side for side in self.sides)

    def output(self, width: int) -> int:
        """Width of visual tokens before a decoder of this width."""
        return width

    def visual_tokens(self, encoders: tuple[Encoder, ...]) -> int:
        """Visual tokens of an image, Q."""
        return self.side * (self.side + self.newline)

    def work(self, encoders: tuple[Encoder, ...], width: int) -> Work:
        """What decides its activations; the features of all windows are its keys and values."""
        context = sum(window**2 for window in self.windows)
        sizes = self.width, self.width, self.heads, self.layers
        return Work(self.side**2 * (1 + context), context, *sizes, self.remat)

    def problems(self, width: int, encoders: tuple[Encoder, ...]) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or what encoders give, each with what was expected."""
        if len(self.sides) != len(encoders):
            yield "sides", f"one for each of the {len(encoders)} encoders"
        if any(side % self.side or side < 1 for side in self.sides):
            yield "sides", f"multiples of the queries' side {self.side}"
        if self.width % self.heads:
            yield "heads", f"a divisor of the connector's width {self.width}"
        for encoder in encoders:
            if feature_grid(encoder) is None:
                yield "sides", "encoders whose features form grids"


@dataclasses.dataclass(frozen=True)
class Samplers:
    """Cambrian's samplers inside the decoder: its connector's block, once more, between layers.

    After some layers the hidden states of an image's visual tokens look at the windows that the
    connector's queries looked at; a newline token does not. Sizes are those of the connector.

    Attributes:
      start: layer, counted from 0, after which the first stands.
      stride: layers from one to the next.
      count: how many there are.
    """

    start: int
    stride: int
    count: int
    kind: str = "samplers"

    CHOICES: ClassVar = {"kind": ("samplers",)}

    def problems(self, depth: int) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or the decoder's depth, each with what was expected."""
        if self.stride < 1:
            yield "stride", "at least 1"
        if self.start < 0:
            yield "start", "at least 0"
        if self.count < 1 or self.start + (self.count - 1) * self.stride >= depth:
            yield "count", f"at least 1, and none after the last of the decoder's {depth} layers"


# Cambrian-1: SigLIP, CLIP and DINOv2 at 24 x 24 and ConvNeXt-XXL at 96 x 96.
CAMBRIAN = Sva(sides=(24, 24, 24, 96))

# Inside its decoders, by their size.
CAMBRIAN_SAMPLERS = {
    "8b": Samplers(start=0, stride=3, count=10),
    "13b": Samplers(start=0, stride=4, count=10),
    "34b": Samplers(start=0, stride=7, count=9),
}
