"""Cross-attention fusion as rows of fields: gated blocks between the layers of a decoder."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """Gated blocks by which text looks at images (Alayrac et al. 2022); defaults are Idefics1's.

    Each has an attention and a feed-forward part, x + tanh(gate) * part(norm(x)). A token looks at
    the visual tokens of one image, `Batch.image_index`; where there is none, attention adds zero.

    Attributes:
      mlp: hidden width of the feed-forward part; 0 = none, attention alone (CapPa, CoCa).
      heads, kv_heads, head_dim: query heads, key/value heads, and their dimension.
      every: layers of the decoder from one block to the next.
      start: layer before which the first block stands (OpenFlamingo: every - 1).
      count: how many blocks there are; 0 = as many as the decoder has room for.
      width: of visual tokens; 0 = the decoder's.
      norm: as in a decoder, of both parts and of queries and keys.
      norm_eps: of every norm.
      activation, gated: of the feed-forward part.
      qk_norm: whether queries and keys are normed per head.
      gate: "number", or "vector" for one per channel, zero at the start; "none" adds the parts as
        they are.
      both: whether visual tokens stand in the sequence too; otherwise an image takes one position
        there, that of its placeholder.
      dropout: on the output of each part.
    """

    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    every: int = 4
    start: int = 0
    count: int = 0
    width: int = 0
    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    qk_norm: bool = False
    gate: str = "number"
    both: bool = False
    dropout: float = 0.0
    kind: str = "cross_attention"

    CHOICES: ClassVar = {
        "kind": ("cross_attention",),
        "norm": ("rms", "layer"),
        "activation": ("silu", "gelu", "gelu_tanh", "relu"),
        "gate": ("number", "vector", "none"),
    }

    def places(self, depth: int) -> tuple[int, ...]:
        """The layers, of a decoder that has so many, before which a block stands."""
        if self.count:
            return tuple(self.start + k * self.every for k in range(self.count))
        return tuple(range(self.start, depth, self.every))

    def problems(self, width: int, depth: int) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or the decoder, each with what was expected."""
        if self.heads % self.kv_heads:
            yield "heads", f"a multiple of its {self.kv_heads} key/value heads"
        if self.every < 1:
            yield "every", "at least 1"
        elif not 0 <= self.start < depth:
            yield "start", f"one of the decoder's {depth} layers"
        elif self.places(depth)[-1] >= depth:
            yield "count", f"no block after the last of the decoder's {depth} layers"
        if self.both and self.width not in (0, width):
            yield "width", f"the decoder's width {width}, as visual tokens stand in the sequence"


def _flamingo(width: int, every: int) -> CrossAttention:
    """OpenFlamingo's blocks (Awadalla et al. 2023) in a decoder of this width."""
    return CrossAttention(
        4 * width,
        heads=8,
        kv_heads=8,
        head_dim=64,
        every=every,
        start=every - 1,
        width=1024,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated=False,
    )


# Published systems; the decoders are "llama1-7b", "redpajama-3b" and "mpt-7b".
SYSTEMS = {
    "idefics-9b": CrossAttention(11_008, 32, 32, 128, every=4, width=1280, qk_norm=True),
    "open-flamingo-4b": _flamingo(2560, every=2),
    "open-flamingo-9b": _flamingo(4096, every=4),
}


def cross_attention(name: str, **fields) -> CrossAttention:
    """The blocks of a published system by name, e.g. `cross_attention("idefics-9b", start=1)`.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in SYSTEMS:
        raise ValueError(f"unknown fusion {name!r}: expected one of {', '.join(SYSTEMS)}")
    return dataclasses.replace(SYSTEMS[name], **fields)
