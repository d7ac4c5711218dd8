"""The vision transformer: pixels or patches of square images to patch features.

A pre-norm ViT as in big_vision (models/vit.py): learned or sincos2d positions, biases everywhere,
an optional attention-pooling head. n counts images, whatever row they came from.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.batch import Images
from vlm_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Features,
    LayerNorm,
    Linear,
    Mlp,
    Stack,
    drop,
)
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


class ConvBlock(nnx.Module):
    """A residual 3x3 convolution: `x + out(act(norm(conv(x))))`."""

    def __init__(self, encoder: Encoder, width: int, rngs: nnx.Rngs):
        # He initialisation; one output in nine reaches any place, so fans count the window.
        noise = jax.random.normal(rngs(), (3, 3, width, width))
        self.conv = nnx.Param(noise * math.sqrt(2 / (9 * width)))
        self.norm = LayerNorm(width, encoder.norm_eps)
        self.out = Linear((width,), (width,), bias=True, rngs=rngs)
        self.activation = encoder.activation

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n h w C"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.conv[...].astype(x.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + self.out(ACTIVATIONS[self.activation](self.norm(y)))


class ConvStage(nnx.Module):
    """Gathers `factor` x `factor` places into channels, then residual convolutions."""

    def __init__(self, encoder: Encoder, channels: int, stage: tuple, rngs: nnx.Rngs):
        self.factor, width, blocks = stage
        self.embed = Linear((channels * self.factor**2,), (width,), bias=True, rngs=rngs)
        self.norm = LayerNorm(width, encoder.norm_eps)
        self.blocks = nnx.List([ConvBlock(encoder, width, rngs) for _ in range(blocks)])
        self.activation = encoder.activation

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n _h _w _C"]:
        x = ACTIVATIONS[self.activation](self.norm(self.embed(gather(x, self.factor))))
        for block in self.blocks:
            x = block(x)
        return x


class ConvStem(nnx.Module):
    """Stages of convolutions, then one matrix over what a patch has become (a hybrid ViT)."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        widths = (3, *(width for _, width, _ in encoder.stem_stages))
        pairs = zip(widths[:-1], encoder.stem_stages, strict=True)
        self.stages = nnx.List([ConvStage(encoder, c, stage, rngs) for c, stage in pairs])
        self.factor = encoder.patch // math.prod(f for f, _, _ in encoder.stem_stages)
        sizes = (widths[-1] * self.factor**2,), (encoder.width,)
        self.embed = Linear(*sizes, bias=True, rngs=rngs)

    def __call__(self, images: Images, encoder: Encoder) -> Float[Array, "n P D"]:
        rows, slots, *shape = images.pixels.shape
        x = images.pixels.reshape(rows * slots, *shape).astype(encoder.dtype)
        for stage in self.stages:
            x = stage(x)
        x = self.embed(gather(x, self.factor))
        return x.reshape(x.shape[0], encoder.patches, encoder.width)


def gather(x: Float[Array, "n h w C"], factor: int) -> Float[Array, "n _h _w _C"]:
    """Moves squares of `factor` x `factor` places into channels (space to depth)."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // factor, factor, width // factor, factor, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // factor, width // factor, factor**2 * channels)


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
    """Images to features, one per patch, or one in all when pooled."""

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

    def __call__(self, images: Images, key: Array | None = None) -> Features:
        encoder = self.encoder
        x = self.stem(images, encoder)
        x = constrain(x + self._positions().astype(x.dtype), "batch", None, None)
        # Stochastic depth's rate rises linearly from 0 at the first block (Huang et al. 2016).
        rates = jnp.linspace(0.0, encoder.drop_path, encoder.depth)

        def apply(block, x, rate, key):
            return block(x, rate if encoder.drop_path else 0.0, key), None

        x, _ = self.stack(apply, x, per_layer=rates, key=key)
        x = x if self.norm is None else self.norm(x)
        return Features(x if self.head is None else self.head(x))

    def _positions(self) -> Float[Array, "P D"]:
        if self.positions is not None:
            return self.positions[...]
        return sincos2d(self.encoder.grid, self.encoder.width)


def sincos2d(
    grid: tuple[int, int], width: int, temperature: float = 10_000.0
) -> Float[Array, "P D"]:
    """Fixed positions of a grid: sines and cosines of column, then row (MoCo-v3).

    Raises:
      ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4, not {width}")
    rows, columns = jnp.mgrid[: grid[0], : grid[1]]
    frequencies = temperature ** (-jnp.arange(width // 4) / (width // 4 - 1))
    x = columns.reshape(-1, 1) * frequencies
    y = rows.reshape(-1, 1) * frequencies
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
