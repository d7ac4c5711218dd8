"""Mapping networks as rows of fields: one feature of a whole image to several visual tokens."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.connectors import Work
from vlm_jax.presets.encoders import Encoder


@dataclasses.dataclass(frozen=True)
class Mapping:
    """ClipCap's mappers (Mokady et al. 2021).

    Attributes:
      form: "mlp", two layers with tanh between them; or "transformer", whose learned queries look
        at `seeds` tokens made of the feature.
      queries: visual tokens per image.
      seeds, layers, heads, mlp: of a "transformer"; mlp 0 = twice the decoder's width.
      norm_eps: of its norms.
      dropout: on visual tokens.
      dtype, remat: as for an encoder.
    """

    form: str = "mlp"
    queries: int = 10
    seeds: int = 10
    layers: int = 8
    heads: int = 8
    mlp: int = 0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = False
    kind: str = "mapping"

    CHOICES: ClassVar = {
        "kind": ("mapping",),
        "form": ("mlp", "transformer"),
        "dtype": ("bfloat16", "float32"),
    }

    def output(self, width: int) -> int:
        """Width of visual tokens before a decoder of this width."""
        return width

    def visual_tokens(self, encoders: tuple[Encoder, ...]) -> int:
        """Visual tokens of an image, Q."""
        return self.queries

    def work(self, encoders: tuple[Encoder, ...], width: int) -> Work:
        """What decides its activations."""
        if self.form == "mlp":
            return Work(self.queries, 0, width, width, 1, 1, False)
        tokens = self.seeds + self.queries
        sizes = width, self.mlp or 2 * width, self.heads, self.layers
        return Work(tokens, tokens, *sizes, self.remat)

    def problems(self, width: int, encoders: tuple[Encoder, ...]) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, the decoder's width or what encoders give, each with what
        was expected."""
        if len(encoders) > 1 or encoders[0].features[0] != 1:
            yield "kind", "another connector, or one encoder that gives one feature of an image"
        if self.form == "transformer" and width % self.heads:
            yield "heads", f"a divisor of the decoder's width {width}"
