"""Text towers of contrastive models as rows of fields: what embeds a text beside an image."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from vlm_jax.presets.encoders import Encoder


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A transformer that makes one embedding of a text, to be compared with those of images.

    Attributes:
      vocab: tokens that have an embedding.
      length: learned positions, the longest text.
      width, depth, mlp, heads: the usual sizes.
      out: width of the space that texts and images share.
      norm_eps: of every norm.
      activation: of the feed-forward part, as of `presets.encoders.Encoder`.
      causal: whether a token sees only those before it (CLIP).
      pool: whose hidden state the embedding is made of: "first" token with the id `end`, "largest"
        id of the text (CLIP as first published, whose last id is the end), or "last" position,
        padding or not (SigLIP).
      end: id of the token that ends a text.
      out_bias: whether the projection to the shared space has a bias (SigLIP).
      image_pool: "map" pools all features of an image by a head of its own, where a decoder reads
        them too (CoCa); "none" takes an encoder's one feature.
      project_images: whether images are projected to it too; else their feature is that wide.
      logit_bias: whether a learned number is added to the scaled similarities (SigLIP).
      dtype: of the computation; parameters are float32 masters.
      remat: whether blocks recompute their activations in the backward pass.
    """

    vocab: int
    length: int
    width: int
    depth: int
    mlp: int
    heads: int
    out: int
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    causal: bool = False
    pool: str = "last"
    end: int = 0
    out_bias: bool = False
    image_pool: str = "none"
    project_images: bool = False
    logit_bias: bool = False
    dtype: str = "bfloat16"
    remat: bool = True
    kind: str = "text"

    CHOICES: ClassVar = {
        "kind": ("text",),
        "activation": Encoder.CHOICES["activation"],
        "pool": ("first", "largest", "last"),
        "image_pool": ("none", "map"),
        "dtype": ("bfloat16", "float32"),
    }

    @property
    def blocks(self) -> Encoder:
        """The same blocks as a vision transformer's."""
        return Encoder(
            self.width,
            self.depth,
            self.mlp,
            self.heads,
            norm_eps=self.norm_eps,
            activation=self.activation,
        )

    def problems(self, image: tuple[int, int]) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected.

        Args:
          image: how many features an image has, and their width.
        """
        count, width = image
        if self.width % self.heads:
            yield "width", f"a multiple of its {self.heads} heads"
        if self.pool == "first" and not 0 <= self.end < self.vocab:
            yield "end", f"an id below the vocabulary's {self.vocab}"
        if count != 1 and self.image_pool == "none":
            yield "image_pool", f"an encoder that pools an image to one feature, not {count}"
        if not self.project_images and width != self.out:
            yield "out", f"the width {width} of an image's feature, or project_images"


# CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): what all their text towers share.
CLIP = {
    "vocab": 49408,
    "length": 77,
    "norm_eps": 1e-5,
    "causal": True,
    "pool": "first",
    "end": 49407,
    "project_images": True,
}
OPENAI = CLIP | {"activation": "quick_gelu"}
OPENCLIP = CLIP | {"activation": "gelu"}
SIGLIP = {"vocab": 32_000, "length": 64, "out_bias": True, "logit_bias": True}
SIGLIP2 = SIGLIP | {"vocab": 256_000}

# By the name that `presets.encoder_sizes.PUBLISHED` gives their image towers.
PUBLISHED = {
    "clip-b32": TextTower(width=512, depth=12, mlp=2048, heads=8, out=512, **OPENAI),
    "clip-b16": TextTower(width=512, depth=12, mlp=2048, heads=8, out=512, **OPENAI),
    "clip-l14": TextTower(width=768, depth=12, mlp=3072, heads=12, out=768, **OPENAI),
    "clip-l14-336": TextTower(width=768, depth=12, mlp=3072, heads=12, out=768, **OPENAI),
    "openclip-h14": TextTower(width=1024, depth=24, mlp=4096, heads=16, out=1024, **OPENCLIP),
    "siglip-b16": TextTower(width=768, depth=12, mlp=3072, heads=12, out=768, **SIGLIP),
    "siglip-so400m14-378": TextTower(width=1152, depth=27, mlp=4304, heads=16, out=1152, **SIGLIP),
    "siglip2-naflex-b16": TextTower(width=768, depth=12, mlp=3072, heads=12, out=768, **SIGLIP2),
}
