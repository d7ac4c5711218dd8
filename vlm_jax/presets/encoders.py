"""Vision encoders as rows of fields: every difference between two published encoders is a field."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision transformer.

    Attributes:
      width, depth, mlp, heads: the usual sizes; the head dimension is width // heads.
      patch: side of a patch in pixels.
      image_size: side of the square image in pixels, or its height and width; multiples of `patch`.
      stem: "patch" embeds flattened patches by one matrix; "conv" puts stages of residual 3x3
        convolutions before it and reads whole pixels (a hybrid ViT, as in Dosovitskiy et al. 2021).
      stem_stages: of "conv", (factor, width, blocks) each: gather factor x factor places into
        channels, then that many residual convolutions; the factors' product divides `patch`.
      position: "learned" or "sincos2d" (MoCo-v3, temperature 1e4).
      activation: "gelu_tanh" (big_vision's and SigLIP's) or "gelu".
      norm_eps: of every LayerNorm.
      final_norm: whether a LayerNorm follows the last block.
      pool: "none" gives patch features; "map" pools them to one by attention (SigLIP's head).
      dropout: on the output of each residual branch.
      drop_path: chance that a residual branch of the last block is dropped, rising linearly with
        depth.
      mean, std: per channel, of pixels in [0, 1].
      dtype: of the computation; parameters are float32 masters.
      remat: whether blocks recompute their activations in the backward pass.
    """

    width: int
    depth: int
    mlp: int
    heads: int
    patch: int = 16
    image_size: int | tuple[int, int] = 224
    stem: str = "patch"
    stem_stages: tuple[tuple[int, int, int], ...] = ()
    position: str = "learned"
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    final_norm: bool = True
    pool: str = "none"
    dropout: float = 0.0
    drop_path: float = 0.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "vit"

    CHOICES: ClassVar = {
        "kind": ("vit",),
        "stem": ("patch", "conv"),
        "position": ("learned", "sincos2d"),
        "activation": ("gelu_tanh", "gelu"),
        "pool": ("none", "map"),
        "dtype": ("bfloat16", "float32"),
    }

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def patches(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def reads(self) -> str:
        """ "patches" or "pixels": which part of `batch.Images` it looks at."""
        return "pixels" if self.stem == "conv" else "patches"

    @property
    def features(self) -> tuple[int, int]:
        """How many features an image gives, and their width."""
        return 1 if self.pool == "map" else self.patches, self.width

    @property
    def runs(self) -> tuple[tuple[int, int, int, int, int, int], ...]:
        """Runs of equal blocks: (tokens, tokens each looks at, width, mlp, heads, depth)."""
        return ((self.patches, self.patches, self.width, self.mlp, self.heads, self.depth),)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected."""
        if any(side % self.patch for side in self.size):
            yield "image_size", f"a multiple of the patch size {self.patch}"
        if self.patch % math.prod(factor for factor, _, _ in self.stem_stages):
            yield "stem_stages", f"factors whose product divides the patch size {self.patch}"
        if self.width % self.heads:
            yield "width", f"a multiple of its {self.heads} heads"


# big_vision's ViT sizes (models/vit.py, decode_variant): width, depth, mlp, heads.
SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def vit(name: str, **fields) -> Encoder:
    """An encoder by big_vision's name, e.g. `vit("So400m/14", image_size=224, pool="map")`.

    Raises:
      ValueError: the size is not in the table, or the name lacks its patch size.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"unknown encoder {name!r}: expected SIZE/PATCH with SIZE one of {', '.join(SIZES)}"
        )
    width, depth, mlp, heads = SIZES[size]
    return Encoder(width, depth, mlp, heads, patch=int(patch), **fields)
