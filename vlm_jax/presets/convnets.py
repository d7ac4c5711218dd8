"""Convolutional encoders as rows of fields: ConvNeXt, and EfficientNet without excitation."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.resizing import SQUASH, Resize

# What torchvision, timm and transformers normalise pixels with for ImageNet, and CLIP.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """A convolutional network: a stem, stages of equal blocks, and optionally a head.

    Attributes:
      stages: (blocks, width, kernel, stride, expand) each; `expand` is how many times wider a
        block is inside.
      stem_width, stem_stride: channels of the stem and the side of the square it makes one place.
      image_size: side of the square image in pixels, or its height and width.
      taps: stages whose outputs are the features, counted from 0, or from the end below 0.
      resize_to: side, or rows and columns, of the grid that features are brought to (bilinear,
        corners not aligned); None = as they are. Several taps need it: their channels are
        concatenated.
      pool: "none" gives the taps' features; "mean" averages the head's, or the normalised last
        stage's, to one.
      head: of an EfficientNet, channels of the convolution before pooling.
      classes: of a classifier over the pooled features, see `logits` of its module; 0 = none.
      layer_scale: of a ConvNeXt, what the factors of residual branches start from; 0 = none.
      response_norm: of a ConvNeXt, global response normalisation in every block (ConvNeXt V2).
      activation: "gelu", "gelu_tanh", "relu" or "relu6".
      norm_eps: of every norm but a ConvNeXt's last.
      final_norm_eps: of a ConvNeXt's norm after pooling.
      drop_path: chance that the residual branch of the last block is dropped, rising linearly with
        depth.
      mean, std: per channel, of pixels in [0, 1].
      resize: how pictures of other sizes become images.
      dtype: of the computation; parameters are float32 masters.
      remat: whether blocks recompute their activations in the backward pass.
    """

    stages: tuple[tuple[int, int, int, int, int], ...]
    stem_width: int
    stem_stride: int = 4
    image_size: int | tuple[int, int] = 224
    taps: tuple[int, ...] = (-1,)
    resize_to: int | tuple[int, int] | None = None
    pool: str = "none"
    head: int = 0
    classes: int = 0
    layer_scale: float = 1e-6
    response_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    final_norm_eps: float = 1e-6
    drop_path: float = 0.0
    mean: tuple[float, float, float] = IMAGENET["mean"]
    std: tuple[float, float, float] = IMAGENET["std"]
    resize: Resize = SQUASH
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "convnext"

    CHOICES: ClassVar = {
        "kind": ("convnext", "efficientnet"),
        "pool": ("none", "mean"),
        "activation": ("gelu", "gelu_tanh", "relu", "relu6"),
        "dtype": ("bfloat16", "float32"),
    }

    reads: ClassVar[str] = "pixels"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return pair(self.image_size)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The taps, counted from 0."""
        return tuple(tap % len(self.stages) for tap in self.taps)

    @property
    def pooled(self) -> bool:
        """Whether there is anything after the last stage."""
        return self.pool == "mean" or self.classes > 0

    @property
    def computed(self) -> int:
        """How many stages are computed; there are no parameters of the others."""
        return len(self.stages) if self.pooled else max(self.tapped) + 1

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every stage's output."""
        strides = [self.stem_stride, *(stride for _, _, _, stride, _ in self.stages)]
        # A ConvNeXt drops the odd row; an EfficientNet pads it.
        up = self.kind == "efficientnet"
        step = lambda grid, s: tuple(-(-side // s) if up else side // s for side in grid)  # noqa: E731
        return tuple(itertools.accumulate(strides, step, initial=self.size))[2:]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features of an image."""
        if self.resize_to is not None:
            return pair(self.resize_to)
        return self.grids[self.tapped[0]]

    @property
    def patches(self) -> int:
        """Places of the grid."""
        rows, columns = self.grid
        return rows * columns

    @property
    def features(self) -> tuple[int, int]:
        """How many features an image gives, and their width."""
        if self.pool == "mean":
            return 1, self.head or self.stages[-1][1]
        return self.patches, sum(self.stages[tap][1] for tap in self.tapped)

    @property
    def runs(self) -> tuple[tuple[int, int, int, int, int, int], ...]:
        """Runs of equal blocks: (tokens, tokens each looks at, width, mlp, heads, depth)."""
        return tuple(
            (rows * columns, 0, width, expand * width, 0, blocks)
            for (rows, columns), (blocks, width, _, _, expand) in zip(self.grids, self.stages)
        )[: self.computed]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected."""
        count = len(self.stages)
        if not self.taps or not all(-count <= tap < count for tap in self.taps):
            yield "taps", f"numbers of its {count} stages"
            return
        if not all(side > 0 for side in (*self.grids[-1], *self.grid)):
            yield "image_size", "at least a pixel of every stage"
        if self.resize_to is None and len({self.grids[tap] for tap in self.tapped}) > 1:
            yield "resize_to", "a grid that the stages' features are brought to"
        if self.pool == "mean" and (self.tapped != (count - 1,) or self.resize_to is not None):
            yield "pool", "none, with taps or a grid of their own"
        if self.kind == "convnext":
            if self.stages[0][3] != 1 or self.stages[0][1] != self.stem_width:
                yield "stages", "a first stage of stride 1 and the stem's width"
            if self.head:
                yield "head", "0 in a convnext, whose head is a norm"
        elif self.layer_scale or self.response_norm:
            yield "layer_scale", "0 in an efficientnet, and no response_norm"


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of one side where that is a square's."""
    return size if isinstance(size, tuple) else (size, size)


# Depths and widths of the stages, and fields: Liu et al. 2022 (table of variants), Woo et al. 2023
# (V2) and timm's convnext_xxlarge, which OpenCLIP trained.
V2 = {"layer_scale": 0.0, "response_norm": True}
CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768), {}),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768), {}),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024), {}),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536), {}),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048), {}),
    "xxlarge": (
        (3, 4, 30, 3),
        (384, 768, 1536, 3072),
        {"norm_eps": 1e-5, "final_norm_eps": 1e-5, "image_size": 256} | CLIP,
    ),
    "v2-atto": ((2, 2, 6, 2), (40, 80, 160, 320), V2),
    "v2-femto": ((2, 2, 6, 2), (48, 96, 192, 384), V2),
    "v2-pico": ((2, 2, 6, 2), (64, 128, 256, 512), V2),
    "v2-nano": ((2, 2, 8, 2), (80, 160, 320, 640), V2),
    "v2-tiny": ((3, 3, 9, 3), (96, 192, 384, 768), V2),
    "v2-base": ((3, 3, 27, 3), (128, 256, 512, 1024), V2),
    "v2-large": ((3, 3, 27, 3), (192, 384, 768, 1536), V2),
    "v2-huge": ((3, 3, 27, 3), (352, 704, 1408, 2816), V2),
}

# (blocks, width, kernel, stride, expand) of the stages and fields: tensorflow/tpu's
# efficientnet/lite. Pixels are (x - 127) / 128 of bytes.
EFFICIENTNET = {
    "lite0": (
        (
            (1, 16, 3, 1, 1),
            (2, 24, 3, 2, 6),
            (2, 40, 5, 2, 6),
            (3, 80, 3, 2, 6),
            (3, 112, 5, 1, 6),
            (4, 192, 5, 2, 6),
            (1, 320, 3, 1, 6),
        ),
        {
            "stem_width": 32,
            "stem_stride": 2,
            "head": 1280,
            "layer_scale": 0.0,
            "activation": "relu6",
            "norm_eps": 1e-3,
            "mean": (127 / 255,) * 3,
            "std": (128 / 255,) * 3,
        },
    ),
}


def convnext(name: str, **fields) -> ConvNet:
    """A ConvNeXt by its published name, e.g. `convnext("xxlarge", image_size=1024)`.

    Raises:
      ValueError: the name is not in the table.
    """
    depths, widths, published = _row(CONVNEXT, name)
    return ConvNet(convnext_stages(depths, widths), widths[0], **published | fields)


def convnext_stages(depths, widths) -> tuple[tuple[int, int, int, int, int], ...]:
    """Stages of a ConvNeXt of these depths and widths."""
    strides = (1, *[2] * (len(depths) - 1))
    return tuple((d, w, 7, s, 4) for d, w, s in zip(depths, widths, strides, strict=True))


def efficientnet(name: str, **fields) -> ConvNet:
    """An EfficientNet-Lite by its published name, e.g. `efficientnet("lite0", classes=1000)`.

    Raises:
      ValueError: the name is not in the table.
    """
    stages, published = _row(EFFICIENTNET, name)
    return ConvNet(stages, kind="efficientnet", **published | fields)


def _row(table: dict, name: str) -> tuple:
    if name not in table:
        raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join(table)}")
    return table[name]
