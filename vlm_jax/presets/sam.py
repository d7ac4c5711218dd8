"""The image encoder of Segment Anything as a row of fields."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.convnets import IMAGENET, pair
from vlm_jax.presets.resizing import SQUASH, Resize


@dataclasses.dataclass(frozen=True)
class Sam:
    """A vision transformer whose layers see windows, some the whole image (Kirillov et al. 2023).

    Attributes:
      width, depth, mlp, heads: the usual sizes; the head dimension is width // heads.
      global_layers: numbers of the layers that see the whole image.
      window: side of a window in patches; grids are padded with zeros to a multiple of it.
      patch: side of a patch in pixels.
      image_size: side of the square image in pixels, or its height and width; multiples of `patch`.
      trained_size: image size that the tables of positions are made for; None = `image_size`.
        Others are interpolated: relative ones linearly, absolute ones as pictures are (bicubic).
      absolute: whether each patch has a learned position.
      relative: whether scores have decomposed relative positions added (Li et al. 2022, MViTv2).
      qkv_bias: whether queries, keys and values have biases.
      out: channels that the neck gives.
      activation: "gelu", "gelu_tanh" or "relu".
      norm_eps: of the layers' LayerNorms.
      neck_eps: of the neck's.
      mean, std: per channel, of pixels in [0, 1].
      resize: how pictures of other sizes become images.
      dtype: of the computation; parameters are float32 masters.
      remat: whether blocks recompute their activations in the backward pass.
    """

    width: int
    depth: int
    mlp: int
    heads: int
    global_layers: tuple[int, ...]
    window: int = 14
    patch: int = 16
    image_size: int | tuple[int, int] = 1024
    trained_size: int | tuple[int, int] | None = None
    absolute: bool = True
    relative: bool = True
    qkv_bias: bool = True
    out: int = 256
    activation: str = "gelu"
    norm_eps: float = 1e-6
    neck_eps: float = 1e-6
    mean: tuple[float, float, float] = IMAGENET["mean"]
    std: tuple[float, float, float] = IMAGENET["std"]
    resize: Resize = SQUASH
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "sam"

    CHOICES: ClassVar = {
        "kind": ("sam",),
        "activation": ("gelu", "gelu_tanh", "relu"),
        "dtype": ("bfloat16", "float32"),
    }

    reads: ClassVar[str] = "pixels"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return pair(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def trained_grid(self) -> tuple[int, int]:
        """Rows and columns that the tables of positions are made for."""
        size = self.image_size if self.trained_size is None else self.trained_size
        height, width = pair(size)
        return height // self.patch, width // self.patch

    @property
    def patches(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of each layer, "local" or "global"."""
        return tuple("global" if i in self.global_layers else "local" for i in range(self.depth))

    @property
    def features(self) -> tuple[int, int]:
        """How many features an image gives, and their width."""
        return self.patches, self.out

    @property
    def runs(self) -> tuple[tuple[int, int, int, int, int, int], ...]:
        """Runs of equal blocks: (tokens, tokens each looks at, width, mlp, heads, depth)."""
        seen = {"local": self.window**2, "global": self.patches}
        return tuple(
            (self.patches, seen[kind], self.width, self.mlp, self.heads, self.layers.count(kind))
            for kind in sorted(set(self.layers))
        )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected."""
        for field in ("image_size", "trained_size"):
            size = getattr(self, field)
            if size is not None and any(side % self.patch for side in pair(size)):
                yield field, f"a multiple of the patch size {self.patch}"
        if self.width % self.heads:
            yield "width", f"a multiple of its {self.heads} heads"
        if not all(0 <= layer < self.depth for layer in self.global_layers):
            yield "global_layers", f"numbers of its {self.depth} layers"


# Width, depth, mlp, heads and global layers: segment-anything's build_sam.py.
SIZES = {
    "B": (768, 12, 3072, 12, (2, 5, 8, 11)),
    "L": (1024, 24, 4096, 16, (5, 11, 17, 23)),
    "H": (1280, 32, 5120, 16, (7, 15, 23, 31)),
}


def sam(name: str, **fields) -> Sam:
    """An encoder by its published name, e.g. `sam("L", image_size=512, trained_size=1024)`.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in SIZES:
        raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join(SIZES)}")
    return Sam(*SIZES[name], **fields)
