"""Mapping networks: one feature of an image to its visual tokens, after ClipCap (train.py)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.models.layers import Attention, Features, LayerNorm, Linear, Mlp, Stack, drop
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.mapping import Mapping as Preset


class MlpMapper(nnx.Module):
    """Linear, tanh, linear; between them half as many numbers as the visual tokens have."""

    def __init__(self, preset: Preset, features: int, width: int, rngs: nnx.Rngs):
        hidden = preset.queries * width // 2
        self.embed = Linear((features,), (hidden,), bias=True, rngs=rngs)
        self.project = Linear((hidden,), (preset.queries * width,), bias=True, rngs=rngs)
        self.queries = preset.queries

    def __call__(self, x: Float[Array, "n E"]) -> Float[Array, "n Q D"]:
        y = self.project(jnp.tanh(self.embed(x)))
        return y.reshape(len(x), self.queries, -1)


class MapperBlock(nnx.Module):
    """A pre-norm block with ReLU, whose queries, keys and values have no biases."""

    def __init__(self, preset: Preset, width: int, rngs: nnx.Rngs):
        heads = preset.heads
        self.norm1 = LayerNorm(width, preset.norm_eps)
        sizes = width, heads, heads, width // heads
        self.attention = Attention(*sizes, bias=False, out_bias=True, rngs=rngs)
        self.norm2 = LayerNorm(width, preset.norm_eps)
        hidden = preset.mlp or 2 * width
        self.mlp = Mlp(width, hidden, "relu", gated=False, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None)


class TransformerMapper(nnx.Module):
    """Tokens made of the feature, and learned queries behind them that become visual tokens."""

    def __init__(self, preset: Preset, features: int, width: int, rngs: nnx.Rngs):
        self.seeds = preset.seeds
        self.embed = Linear((features,), (preset.seeds * width,), bias=True, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs(), (preset.queries, width)))
        make = lambda rngs: MapperBlock(preset, width, rngs)  # noqa: E731
        self.stack = Stack(make, preset.layers, remat=preset.remat, rngs=rngs)

    def __call__(self, x: Float[Array, "n E"]) -> Float[Array, "n Q D"]:
        seeds = self.embed(x).reshape(len(x), self.seeds, -1)
        queries = self.queries[...].astype(x.dtype)
        queries = jnp.broadcast_to(queries, (len(x), *queries.shape))
        y = jnp.concatenate([seeds, queries], axis=1)
        y, _ = self.stack(lambda block, y, _, key: (block(y), None), y)
        return y[:, self.seeds :]


MAPPERS = {"mlp": MlpMapper, "transformer": TransformerMapper}


class Mapping(nnx.Module):
    """A mapper as a connector, see `models.connectors`."""

    def __init__(self, preset: Preset, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.preset = preset
        self.mapper = MAPPERS[preset.form](preset, encoders[0].features[1], width, rngs)

    def __call__(
        self, seen: tuple[Features, ...], texts=None, key: Array | None = None
    ) -> Float[Array, "n Q D"]:
        tokens = self.mapper(seen[0].x[:, 0].astype(self.preset.dtype))
        return drop(tokens, self.preset.dropout, key)
