"""Vision encoders as rows of fields: every difference between two published encoders is a field."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision transformer.

    Attributes:
      width, depth, mlp, heads: the usual sizes; the head dimension is width // heads.
      patch: side of a patch in pixels.
      image_size: side of the square image in pixels, a multiple of `patch`.
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
    image_size: int = 224
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

    @property
    def grid(self) -> int:
        """Patches per side of an image."""
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2


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
