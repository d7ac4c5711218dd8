"""Connectors as rows of fields: from patch features to visual tokens of the decoder's width."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Connector:
    """How patch features become visual tokens.

    Attributes:
      kind: "linear" and "mlp" keep one visual token per patch; "perceiver" pools them to `queries`.
      queries: visual tokens per image of a "perceiver"; unused otherwise.
      layers: linear layers of an "mlp" (LLaVA-1.5: 2), or blocks of a "perceiver".
      width: inner width of a "perceiver"; 0 = the decoder's width.
      hidden: hidden width of an "mlp", or of a perceiver block's feed-forward part; 0 = the output
        width for "mlp" and 4 * width for "perceiver".
      heads, kv_heads: attention heads of a "perceiver".
      norm_eps: of its norms.
      dropout: on visual tokens.
      dtype, remat: as for an encoder.
    """

    kind: str = "mlp"
    queries: int = 64
    layers: int = 2
    width: int = 0
    hidden: int = 0
    heads: int = 8
    kv_heads: int = 8
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = False

    CHOICES: ClassVar = {
        "kind": ("linear", "mlp", "perceiver"),
        "dtype": ("bfloat16", "float32"),
    }

    def visual_tokens(self, features: int) -> int:
        """Visual tokens of an image that gives so many features, Q."""
        return self.queries if self.kind == "perceiver" else features

    def problems(self, width: int) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or the decoder's width, each with what was expected."""
        if self.kind == "perceiver":
            width = self.width or width
            if width % self.heads:
                yield "heads", f"a divisor of the connector's width {width}"
            if self.heads % self.kv_heads:
                yield "heads", f"a multiple of its {self.kv_heads} key/value heads"
