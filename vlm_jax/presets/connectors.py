"""Connectors as rows of fields: from patch features to visual tokens of the decoder's width."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from vlm_jax.presets.encoders import Encoder

Grid = tuple[int, int]


class Work(NamedTuple):
    """What of a connector decides its activations for one image (see `training.memory`).

    Attributes:
      length: tokens that its blocks work on.
      context: tokens each of them looks at.
      width, mlp, heads, depth: of its blocks.
      remat: whether its blocks recompute their activations.
    """

    length: int
    context: int
    width: int
    mlp: int
    heads: int
    depth: int
    remat: bool


def feature_grid(encoder: Encoder) -> Grid | None:
    """Rows and columns of an encoder's features; None where they form no grid.

    A class token or pooling leaves another number of features than the grid has places.
    """
    return encoder.grid if math.prod(encoder.grid) == encoder.features[0] else None


@dataclasses.dataclass(frozen=True)
class Connector:
    """How patch features become visual tokens.

    The features of several encoders are brought to one grid and joined along their channels; a
    pooling may make fewer of them; then they are projected (`none`, `linear`, `mlp`), flattened
    (`flat`) or looked at by learned queries (`perceiver`).

    Attributes:
      kind: "none" (the features as they are), "linear" and "mlp" keep one visual token per feature;
        "flat" makes `queries` of them by one linear layer over all features of an image;
        "perceiver" pools them to `queries` by attention.
      queries: visual tokens per image of a "perceiver" or "flat"; unused otherwise.
      layers: linear layers of an "mlp" (LLaVA-1.5: 2), or blocks of a "perceiver".
      width: inner width of a "perceiver"; 0 = the output width.
      hidden: hidden width of an "mlp", or one for each but the last of its layers; or of a
        perceiver block's feed-forward part; 0 = the output width for "mlp" and 4 * width for
        "perceiver".
      heads, kv_heads: attention heads of a "perceiver".
      norm_eps: of its norms.
      dropout: on visual tokens.
      dtype, remat: as for an encoder.
      out: width of visual tokens; 0 = the decoder's (Flamingo's keep the encoder's).
      resize: grid that the features of all encoders are brought to, bilinearly; (0, 0) = the first
        encoder's.
      pool: what makes fewer features before the projection: "shuffle" gathers squares of
        `factor` x `factor` into channels (Idefics3), "adjacent" `factor` features in a row
        (MiniGPT-v2), "average" averages to `grid` (Gemma 3).
      factor, grid: of `pool`.
      input_norm: norm of the features before a projection, "none" or as `norm`.
      activation: between the layers of an "mlp".
      bias: of the layers of a projection.
      out_scale: what the initial weights of a projection's last layer are multiplied by. Below 1,
        visual tokens start as small as a pretrained decoder's embeddings.
      newline: "row" puts a learned token behind every row of the grid (Cambrian), "token" one
        behind all others, to stand where the host wants it (LLaVA-NeXT, mPLUG-Owl).
      embed: what brings features to the width of a "perceiver": "linear", "none", or "swiglu" with
        `embed_hidden` (Idefics2), all without biases.
      head_dim: of a "perceiver"; 0 = width // heads.
      norm: norms of a "perceiver".
      qk_norm: whether its queries and keys are normed per head.
      mlp_activation, gated: of its feed-forward parts.
      mlp_norm_eps: of a LayerNorm inside its feed-forward parts; 0 = none (mPLUG-Owl has one).
      block_bias: whether its linear layers but for `embed` have biases.
      normed_residual: whether its attention is added to the normed latents (mPLUG-Owl).
      final_norm: whether a norm follows its last block.
    """

    kind: str = "mlp"
    queries: int = 64
    layers: int = 2
    width: int = 0
    hidden: int | tuple[int, ...] = 0
    heads: int = 8
    kv_heads: int = 8
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: bool = False
    out: int = 0
    resize: tuple[int, int] = (0, 0)
    pool: str = "none"
    factor: int = 2
    grid: tuple[int, int] = (0, 0)
    input_norm: str = "none"
    activation: str = "gelu"
    bias: bool = True
    out_scale: float = 1.0
    newline: str = "none"
    embed: str = "linear"
    embed_hidden: int = 0
    head_dim: int = 0
    norm: str = "rms"
    qk_norm: bool = False
    mlp_activation: str = "silu"
    gated: bool = True
    mlp_norm_eps: float = 0.0
    block_bias: bool = False
    normed_residual: bool = False
    final_norm: bool = True

    CHOICES: ClassVar = {
        "kind": ("none", "linear", "mlp", "flat", "perceiver"),
        "dtype": ("bfloat16", "float32"),
        "pool": ("none", "shuffle", "adjacent", "average"),
        "input_norm": ("none", "rms", "rms_plus_one", "layer"),
        "activation": ("gelu", "gelu_tanh", "silu", "relu"),
        "newline": ("none", "row", "token"),
        "embed": ("linear", "none", "swiglu"),
        "norm": ("rms", "layer"),
        "mlp_activation": ("silu", "gelu", "gelu_tanh", "relu"),
    }

    def output(self, width: int) -> int:
        """Width of visual tokens before a decoder of this width."""
        return self.out or width

    def sizes(self, features: int, width: int) -> tuple[int, ...]:
        """Widths from the features through the layers of a projection to the output."""
        if self.kind == "none":
            return (features,)
        layers = self.layers if self.kind == "mlp" else 1
        hidden = self.hidden
        if isinstance(hidden, int):
            hidden = (hidden or self.output(width),) * (layers - 1)
        return (features, *hidden, self.output(width))

    def merged_grid(self, encoders: tuple[Encoder, ...]) -> Grid | None:
        """The grid that the features of all encoders are brought to; None where there is none."""
        return self.resize if any(self.resize) else feature_grid(encoders[0])

    def pooled(self, encoders: tuple[Encoder, ...]) -> tuple[Grid | None, int, int]:
        """Grid (or None), number and width of the features after `resize` and `pool`."""
        grid, width = self.merged_grid(encoders), sum(e.features[1] for e in encoders)
        count = encoders[0].features[0] if grid is None else math.prod(grid)
        if self.pool == "adjacent":
            return None, count // self.factor, width * self.factor
        if self.pool == "average":
            grid = self.grid
        if self.pool == "shuffle" and grid is not None:
            grid = grid[0] // self.factor, grid[1] // self.factor
            width *= self.factor**2
        return grid, count if grid is None else math.prod(grid), width

    def visual_tokens(self, encoders: tuple[Encoder, ...]) -> int:
        """Visual tokens of an image, Q, that these encoders look at."""
        grid, count, _ = self.pooled(encoders)
        count = self.queries if self.kind in ("perceiver", "flat") else count
        rows = grid[0] if grid is not None else 0
        return count + {"none": 0, "row": rows, "token": 1}[self.newline]

    def work(self, encoders: tuple[Encoder, ...], width: int) -> Work:
        """What decides its activations."""
        resampler, tokens = self.kind == "perceiver", self.visual_tokens(encoders)
        inner = self.width or self.output(width)
        hidden = max(self.hidden) if isinstance(self.hidden, tuple) else self.hidden
        context = self.pooled(encoders)[1] + tokens if resampler else 0
        remat = self.remat and resampler
        return Work(tokens, context, inner, hidden or 4 * inner, self.heads, self.layers, remat)

    def problems(self, width: int, encoders: tuple[Encoder, ...]) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, the decoder's width or what encoders give, each with what
        was expected."""
        yield from self._grid_problems(encoders)
        _, _, features = self.pooled(encoders)
        if self.kind == "none" and features != self.output(width):
            yield "kind", f"a projection from {features} channels to {self.output(width)}"
        if self.kind == "mlp" and len(self.sizes(features, width)) != self.layers + 1:
            yield "hidden", f"a width for each of the {self.layers - 1} hidden layers"
        if self.kind == "perceiver":
            yield from self._perceiver_problems(self.width or self.output(width), features)
        elif self.embed != "linear":
            yield "embed", "linear where there is no perceiver"

    def _grid_problems(self, encoders: tuple[Encoder, ...]) -> Iterator[tuple[str, str]]:
        grids = {feature_grid(encoder) for encoder in encoders}
        grid, count = self.merged_grid(encoders), encoders[0].features[0]
        if None in grids and (any(self.resize) or len({e.features[0] for e in encoders}) > 1):
            yield "resize", "encoders whose features form grids"
        if self.pool in ("shuffle", "average") and grid is None:
            yield "pool", "features that form a grid"
        elif self.pool == "shuffle" and any(side % self.factor for side in grid):
            yield "factor", f"a divisor of the grid {grid}"
        elif self.pool == "average" and not (
            0 < self.grid[0] <= grid[0] and 0 < self.grid[1] <= grid[1]
        ):
            yield "grid", f"rows and columns within {grid}"
        elif self.pool == "adjacent" and (count if grid is None else math.prod(grid)) % self.factor:
            yield "factor", "a divisor of the number of features"
        if self.newline == "row" and (
            self.kind in ("perceiver", "flat") or self.pooled(encoders)[0] is None
        ):
            yield "newline", "token where visual tokens form no grid"

    def _perceiver_problems(self, width: int, features: int) -> Iterator[tuple[str, str]]:
        if not self.head_dim and width % self.heads:
            yield "heads", f"a divisor of the connector's width {width}"
        if self.heads % self.kv_heads:
            yield "heads", f"a multiple of its {self.kv_heads} key/value heads"
        if isinstance(self.hidden, tuple):
            yield "hidden", "one width for all blocks"
        if self.embed == "none" and features != width:
            yield "embed", f"linear or swiglu, from {features} channels to the width {width}"
        if (self.embed == "swiglu") != (self.embed_hidden > 0):
            yield "embed_hidden", "at least 1 with swiglu, else 0"
        if self.input_norm != "none":
            yield "input_norm", "none: a perceiver's blocks have their own norms"


# Flamingo's form, as OpenFlamingo and Idefics have it.
_FLAMINGO = Connector(
    "perceiver",
    layers=6,
    norm="layer",
    norm_eps=1e-5,
    embed="none",
    gated=False,
    mlp_activation="gelu",
)

# Published resamplers; `out` is the decoder's width but where cross-attention reads them.
RESAMPLERS = {
    # open_flamingo/src/helpers.py; behind CLIP ViT-L/14
    "open-flamingo": dataclasses.replace(_FLAMINGO, width=1024, head_dim=64, out=1024),
    # HuggingFaceM4/idefics-9b; behind OpenCLIP ViT-H/14
    "idefics": dataclasses.replace(
        _FLAMINGO,
        width=1280,
        out=1280,
        heads=16,
        kv_heads=16,
        head_dim=96,
        qk_norm=True,
        mlp_activation="relu",
    ),
    # HuggingFaceM4/idefics2-8b
    "idefics2": Connector(
        "perceiver",
        layers=3,
        width=4096,
        heads=16,
        kv_heads=4,
        head_dim=96,
        norm_eps=1e-5,
        embed="swiglu",
        embed_hidden=14_336,
    ),
    # mplug_owl/configuration_mplug_owl.py; its other norms have torch's epsilon
    "mplug-owl": Connector(
        "perceiver",
        layers=6,
        width=1024,
        hidden=4096,
        heads=16,
        kv_heads=16,
        norm="layer",
        norm_eps=1e-5,
        mlp_norm_eps=1e-6,
        embed="none",
        block_bias=True,
        normed_residual=True,
        final_norm=False,
        newline="token",
    ),
}


def resampler(name: str, **fields) -> Connector:
    """A published resampler by name, e.g. `resampler("idefics2", dropout=0.1)`.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in RESAMPLERS:
        raise ValueError(f"unknown resampler {name!r}: expected one of {', '.join(RESAMPLERS)}")
    return dataclasses.replace(RESAMPLERS[name], **fields)
