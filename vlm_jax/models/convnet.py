"""Convolutional encoders: pixels to the features of any of their stages.

n counts images, h and w the rows and columns of a stage, C channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.batch import Images
from vlm_jax.models.layers import ACTIVATIONS, Features, LayerNorm, Linear, Mlp, Stack, drop
from vlm_jax.models.stems import gather, normalised
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.convnets import ConvNet


class Conv(nnx.Module):
    """A convolution, padded so that each stride x stride square gives one place (XLA's SAME).

    `depthwise` filters every channel by itself.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, 1 if depthwise else channels, width)
        # He initialisation: fans count the window.
        noise = jax.random.normal(rngs(), shape)
        self.kernel = nnx.Param(noise * math.sqrt(2 / math.prod(shape[:3])))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None
        self.stride = stride
        self.convolve = depthwise_convolution if depthwise else convolution

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n _h _w _C"]:
        y = self.convolve(x, self.kernel[...].astype(x.dtype), self.stride)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def convolution(
    x: Float[Array, "n h w C"], kernel: Float[Array, "k k I D"], stride: int
) -> Float[Array, "n _h _w D"]:
    """SAME convolution; I < C filters groups of I channels."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def depthwise_convolution(
    x: Float[Array, "n h w C"], kernel: Float[Array, "k k 1 C"], stride: int
) -> Float[Array, "n _h _w C"]:
    """SAME convolution of each channel, by what the platform is fast at.

    XLA's CPU backend takes 10 to 20 times as long for grouped convolutions as for the sum of
    shifted copies.
    """
    plain = functools.partial(convolution, stride=stride)
    return jax.lax.platform_dependent(
        x, kernel, cpu=functools.partial(shifted_sum, stride=stride), default=plain
    )


def shifted_sum(
    x: Float[Array, "n h w C"], kernel: Float[Array, "k k 1 C"], stride: int
) -> Float[Array, "n _h _w C"]:
    """A depthwise SAME convolution as a sum over the places of its window, in float32.

    Rows of the window are scanned: all its places written out take three times as long to compile.
    """
    side, lengths = len(kernel), x.shape[1:3]
    grid = tuple(-(-length // stride) for length in lengths)
    spans = tuple((out - 1) * stride + 1 for out in grid)
    short = [max(span - 1 + side - length, 0) for span, length in zip(spans, lengths)]
    x = jnp.pad(x, [(0, 0), *((total // 2, total - total // 2) for total in short), (0, 0)])

    # Or the backward pass would keep the band of every row.
    @jax.checkpoint
    def row(x, i, weights):
        band = jax.lax.dynamic_slice_in_dim(x, i, spans[0], axis=1)[:, ::stride]
        band, weights = band.astype(jnp.float32), weights.astype(jnp.float32)
        return sum(band[:, :, j : j + spans[1] : stride] * weights[j, 0] for j in range(side))

    def step(total, inputs):
        return total + row(x, *inputs), None

    total = jnp.zeros((len(x), *grid, x.shape[-1]), jnp.float32)
    return jax.lax.scan(step, total, (jnp.arange(side), kernel))[0].astype(x.dtype)


class Squares(nnx.Module):
    """A convolution over squares that do not overlap, as one matrix; a rest at the edge is cut."""

    def __init__(self, channels: int, width: int, side: int, rngs: nnx.Rngs):
        self.embed = Linear((side, side, channels), (width,), bias=True, rngs=rngs)
        self.side = side

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n _h _w D"]:
        rows, columns = (length // self.side * self.side for length in x.shape[1:3])
        squares = gather(x[:, :rows, :columns], self.side)
        shape = (self.side, self.side, x.shape[-1])
        return self.embed(squares.reshape(*squares.shape[:3], *shape))


class ResponseNorm(nnx.Module):
    """Global response normalisation: channels compete by their norm over the image (V2)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "n h w F"]) -> Float[Array, "n h w F"]:
        y = x.astype(jnp.float32)
        # The floor under the root keeps the gradient finite where a channel is silent.
        norms = jnp.sqrt(jnp.maximum(jnp.square(y).sum((1, 2), keepdims=True), 1e-30))
        share = norms / (norms.mean(-1, keepdims=True) + 1e-6)
        return (self.scale[...] * (y * share) + self.bias[...] + y).astype(x.dtype)


class ConvNextBlock(nnx.Module):
    """A depthwise convolution, a norm and a feed-forward part on one scaled residual branch."""

    def __init__(self, convnet: ConvNet, width: int, kernel: int, expand: int, rngs: nnx.Rngs):
        self.depthwise = Conv(width, width, kernel, depthwise=True, bias=True, rngs=rngs)
        self.norm = LayerNorm(width, convnet.norm_eps)
        hidden = expand * width
        self.mlp = Mlp(width, hidden, convnet.activation, gated=False, bias=True, rngs=rngs)
        self.response = ResponseNorm(hidden) if convnet.response_norm else None
        scale = convnet.layer_scale
        self.scale = nnx.Param(jnp.full(width, scale)) if scale else None

    def __call__(self, x: Float[Array, "n h w C"], path_rate, key) -> Float[Array, "n h w C"]:
        y = self.norm(self.depthwise(x))
        if self.response is None:
            y = self.mlp(y)
        else:
            hidden = ACTIVATIONS[self.mlp.activation](self.mlp.up(y))
            y = self.mlp.down(self.response(hidden))
        y = y if self.scale is None else y * self.scale[...].astype(y.dtype)
        return constrain(x + drop(y, path_rate, key, per_row=True), "batch", None, None, None)


class ConvNextStage(nnx.Module):
    """Equal blocks, after a norm and a convolution over squares where places get fewer."""

    def __init__(self, convnet: ConvNet, channels: int, stage: tuple, rngs: nnx.Rngs):
        blocks, width, kernel, stride, expand = stage
        smaller = stride > 1 or channels != width
        self.norm = LayerNorm(channels, convnet.norm_eps) if smaller else None
        self.downsample = Squares(channels, width, stride, rngs) if smaller else None
        make = lambda rngs: ConvNextBlock(convnet, width, kernel, expand, rngs)  # noqa: E731
        self.stack = Stack(make, blocks, remat=convnet.remat, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w C"], rates, key) -> Float[Array, "n _h _w _C"]:
        x = x if self.norm is None else self.downsample(self.norm(x))
        return _run(self.stack, x, rates, key)


class BatchNorm(nnx.Module):
    """Batch normalisation as at inference: by a mean and a variance that training leaves alone."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.Param(jnp.zeros(width))
        self.variance = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        mean, variance = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
        factor = self.scale[...] * jax.lax.rsqrt(variance.astype(jnp.float32) + self.eps)
        return ((x.astype(jnp.float32) - mean) * factor + self.bias[...]).astype(x.dtype)


class MbConv(nnx.Module):
    """An inverted residual block: widen, filter each channel, narrow (Sandler et al. 2018)."""

    def __init__(self, convnet: ConvNet, channels: int, stage: tuple, rngs: nnx.Rngs):
        _, width, kernel, stride, expand = stage
        inner, eps = channels * expand, convnet.norm_eps
        wider = expand > 1
        self.expand = Linear((channels,), (inner,), bias=False, rngs=rngs) if wider else None
        self.norm0 = BatchNorm(inner, eps) if wider else None
        self.depthwise = Conv(inner, inner, kernel, stride, depthwise=True, rngs=rngs)
        self.norm1 = BatchNorm(inner, eps)
        self.project = Linear((inner,), (width,), bias=False, rngs=rngs)
        self.norm2 = BatchNorm(width, eps)
        self.activation = convnet.activation
        self.residual = stride == 1 and channels == width

    def __call__(self, x: Float[Array, "n h w C"], path_rate, key) -> Float[Array, "n _h _w _C"]:
        act = ACTIVATIONS[self.activation]
        y = x if self.expand is None else act(self.norm0(self.expand(x)))
        y = act(self.norm1(self.depthwise(y)))
        y = self.norm2(self.project(y))
        y = x + drop(y, path_rate, key, per_row=True) if self.residual else y
        return constrain(y, "batch", None, None, None)


class MbStage(nnx.Module):
    """A block that changes the width and the number of places, then equal ones."""

    def __init__(self, convnet: ConvNet, channels: int, stage: tuple, rngs: nnx.Rngs):
        blocks, width, kernel, _, expand = stage
        self.first = MbConv(convnet, channels, stage, rngs)
        equal = (blocks, width, kernel, 1, expand)
        make = lambda rngs: MbConv(convnet, width, equal, rngs)  # noqa: E731
        rest = blocks - 1
        self.stack = Stack(make, rest, remat=convnet.remat, rngs=rngs) if rest else None

    def __call__(self, x: Float[Array, "n h w C"], rates, key) -> Float[Array, "n _h _w _C"]:
        keys = (None, None) if key is None else jax.random.split(key)
        x = self.first(x, rates[0], keys[0])
        return x if self.stack is None else _run(self.stack, x, rates[1:], keys[1])


def _run(stack: Stack, x, rates, key):
    apply = lambda block, x, rate, key: (block(x, rate, key), None)  # noqa: E731
    return stack(apply, x, per_layer=rates, key=key)[0]


class ConvNextStem(nnx.Module):
    """Squares of pixels by one matrix, then a norm."""

    def __init__(self, convnet: ConvNet, rngs: nnx.Rngs):
        self.squares = Squares(3, convnet.stem_width, convnet.stem_stride, rngs)
        self.norm = LayerNorm(convnet.stem_width, convnet.norm_eps)

    def __call__(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n h w C"]:
        return self.norm(self.squares(x))


class ConvNormAct(nnx.Module):
    """A convolution, its batch norm and the activation."""

    def __init__(self, convnet: ConvNet, channels: int, width: int, kernel: int, stride: int, rngs):
        self.conv = Conv(channels, width, kernel, stride, rngs=rngs)
        self.norm = BatchNorm(width, convnet.norm_eps)
        self.activation = convnet.activation

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n _h _w _C"]:
        return ACTIVATIONS[self.activation](self.norm(self.conv(x)))


class NormHead(nnx.Module):
    """The mean over places, normalised."""

    def __init__(self, convnet: ConvNet, rngs: nnx.Rngs):
        self.norm = LayerNorm(convnet.stages[-1][1], convnet.final_norm_eps)

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n C"]:
        return self.norm(x.mean((1, 2)))


class ConvHead(nnx.Module):
    """A convolution to more channels, where the preset has one, and the mean over places."""

    def __init__(self, convnet: ConvNet, rngs: nnx.Rngs):
        sizes = (convnet.stages[-1][1], convnet.head, 1, 1)
        self.wider = ConvNormAct(convnet, *sizes, rngs) if convnet.head else None

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n _C"]:
        return (x if self.wider is None else self.wider(x)).mean((1, 2))


def _squeezing_stem(convnet: ConvNet, rngs: nnx.Rngs) -> ConvNormAct:
    return ConvNormAct(convnet, 3, convnet.stem_width, 3, convnet.stem_stride, rngs)


# Stem, stage and head by kind.
PARTS = {
    "convnext": (ConvNextStem, ConvNextStage, NormHead),
    "efficientnet": (_squeezing_stem, MbStage, ConvHead),
}


class ConvNetEncoder(nnx.Module):
    """Pixels through stem and stages to the taps' features, or to one pooled feature.

    The kinds are ConvNeXt (Liu et al. 2022; V2: Woo et al. 2023) and EfficientNet (Tan and Le 2019)
    without squeeze and excitation, the Lite variants.
    """

    def __init__(self, convnet: ConvNet, rngs: nnx.Rngs):
        self.convnet = convnet
        make_stem, make_stage, make_head = PARTS[convnet.kind]
        self.stem = make_stem(convnet, rngs)
        widths = (convnet.stem_width, *(width for _, width, *_ in convnet.stages))
        pairs = list(zip(widths, convnet.stages))[: convnet.computed]
        self.stages = nnx.List([make_stage(convnet, c, stage, rngs) for c, stage in pairs])
        self.head = make_head(convnet, rngs) if convnet.pooled else None
        sizes = (convnet.head or widths[-1],), (convnet.classes,)
        self.classifier = Linear(*sizes, bias=True, rngs=rngs) if convnet.classes else None

    def __call__(self, images: Images, key: Array | None = None) -> Features:
        convnet = self.convnet
        outputs = self.outputs(images, key)
        if convnet.pool == "mean":
            return Features(self.head(outputs[-1])[:, None])
        grids = [_resized(outputs[tap], convnet.grid) for tap in convnet.tapped]
        x = jnp.concatenate(grids, axis=-1)
        return Features(x.reshape(len(x), convnet.patches, -1))

    def outputs(self, images: Images, key: Array | None = None) -> list[Float[Array, "n h w C"]]:
        """What every computed stage gives."""
        convnet, stages = self.convnet, self.convnet.stages
        x = normalised(images.pixels.reshape(-1, *images.pixels.shape[2:]), convnet)
        x = self.stem(x)
        # As in `Vit`: the rate rises linearly from 0 at the first block.
        rates = jnp.linspace(0.0, convnet.drop_path, sum(blocks for blocks, *_ in stages))
        drops = key is not None and convnet.drop_path > 0
        keys = jax.random.split(key, len(stages)) if drops else [None] * len(stages)
        found, start = [], 0
        for stage, (blocks, *_), stage_key in zip(self.stages, stages, keys):
            x = stage(x, rates[start : start + blocks], stage_key)
            start += blocks
            found.append(x)
        return found

    def logits(self, images: Images) -> Float[Array, "n classes"]:
        """Float32 logits of the classifier that the network was trained with."""
        return self.classifier(self.head(self.outputs(images)[-1]), jnp.float32)


def _resized(x: Float[Array, "n h w C"], grid: tuple[int, int]) -> Float[Array, "n _h _w C"]:
    # Without antialiasing, as torch's interpolate that the published systems call.
    shape = (len(x), *grid, x.shape[-1])
    return x if x.shape == shape else jax.image.resize(x, shape, "linear", antialias=False)
