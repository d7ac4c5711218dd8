"""Q-Formers as rows of fields: learned queries that read an image, and perhaps an instruction."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.connectors import Work
from vlm_jax.presets.encoders import Encoder


@dataclasses.dataclass(frozen=True)
class QFormer:
    """BERT's layers over learned queries, some of which look at the image (BLIP-2).

    Attributes:
      queries: visual tokens per image.
      width, depth, mlp, heads: the usual sizes.
      every: every so many layers, beginning with the first, queries look at the image.
      vocab: rows of the table of the second text's tokens, which queries see and which have their
        own feed-forward parts (InstructBLIP); 0 = queries alone (BLIP-2).
      positions: rows of the table of its positions.
      activation: of the feed-forward parts.
      norm_eps: of every norm.
      dropout: on the output of each residual branch, on embeddings and on visual tokens.
      dtype, remat: as for an encoder.
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    mlp: int = 3072
    heads: int = 12
    every: int = 2
    vocab: int = 0
    positions: int = 512
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = False
    kind: str = "qformer"

    CHOICES: ClassVar = {
        "kind": ("qformer",),
        "activation": ("gelu", "gelu_tanh", "relu", "silu"),
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
        context = encoders[0].features[0] + self.queries
        sizes = self.width, self.mlp, self.heads, self.depth
        return Work(self.queries, context, *sizes, self.remat)

    def problems(self, width: int, encoders: tuple[Encoder, ...]) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or what encoders give, each with what was expected."""
        if self.width % self.heads:
            yield "heads", f"a divisor of the connector's width {self.width}"
        if self.depth % self.every:
            yield "depth", f"a multiple of every, {self.every}"
        if len(encoders) > 1:
            yield "kind", "another connector: a Q-Former looks at one encoder"


# Published Q-Formers: BLIP-2's, and InstructBLIP's with BERT's vocabulary and [DEC].
BLIP2 = QFormer()
INSTRUCTBLIP = QFormer(vocab=30_523)
