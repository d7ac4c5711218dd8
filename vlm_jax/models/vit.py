"""The vision transformer: pixels or patches of square images to patch features.

A pre-norm ViT as in big_vision (models/vit.py): learned or sincos2d positions, biases everywhere,
an optional attention-pooling head. n counts images, whatever row they came from.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.batch import Images
from vlm_jax.models.layers import ACTIVATIONS, Attention, LayerNorm, Linear, Mlp, Stack, drop
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.encoders import Encoder


class Block(nnx.Module):
    """Self-attention and feed-forward part, each behind a LayerNorm and a residual."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        width, heads = encoder.width, encoder.heads
        self.norm1 = LayerNorm(width, encoder.norm_eps)
        self.attention = Attention(width, heads, heads, width // heads, bias=True, rngs=rngs)
        self.norm2 = LayerNorm(width, encoder.norm_eps)
        self.mlp = Mlp(width, encoder.mlp, encoder.activation, gated=False, bias=True, rngs=rngs)
        self.dropout = encoder.dropout

    def __call__(
        self, x: Float[Array, "n P D"], path_rate: Float[Array, ""] | float, key
    ) -> Float[Array, "n P D"]:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        y = self.norm1(x)
        y = drop(self.attention(y, y), self.dropout, keys[0])
        x = x + drop(y, path_rate, keys[1], per_row=True)
        y = drop(self.mlp(self.norm2(x)), self.dropout, keys[2])
        return constrain(x + drop(y, path_rate, keys[3], per_row=True), "batch", None, None)


class PatchStem(nnx.Module):
    """One matrix over flattened patches."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        self.embed = Linear((encoder.patch**2 * 3,), (encoder.width,), bias=True, rngs=rngs)

    def __call__(self, images: Images, encoder: Encoder) -> Float[Array, "n P D"]:
        rows, _, dim = images.patches.shape
        patches = images.patches.reshape(rows * images.grids.shape[1], encoder.patches, dim)
        return self.embed(patches.astype(encoder.dtype))


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2 with LayerNorm and activation, then a 1x1 to the width."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        channels = (3, *encoder.stem_widths)
        pairs = list(itertools.pairwise(channels))
        # He initialisation: nothing but the activation follows each convolution's norm.
        self.kernels = nnx.List(
            [
                nnx.Param(jax.random.normal(rngs(), (3, 3, i, o)) * math.sqrt(2 / (9 * i)))
                for i, o in pairs
            ]
        )
        self.norms = nnx.List([LayerNorm(o, encoder.norm_eps) for _, o in pairs])
        self.embed = Linear((channels[-1],), (encoder.width,), bias=True, rngs=rngs)

    def __call__(self, images: Images, encoder: Encoder) -> Float[Array, "n P D"]:
        rows, slots, *shape = images.pixels.shape
        x = images.pixels.reshape(rows * slots, *shape).astype(encoder.dtype)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = jax.lax.conv_general_dilated(
                x,
                kernel[...].astype(x.dtype),
                window_strides=(2, 2),
                padding="SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = ACTIVATIONS[encoder.activation](norm(x))
        return self.embed(x.reshape(x.shape[0], encoder.patches, -1))


STEMS = {"patch": PatchStem, "conv": ConvStem}


class MapHead(nnx.Module):
    """Multi-head attention pooling: one learned probe looks at all patches (SigLIP, big_vision)."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        width, heads = encoder.width, encoder.heads
        bound = math.sqrt(6 / (1 + width))
        self.probe = nnx.Param(jax.random.uniform(rngs(), (width,), minval=-bound, maxval=bound))
        self.attention = Attention(width, heads, heads, width // heads, bias=True, rngs=rngs)
        self.norm = LayerNorm(width, encoder.norm_eps)
        self.mlp = Mlp(width, encoder.mlp, encoder.activation, gated=False, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "n P D"]) -> Float[Array, "n 1 D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        pooled = self.attention(probe, x)
        return pooled + self.mlp(self.norm(pooled))


class Vit(nnx.Module):
    """Images to features: `[n, P, D]`, or `[n, 1, D]` when pooled."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        self.encoder = encoder
        self.stem = STEMS[encoder.stem](encoder, rngs)
        learned = encoder.position == "learned"
        noise = jax.random.normal(rngs(), (encoder.patches, encoder.width))
        self.positions = nnx.Param(noise / math.sqrt(encoder.width)) if learned else None
        make = lambda rngs: Block(encoder, rngs)  # noqa: E731
        self.stack = Stack(make, encoder.depth, remat=encoder.remat, rngs=rngs)
        self.norm = LayerNorm(encoder.width, encoder.norm_eps) if encoder.final_norm else None
        self.head = MapHead(encoder, rngs) if encoder.pool == "map" else None

    def __call__(self, images: Images, key: Array | None = None) -> Float[Array, "n P D"]:
        encoder = self.encoder
        x = self.stem(images, encoder)
        x = constrain(x + self._positions().astype(x.dtype), "batch", None, None)
        # Stochastic depth's rate rises linearly from 0 at the first block (Huang et al. 2016).
        rates = jnp.linspace(0.0, encoder.drop_path, encoder.depth)

        def apply(block, x, rate, key):
            return block(x, rate if encoder.drop_path else 0.0, key), None

        x, _ = self.stack(apply, x, per_layer=rates, key=key)
        x = x if self.norm is None else self.norm(x)
        return x if self.head is None else self.head(x)

    def _positions(self) -> Float[Array, "P D"]:
        if self.positions is not None:
            return self.positions[...]
        return sincos2d(self.encoder.grid, self.encoder.width)


def sincos2d(grid: int, width: int, temperature: float = 10_000.0) -> Float[Array, "P D"]:
    """Fixed positions of a square grid: sines and cosines of column, then row (MoCo-v3).

    Raises:
      ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4, not {width}")
    rows, columns = jnp.mgrid[:grid, :grid]
    frequencies = temperature ** (-jnp.arange(width // 4) / (width // 4 - 1))
    x = columns.reshape(-1, 1) * frequencies
    y = rows.reshape(-1, 1) * frequencies
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
