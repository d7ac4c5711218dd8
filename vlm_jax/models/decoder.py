"""Decoders: embeddings, causal blocks, logits. What families differ in is fields of the preset."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.fusion import Cross, Seen
from vlm_jax.models.hooks import Hook, run
from vlm_jax.models.layers import NORMS, Attention, Linear, Mlp, Stack, attend, drop, rotate
from vlm_jax.models.positions import View, slopes, view
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.fusion import CrossAttention


class Cache(NamedTuple):
    """Keys and values of all layers over S slots, filled from the left.

    Every leaf has layers, or blocks between them, on its first axis and rows on its second.
    `seen` is what cross-attention looks at, which no later token changes; None without it.
    """

    keys: Float[Array, "L B G S K"]
    values: Float[Array, "L B G S K"]
    seen: Seen | None = None

    def write(self, key: Float[Array, "B T G K"], value: Float[Array, "B T G K"], layer, start):
        """The cache with these at slot `start` of a layer."""
        return self._replace(
            keys=_written(self.keys, key, layer, start),
            values=_written(self.values, value, layer, start),
        )

    def read(self, layer) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Keys and values of a layer."""
        return tuple(jnp.swapaxes(leaf[layer], 1, 2) for leaf in (self.keys, self.values))


def _written(leaf, new: Float[Array, "B T G K"], layer, start) -> Float[Array, "L B G S K"]:
    new = jnp.swapaxes(new, 1, 2)[None].astype(leaf.dtype)
    return jax.lax.dynamic_update_slice(leaf, new, (layer, 0, 0, start, 0))


class Block(nnx.Module):
    """Causal self-attention and a feed-forward part, each with a norm and a residual."""

    def __init__(self, decoder: Decoder, rngs: nnx.Rngs):
        d, norm = decoder, NORMS[decoder.norm]
        self.decoder = decoder
        self.norm1 = norm(d.width, d.norm_eps)
        self.attention = Attention(
            d.width,
            d.heads,
            d.kv_heads,
            d.head_dim,
            bias=d.qkv_bias,
            out_bias=d.out_bias,
            rngs=rngs,
        )
        self.query_norm = norm(d.head_dim, d.norm_eps) if d.qk_norm else None
        self.key_norm = norm(d.head_dim, d.norm_eps) if d.qk_norm else None
        self.post_norm1 = norm(d.width, d.norm_eps) if d.post_norms else None
        self.norm2 = norm(d.width, d.norm_eps)
        self.mlp = Mlp(d.width, d.mlp, d.activation, gated=d.gated, bias=d.mlp_bias, rngs=rngs)
        self.post_norm2 = norm(d.width, d.norm_eps) if d.post_norms else None

    def __call__(self, x: Float[Array, "B T D"], look: View, cache, layer, start, key):
        """One block; with a cache, its keys and values are written at slot `start` of `layer`."""
        keys = (None,) * 2 if key is None else jax.random.split(key)
        rate = self.decoder.dropout
        if self.decoder.norm_after:
            y, cache = self._attend(x, look, cache, layer, start)
            x = self.norm1(x + drop(y, rate, keys[0]))
            x = self.norm2(x + drop(self.mlp(x), rate, keys[1]))
            return constrain(x, "batch", None, None), cache
        y, cache = self._attend(self.norm1(x), look, cache, layer, start)
        attended = x + drop(y if self.post_norm1 is None else self.post_norm1(y), rate, keys[0])
        y = self.mlp(self.norm2(x if self.decoder.parallel else attended))
        y = drop(y if self.post_norm2 is None else self.post_norm2(y), rate, keys[1])
        return constrain(attended + y, "batch", None, None), cache

    def _attend(self, y: Float[Array, "B T D"], look: View, cache: Cache | None, layer, start):
        query, k, v = self.attention.project(y, y)
        if self.query_norm is not None:
            query, k = self.query_norm(query), self.key_norm(k)
        if look.sin is not None:
            query, k = (rotate(heads, look.sin, look.cos) for heads in (query, k))
        if cache is not None:
            cache = cache.write(k, v, layer, start)
            k, v = cache.read(layer)
        scale = (self.decoder.query_scale or self.decoder.head_dim) ** -0.5
        bias = None
        if look.distance is not None:
            bias = -slopes(self.decoder.heads)[:, None, None] * look.distance
        cap = self.decoder.attention_cap
        prefix = self.attention.prefix
        seen = attend(query, k, v, look.mask, scale=scale, bias=bias, cap=cap, prefix=prefix)
        return self.attention.out(seen), cache


class LanguageModel(nnx.Module):
    """Embeddings, blocks, gated blocks between them where `fusion` says so, the output matrix."""

    def __init__(self, decoder: Decoder, rngs: nnx.Rngs, fusion: CrossAttention | None = None):
        self.decoder = decoder
        # Llama's initializer_range; the first norm makes the scale irrelevant on the way in.
        table = 0.02 * jax.random.normal(rngs(), (decoder.vocab, decoder.embedded))
        self.embedding = nnx.Param(table)
        learned = decoder.position == "learned"
        size = (decoder.positions, decoder.width)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs(), size)) if learned else None
        make = lambda rngs: Block(decoder, rngs)  # noqa: E731
        self.stack = Stack(make, decoder.depth, remat=decoder.remat, rngs=rngs)
        behind = decoder.norm_after
        self.norm = None if behind else NORMS[decoder.norm](decoder.width, decoder.norm_eps)
        sizes = (decoder.embedded,), (decoder.vocab,)
        self.output = None if decoder.tied else Linear(*sizes, bias=False, rngs=rngs)
        added = decoder.added > 0
        size = (decoder.added, decoder.embedded)
        self.added_embedding = nnx.Param(0.02 * jax.random.normal(rngs(), size)) if added else None
        sizes = (decoder.embedded,), (decoder.added,)
        untied = added and not decoder.tied
        self.added_output = Linear(*sizes, bias=False, rngs=rngs) if untied else None
        size = (decoder.embedded,)
        drawn = lambda: nnx.Param(0.02 * jax.random.normal(rngs(), size))  # noqa: E731
        self.mask_embedding = drawn() if decoder.masked else None
        between = decoder.embedding_width > 0
        sizes = (decoder.embedded,), (decoder.width,)
        self.project_in = Linear(*sizes, bias=False, rngs=rngs) if between else None
        sizes = (decoder.width,), (decoder.embedded,)
        self.project_out = Linear(*sizes, bias=False, rngs=rngs) if between else None
        self.cross = None if fusion is None else Cross(fusion, decoder, rngs)

    def embed(
        self, tokens: Int[Array, "B T"], noise: Float[Array, "B T E"] | None = None
    ) -> Float[Array, "B T D"]:
        """Rows of the embedding table, scaled or projected as the preset says.

        `noise` is added to the scaled rows, in the table's width E (see `models.noise`).
        """
        # Cast after the gather, so that the gradients of a frequent token add up in float32.
        if self.added_embedding is None:
            x = self.embedding[...][tokens]
        else:
            known = self.embedding[...][jnp.minimum(tokens, self.decoder.vocab - 1)]
            added = tokens - self.decoder.vocab
            rows = self.added_embedding[...][jnp.maximum(added, 0)]
            x = jnp.where(added[..., None] >= 0, rows, known)
        if self.mask_embedding is not None:
            masked = (tokens == self.decoder.tokens)[..., None]
            x = jnp.where(masked, self.mask_embedding[...], x)
        x = x.astype(self.decoder.dtype)
        if self.decoder.embed_root:  # rounded to the dtype computed in, as Gemma's authors do
            x = x * jnp.asarray(math.sqrt(self.decoder.width), x.dtype)
        x = x if noise is None else x + noise.astype(x.dtype)
        x = x if self.project_in is None else self.project_in(x)
        return constrain(x, "batch", None, None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B 1 T S"],
        cache: Cache | None = None,
        start: int | Int[Array, ""] = 0,
        key_positions: Int[Array, "B S"] | None = None,
        key: Array | None = None,
        hook: Hook | None = None,
        together: Bool[Array, "B 1 T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states before the final norm, and the cache with this call's keys and values.

        Args:
          x: what stands at each position, as `embed` gives it or visual tokens.
          positions: of `x`, counted within each document.
          mask: True where a query may look; a sliding window is taken from it here.
          cache: keys and values of earlier calls; None = there are no others than those of `x`.
          start: slot of the cache where this call's are written.
          key_positions: of all slots of the cache; by default those of `x`.
          key: dropout's; None = evaluation.
          hook: blocks that stand between layers, such as those that `cross.hook` gives.
          together: where query and key are of one block, read unless `window_in_blocks` is set.
        """
        keys = (None,) * 2 if key is None else jax.random.split(key)
        key_positions = positions if key_positions is None else key_positions
        # Tokens are counted from the end of a prefix, as transformers counts behind a cache.
        positions, key_positions = (p + self.prefixed for p in (positions, key_positions))
        if self.positions is not None:
            rows = self.positions[...][positions + self.decoder.position_offset]
            x = x + rows.astype(x.dtype)  # after the gather, as in `embed`
        x = drop(x, self.decoder.dropout, keys[0])
        kinds = sorted(set(self.decoder.layers))
        together = None if self.decoder.window_in_blocks else together
        places = mask, positions, key_positions, together
        views = [view(self.decoder, kind, *places) for kind in kinds]
        which = np.array([kinds.index(kind) for kind in self.decoder.layers])

        def apply(block, carry, inputs, key):
            x, cache = carry
            layer, second = inputs
            look = views[0]
            if len(views) > 1:
                look = jax.tree.map(lambda one, other: jnp.where(second, other, one), *views)
            return block(x, look, cache, layer, start, key), None

        # Carried, not given out layer by layer: so it is written in place. What cross-attention
        # looks at has blocks on its first axis and comes in by the hook.
        own = None if cache is None else cache._replace(seen=None)
        inputs = np.arange(self.decoder.depth), which
        hook = None if hook is None else _on_hidden(hook)
        (x, own), _ = run(self.stack, hook, apply, (x, own), per_layer=inputs, key=keys[1])
        return x, None if cache is None else own._replace(seen=cache.seen)

    @property
    def prefixed(self) -> int:
        """Keys and values that a prefix adapter puts before those of the tokens."""
        prefix = self.stack.first.attention.prefix
        return 0 if prefix is None else prefix.length

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states: the final norm, then the output matrix."""
        x = x if self.norm is None else self.norm(x)
        x = x if self.project_out is None else self.project_out(x)
        logits = _logits(x, self.embedding, self.output)
        if self.added_embedding is not None:
            added = _logits(x, self.added_embedding, self.added_output)
            logits = jnp.concatenate([logits, added], axis=-1)
        cap = self.decoder.logit_cap
        logits = cap * jnp.tanh(logits / cap) if cap else logits
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache of zeros for `rows` rows and `slots` positions."""
        d = self.decoder
        shape = (d.depth, rows, d.kv_heads, slots, d.head_dim)
        return Cache(jnp.zeros(shape, d.dtype), jnp.zeros(shape, d.dtype))

    def apart(self) -> "LanguageModel":
        """The same model for many calls of few tokens: its layers' parameters are cut out once."""
        decoder = nnx.merge(*nnx.split(self))
        decoder.stack = self.stack.apart()
        return decoder


def _on_hidden(hook: Hook) -> Hook:
    """The hook for a carry of hidden states and a cache, which it passes."""

    def apply(block, carry, inputs, key):
        return hook.apply(block, carry[0], inputs, key), carry[1]

    return hook._replace(apply=apply)


def _logits(
    x: Float[Array, "... D"], table: nnx.Param, output: Linear | None
) -> Float[Array, "... V"]:
    if output is not None:
        return output(x, jnp.float32)
    table = table[...].astype(x.dtype)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
