"""The Spatial Vision Aggregator: queries of a grid look at their windows of every encoder.

n counts images, Q queries, P features, W the inner width, D the width of queries, and K the
features of a window. After Cambrian-1 (Tong et al. 2024) and its code, vision_sampler.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.hooks import Hook
from vlm_jax.models.joining import bilinear, regrid, with_newlines
from vlm_jax.models.layers import Features, LayerNorm, Linear, Mlp, Stack, attend, drop
from vlm_jax.models.stems import gather
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.connectors import feature_grid
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.sva import Samplers as Between
from vlm_jax.presets.sva import Sva as Preset


class Windows(NamedTuple):
    """What samplers look at.

    Attributes:
      context: what an image holds as a whole: the mean of the first encoder's features.
      features: of every encoder, what lies at each query's place.
      mask: True where something is to be seen, over the windows of all encoders one after the
        other; None = everywhere.
    """

    context: Float[Array, "... W"]
    features: tuple[Float[Array, "... Q K W"], ...]
    mask: Bool[Array, "... Q allK"] | None = None


class Visual(NamedTuple):
    """Visual tokens, with what the samplers between decoder layers look at."""

    tokens: Float[Array, "B N Q D"]
    windows: Windows


class Source(nnx.Module):
    """Keys and values of one encoder's windows; places in a window have learned positions."""

    def __init__(self, preset: Preset, window: int, rngs: nnx.Rngs):
        width, heads = preset.width, preset.heads
        shape = (window**2, width)
        self.positions = nnx.Param(jax.random.normal(rngs(), shape)) if window > 1 else None
        self.key_norm = LayerNorm(width, preset.norm_eps)
        self.key = Linear((width,), (heads, width // heads), bias=False, rngs=rngs)
        self.value_norm = LayerNorm(width, preset.norm_eps)
        self.value = Linear((width,), (heads, width // heads), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "n Q K W"]) -> tuple[Float[Array, "n Q K H _K"], ...]:
        if self.positions is not None:
            x = x + self.positions[...].astype(x.dtype)
        key, value = self.key(self.key_norm(x)), self.value(self.value_norm(x))
        spread = "batch", None, None, "heads", None
        return constrain(key, *spread), constrain(value, *spread)


class WindowAttention(nnx.Module):
    """Every query looks at its own windows of all encoders together."""

    def __init__(self, preset: Preset, rngs: nnx.Rngs):
        width, head = preset.width, (preset.heads, preset.width // preset.heads)
        self.query_norm = LayerNorm(width, preset.norm_eps)
        self.query = Linear((width,), head, bias=False, rngs=rngs)
        self.sources = nnx.List([Source(preset, window, rngs) for window in preset.windows])
        self.out = Linear(head, (width,), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "n Q W"], windows: tuple, mask) -> Float[Array, "n Q W"]:
        n, count, _ = x.shape
        seen = [source(w) for source, w in zip(self.sources, windows, strict=True)]
        keys, values = (jnp.concatenate(parts, axis=2) for parts in zip(*seen))
        # Keys differ from query to query: as many sequences of one query each.
        flat = lambda y: y.reshape(n * count, *y.shape[2:])  # noqa: E731
        query = flat(self.query(self.query_norm(x)))[:, None]
        mask = None if mask is None else flat(mask)[:, None, None]
        attended = attend(query, flat(keys), flat(values), mask)
        return self.out(attended.reshape(n, count, *attended.shape[2:]))


class SamplerBlock(nnx.Module):
    """One joint cross-attention layer over the windows of all encoders."""

    def __init__(self, preset: Preset, width: int, rngs: nnx.Rngs):
        inner = preset.width
        self.context = Linear((inner,), (inner,), bias=False, rngs=rngs)
        self.embed = Linear((width + inner,), (inner,), bias=False, rngs=rngs)
        self.attention = WindowAttention(preset, rngs)
        self.norm = LayerNorm(inner, preset.norm_eps)
        self.mlp = Mlp(inner, inner, "gelu", gated=False, bias=False, out=width, rngs=rngs)

    def __call__(
        self, queries: Float[Array, "n Q D"], context: Float[Array, "n W"], windows: tuple, mask
    ) -> Float[Array, "n Q D"]:
        context = self.context(context)[:, None]
        context = jnp.broadcast_to(context, (*queries.shape[:2], context.shape[-1]))
        x = self.embed(jnp.concatenate([queries, context], axis=-1))
        x = x + self.attention(x, windows, mask)
        return constrain(queries + self.mlp(self.norm(x)), "batch", None, None)


class Sampler(nnx.Module):
    """Layers by which queries gather what their windows hold.

    Args:
      preset: inner width, heads, windows and epsilons are read.
      width: of the queries.
      layers: how many.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, preset: Preset, width: int, layers: int, rngs: nnx.Rngs):
        make = lambda rngs: SamplerBlock(preset, width, rngs)  # noqa: E731
        self.stack = Stack(make, layers, remat=preset.remat, rngs=rngs)

    def __call__(self, queries: Float[Array, "n Q D"], windows: Windows) -> Float[Array, "n Q D"]:
        """Queries, of a grid and row by row, that have looked."""

        def apply(block, queries, _, key):
            return block(queries, *windows), None

        queries, _ = self.stack(apply, queries)
        return queries


class Samplers(nnx.Module):
    """Blocks between the layers of a decoder, by which visual tokens go on looking at images.

    After Cambrian's cambrian_llama.py, where an image has one place in all prompts; here its visual
    tokens stand where `Batch.visual_index` says, each at one place.

    Args:
      samplers: where they stand.
      preset: of the connector, whose windows they look at.
      decoder: its width and whether it recomputes activations are read, and its dtype is used.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, samplers: Between, preset: Preset, decoder: Decoder, rngs: nnx.Rngs):
        self.samplers, self.preset, self.dtype = samplers, preset, decoder.dtype
        make = lambda rngs: SamplerBlock(preset, decoder.width, rngs)  # noqa: E731
        self.stack = Stack(make, samplers.count, remat=decoder.remat, rngs=rngs)

    def hook(self, visual_index: Int[Array, "B T"], windows: Windows) -> Hook:
        """The blocks in their places.

        Args:
          visual_index: which visual token of its row stands at a position, -1 = none.
          windows: of every image slot, [B, N, ...].
        """
        rows, images = windows.context.shape[:2]
        flat = lambda x: x.reshape(rows * images, *x.shape[2:])  # noqa: E731
        context, features, mask = jax.tree.map(flat, windows)
        context, features = jax.tree.map(lambda x: x.astype(self.dtype), (context, features))
        query = self._queries(visual_index)
        places = _places(query, images * self.preset.side**2)

        def apply(block, x, _, key):
            queries = jnp.take_along_axis(x, places[..., None], axis=1)
            queries = queries.reshape(rows * images, -1, x.shape[-1])
            queries = block(queries, context, features, mask).reshape(rows, -1, x.shape[-1])
            looked = jnp.take_along_axis(queries, jnp.maximum(query, 0)[..., None], axis=1)
            return jnp.where(query[..., None] >= 0, looked, x)

        return Hook(self.stack, self.samplers.start + 1, self.samplers.stride, apply)

    def _queries(self, visual_index: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Which query of all images of its row stands at a position; -1 = none, or a newline."""
        side, newline = self.preset.side, self.preset.newline
        line, column = jnp.divmod(visual_index, side + newline)
        return jnp.where((visual_index >= 0) & (column < side), line * side + column, -1)


def _places(query: Int[Array, "B T"], count: int) -> Int[Array, "B NQ"]:
    """At which position each of so many queries stands, 0 for those that stand nowhere."""
    rows, positions = query.shape
    beyond = jnp.where(query >= 0, query, count)
    places = jnp.zeros((rows, count), jnp.int32)
    return places.at[jnp.arange(rows)[:, None], beyond].set(jnp.arange(positions), mode="drop")


class Aux(nnx.Module):
    """Brings one encoder's features to the inner width: Linear, GELU, Linear, LayerNorm."""

    def __init__(self, preset: Preset, features: int, rngs: nnx.Rngs):
        sizes = (features, preset.width), (preset.width, preset.width)
        self.layers = nnx.List([Linear((i,), (o,), bias=True, rngs=rngs) for i, o in sizes])
        self.norm = LayerNorm(preset.width, preset.norm_eps)

    def __call__(self, x: Float[Array, "n P E"]) -> Float[Array, "n P W"]:
        first, second = self.layers
        return self.norm(second(jax.nn.gelu(first(x), approximate=False)))


class Sva(nnx.Module):
    """Features of several encoders to visual tokens: connectors' arguments, see
    `models.connectors`."""

    def __init__(self, preset: Preset, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.preset, self.encoders = preset, encoders
        self.aux = nnx.List([Aux(preset, encoder.features[1], rngs) for encoder in encoders])
        # One query for all places: what makes them differ is what they see.
        noise = jax.random.normal(rngs(), (preset.width,))
        self.query = nnx.Param(noise / math.sqrt(preset.width))
        self.sampler = Sampler(preset, preset.width, preset.layers, rngs)
        sizes = (preset.width, width), (width, width)
        self.layers = nnx.List([Linear((i,), (o,), bias=True, rngs=rngs) for i, o in sizes])
        noise = jax.random.normal(rngs(), (width,)) / math.sqrt(width)
        self.newline = nnx.Param(noise) if preset.newline else None

    def __call__(
        self, seen: tuple[Features, ...], texts=None, key: Array | None = None
    ) -> Float[Array, "n Q D"]:
        return self.tokens(self.windows(seen), key)

    def tokens(self, windows: Windows, key: Array | None = None) -> Float[Array, "n Q D"]:
        """Visual tokens of images by what their windows hold."""
        preset = self.preset
        queries = self.query[...].astype(preset.dtype)
        queries = jnp.broadcast_to(queries, (len(windows.context), preset.side**2, preset.width))
        x = self.sampler(queries, windows)
        first, second = self.layers
        x = second(jax.nn.gelu(first(x), approximate=False))
        if self.newline is not None:
            x = with_newlines(x, self.newline[...], preset.side)
        return drop(x, preset.dropout, key)

    def windows(self, seen: tuple[Features, ...]) -> Windows:
        """What samplers look at."""
        found = [self._projected(i, features) for i, features in enumerate(seen)]
        context = found[0].mean(axis=1)
        windows = tuple(_windows(x, self.preset.side) for x in found)
        if all(features.mask is None for features in seen):
            return Windows(context, windows)
        masks = [self._visible(i, features) for i, features in enumerate(seen)]
        return Windows(context, windows, jnp.concatenate(masks, axis=-1))

    def _projected(self, i: int, features: Features) -> Float[Array, "n P W"]:
        side, grid = self.preset.sides[i], feature_grid(self.encoders[i])
        x = regrid(features.x, grid, (side, side), bilinear)
        return self.aux[i](x.astype(self.preset.dtype))

    def _visible(self, i: int, features: Features) -> Bool[Array, "n Q K"]:
        """A window in which nothing is to be seen is looked at as a whole, as Cambrian's are."""
        side, grid = self.preset.sides[i], feature_grid(self.encoders[i])
        mask = features.mask
        mask = jnp.ones(features.x.shape[:2], bool) if mask is None else mask
        share = regrid(mask[..., None].astype(jnp.float32), grid, (side, side), bilinear)
        visible = _windows(share, self.preset.side)[..., 0] >= 0.5
        return visible | ~visible.any(axis=-1, keepdims=True)


def _windows(x: Float[Array, "n P W"], side: int) -> Float[Array, "n Q K W"]:
    """Cuts a square grid into `side` x `side` windows."""
    n, count, width = x.shape
    whole = math.isqrt(count)
    gathered = gather(x.reshape(n, whole, whole, width), whole // side)
    return gathered.reshape(n, side**2, -1, width)
