"""What makes tokens of pixels: one matrix over patches, or convolutions before it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from vlm_jax.batch import Images
from vlm_jax.models.layers import ACTIVATIONS, LayerNorm, Linear
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.pixels import affine


class PatchStem(nnx.Module):
    """One matrix over flattened patches."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        self.embed = Linear(
            (encoder.patch**2 * 3,), (encoder.width,), bias=encoder.has_bias("patch"), rngs=rngs
        )

    def __call__(self, images: Images, encoder: Encoder) -> Float[Array, "n P D"]:
        patches = images.patches
        if images.starts is None:
            slots = len(patches) * images.grids.shape[1]
            patches = patches.reshape(slots, encoder.patches, patches.shape[-1])
        return self.embed(normalised(patches, encoder))


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
        self.embed = Linear(*sizes, bias=encoder.has_bias("patch"), rngs=rngs)

    def __call__(self, images: Images, encoder: Encoder) -> Float[Array, "n P D"]:
        rows, slots, *shape = images.pixels.shape
        x = normalised(images.pixels.reshape(rows * slots, *shape), encoder)
        for stage in self.stages:
            x = stage(x)
        x = self.embed(gather(x, self.factor))
        return x.reshape(x.shape[0], encoder.patches, encoder.width)


def normalised(x: Shaped[Array, "... C"], preset) -> Float[Array, "... C"]:
    """Pixels or patches in an encoder's dtype; its mean and deviation are applied to bytes.

    Args:
      x: bytes, or floats that are normalised; the last axis is red, green, blue, again and again.
      preset: of the encoder: mean, std and dtype are read.
    """
    if x.dtype == jnp.uint8:
        scale, shift = (jnp.tile(jnp.float32(rgb), x.shape[-1] // 3) for rgb in affine(preset))
        x = x.astype(jnp.float32) * scale - shift
    return x.astype(preset.dtype)


def gather(x: Float[Array, "n h w C"], factor: int) -> Float[Array, "n _h _w _C"]:
    """Moves squares of `factor` x `factor` places into channels (space to depth)."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // factor, factor, width // factor, factor, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // factor, width // factor, factor**2 * channels)


STEMS = {"patch": PatchStem, "conv": ConvStem}
