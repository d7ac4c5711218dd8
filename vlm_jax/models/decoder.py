"""The decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.layers import Attention, Linear, Mlp, RMSNorm, Stack, attend, drop, rotate
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.decoders import Decoder


class Cache(NamedTuple):
    """Keys and values of all layers over S slots, filled from the left."""

    keys: Float[Array, "L B S G K"]
    values: Float[Array, "L B S G K"]


class Block(nnx.Module):
    """Causal self-attention and SwiGLU, each behind an RMSNorm and a residual."""

    def __init__(self, decoder: Decoder, rngs: nnx.Rngs):
        width = decoder.width
        self.decoder = decoder
        self.norm1 = RMSNorm(width, decoder.norm_eps)
        self.attention = Attention(
            width, decoder.heads, decoder.kv_heads, decoder.head_dim, bias=False, rngs=rngs
        )
        self.norm2 = RMSNorm(width, decoder.norm_eps)
        self.mlp = Mlp(width, decoder.mlp, "silu", gated=True, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], positions, mask, cache, start, key):
        """One block; with a cache, keys and values are written at slot `start` and read from it."""
        keys = (None,) * 2 if key is None else jax.random.split(key)
        theta, rate = self.decoder.rope_theta, self.decoder.dropout
        y = self.norm1(x)
        query, k, v = self.attention.project(y, y)
        query, k = rotate(query, positions, theta), rotate(k, positions, theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=1)
            cache = Cache(k, v)
        x = x + drop(self.attention.out(attend(query, k, v, mask)), rate, keys[0])
        x = x + drop(self.mlp(self.norm2(x)), rate, keys[1])
        return constrain(x, "batch", None, None), cache


class LanguageModel(nnx.Module):
    """Embeddings, blocks and the output matrix."""

    def __init__(self, decoder: Decoder, rngs: nnx.Rngs):
        self.decoder = decoder
        # Llama's initializer_range; the first norm makes the scale irrelevant on the way in.
        table = 0.02 * jax.random.normal(rngs(), (decoder.vocab, decoder.width))
        self.embedding = nnx.Param(table)
        make = lambda rngs: Block(decoder, rngs)  # noqa: E731
        self.stack = Stack(make, decoder.depth, remat=decoder.remat, rngs=rngs)
        self.norm = RMSNorm(decoder.width, decoder.norm_eps)
        sizes = (decoder.width,), (decoder.vocab,)
        self.output = None if decoder.tied else Linear(*sizes, bias=False, rngs=rngs)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        # Cast after the gather, so that the gradients of a frequent token add up in float32.
        x = self.embedding[...][tokens].astype(self.decoder.dtype)
        return constrain(x, "batch", None, None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B 1 T S"],
        cache: Cache | None = None,
        start: int | Int[Array, ""] = 0,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states before the final norm, and the cache with this call's keys and values."""
        keys = (None,) * 2 if key is None else jax.random.split(key)
        x = drop(x, self.decoder.dropout, keys[0])

        def apply(block, x, cache, key):
            return block(x, positions, mask, cache, start, key)

        return self.stack(apply, x, per_layer=cache, key=keys[1])

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states: the final norm, then the output matrix."""
        x = self.norm(x)
        if self.output is None:
            table = self.embedding[...].astype(x.dtype)
            logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        else:
            logits = self.output(x, jnp.float32)
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache of zeros for `rows` rows and `slots` positions."""
        d = self.decoder
        shape = (d.depth, rows, slots, d.kv_heads, d.head_dim)
        return Cache(jnp.zeros(shape, d.dtype), jnp.zeros(shape, d.dtype))
