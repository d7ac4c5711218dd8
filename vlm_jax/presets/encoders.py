"""Vision encoders as rows of fields: every difference between two published encoders is a field."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.resizing import SQUASH, Resize


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision transformer.

    Attributes:
      width, depth, mlp, heads: the usual sizes, `depth` that of the published tower.
      head_dim: of a head; 0 = width // heads.
      patch: side of a patch in pixels.
      image_size: side of the square image in pixels, or its height and width; multiples of `patch`.
      max_patches: 0 where all images have that size; else each has a grid of its own of up to so
        many patches, and the rest of its slot is padding (NaFlex, Idefics2, Pix2Struct).
      stem: "patch" embeds flattened patches by one matrix; "conv" puts stages of residual 3x3
        convolutions before it and reads whole pixels (a hybrid ViT, as in Dosovitskiy et al. 2021).
      stem_stages: of "conv", (factor, width, blocks) each: gather factor x factor places into
        channels, then that many residual convolutions; the factors' product divides `patch`.
      class_token: whether a learned token stands before the patches.
      registers: learned tokens after it (Darcet et al. 2024); never among the features.
      position: "learned"; "sincos2d" (MoCo-v3, temperature 1e4); "row_column", two learned tables
        whose first entries are for padding (Pix2Struct); "none".
      position_grid: rows and columns of a learned table, or how many rows and columns "row_column"
        knows; () = the grid of `image_size`.
      position_resize: from a learned table to another grid: torch's "bicubic", "bicubic_antialias"
        or "bilinear_antialias", or "bucket", the nearest entry before (Idefics2).
      rotary_grid: rows and columns that a grid is stretched to for 2D rotary positions of adjacent
        pairs (EVA-02); () = none.
      pre_norm: whether the blocks read normed tokens (CLIP).
      norm: "layer", or "rms" without mean and bias.
      norm_eps: of every norm.
      post_norm: whether branches are normed after, not before (EVA-02-CLIP E).
      inner_norm: whether heads and hidden units are normed before their last matrix (EVA-02).
      layer_scale: what learned scales of branches start from; 0 = none (DINOv2).
      activation: "gelu_tanh" (big_vision's and SigLIP's), "gelu", "quick_gelu" (OpenAI's CLIP) or
        "silu".
      gated: whether the feed-forward part is gated.
      attention_scale: factor on scores; 0 = one over the root of the head dimension.
      unbiased: which of "patch", "query", "key", "value", "out" and "mlp" have no bias.
      layer: whose output the features are, counted from the last block; later ones do not run.
      taps: blocks whose outputs, counted like `layer`, are the features together, their channels
        concatenated in this order; one before the first is what the blocks read. () = `layer`'s.
      final_norm: whether a norm follows that block.
      keep_class: whether the class token is the first of the features.
      pool: "none" gives patch features; "map" pools them to one by attention (SigLIP's head);
        "class" gives the class token alone.
      dropout: on the output of each residual branch.
      drop_path: chance that a residual branch of the last block is dropped, rising linearly with
        depth.
      mean, std: per channel, of pixels in [0, 1].
      resize: how pictures of other sizes become images.
      dtype: of the computation; parameters are float32 masters.
      remat: whether blocks recompute their activations in the backward pass.
    """

    width: int
    depth: int
    mlp: int
    heads: int
    head_dim: int = 0
    patch: int = 16
    image_size: int | tuple[int, int] = 224
    max_patches: int = 0
    stem: str = "patch"
    stem_stages: tuple[tuple[int, int, int], ...] = ()
    class_token: bool = False
    registers: int = 0
    position: str = "learned"
    position_grid: tuple[int, ...] = ()
    position_resize: str = "bicubic"
    rotary_grid: tuple[int, ...] = ()
    pre_norm: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-6
    post_norm: bool = False
    inner_norm: bool = False
    layer_scale: float = 0.0
    activation: str = "gelu_tanh"
    gated: bool = False
    attention_scale: float = 0.0
    unbiased: tuple[str, ...] = ()
    layer: int = -1
    taps: tuple[int, ...] = ()
    final_norm: bool = True
    keep_class: bool = False
    pool: str = "none"
    dropout: float = 0.0
    drop_path: float = 0.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = SQUASH
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "vit"

    CHOICES: ClassVar = {
        "kind": ("vit",),
        "stem": ("patch", "conv"),
        "position": ("learned", "sincos2d", "row_column", "none"),
        "position_resize": ("bicubic", "bicubic_antialias", "bilinear_antialias", "bucket"),
        "norm": ("layer", "rms"),
        "activation": ("gelu_tanh", "gelu", "quick_gelu", "silu"),
        "pool": ("none", "map", "class"),
        "dtype": ("bfloat16", "float32"),
    }
    BIASES: ClassVar = ("patch", "query", "key", "value", "out", "mlp")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image of that size."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def table_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of learned positions."""
        return tuple(self.position_grid) or self.grid

    @property
    def patches(self) -> int:
        """Patches of an image, or room for them."""
        rows, columns = self.grid
        return self.max_patches or rows * columns

    @property
    def tokens(self) -> int:
        """Tokens of an image that the blocks read."""
        return self.class_token + self.registers + self.patches

    @property
    def blocks(self) -> int:
        """Blocks that run."""
        return self.depth + 1 + self.layer

    @property
    def key_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def reads(self) -> str:
        """ "patches" or "pixels": which part of `batch.Images` it looks at."""
        return "pixels" if self.stem == "conv" else "patches"

    @property
    def features(self) -> tuple[int, int]:
        """How many features an image gives, and their width."""
        width = self.width * max(1, len(self.taps))
        return self.keep_class + self.patches if self.pool == "none" else 1, width

    def has_bias(self, part: str) -> bool:
        """Whether a part, one of BIASES, has a bias."""
        return part not in self.unbiased

    @property
    def runs(self) -> tuple[tuple[int, int, int, int, int, int], ...]:
        """Runs of equal blocks: (tokens, tokens each looks at, width, mlp, heads, depth)."""
        return ((self.tokens, self.tokens, self.width, self.mlp, self.heads, self.blocks),)

    def packed_runs(
        self, images: int, patches: int
    ) -> tuple[tuple[int, int, int, int, int, int], ...]:
        """`runs` over rows in which so many images share so many patches (`models/packed.py`)."""
        length = images * (self.tokens - self.patches) + patches
        pairs = min(images * self.tokens**2, length**2)
        return tuple((length, -(-pairs // length), *rest) for _, _, *rest in self.runs)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected."""
        if any(side % self.patch for side in self.size):
            yield "image_size", f"a multiple of the patch size {self.patch}"
        if self.patch % math.prod(factor for factor, _, _ in self.stem_stages):
            yield "stem_stages", f"factors whose product divides the patch size {self.patch}"
        if not self.head_dim and self.width % self.heads:
            yield "width", f"a multiple of its {self.heads} heads"
        for name in ("position_grid", "rotary_grid"):
            if len(getattr(self, name)) not in (0, 2):
                yield name, "rows and columns, or ()"
        if self.rotary_grid and self.key_width % 4:
            yield "rotary_grid", f"heads of a multiple of 4, not of {self.key_width}"
        if self.max_patches and self.position == "sincos2d":
            yield "position", "one that holds for any grid, as max_patches is set"
        if self.position == "row_column" and min(self.table_grid) <= (
            self.max_patches or max(self.grid)
        ):
            yield "position_grid", "more rows and columns than an image may have patches"
        if self.max_patches and self.stem == "conv":
            yield "stem", "patch, as max_patches is set"
        if not set(self.unbiased) <= set(self.BIASES):
            yield "unbiased", f"some of {', '.join(self.BIASES)}"
        if not -self.depth <= self.layer <= -1:
            yield "layer", f"-1 (the last block) to {-self.depth} (the first)"
        if self.taps and (max(self.taps) != self.layer or min(self.taps) < -self.depth - 1):
            yield "taps", f"{self.layer} (`layer`) and blocks before it, down to {-self.depth - 1}"
        if self.taps and (self.final_norm or self.pool == "map"):
            yield (
                "taps",
                "() with a final norm or pooling by attention, which are as wide as blocks",
            )
        if self.keep_class and not self.class_token:
            yield "keep_class", "False without a class token"
        if self.pool == "class" and not self.class_token:
            yield "pool", "none or map without a class token"


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
