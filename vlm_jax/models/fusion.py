"""Cross-attention fusion: gated blocks between decoder layers, by which text looks at images.

N counts images of a row, Q visual tokens of an image, E their width, L blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.hooks import Hook
from vlm_jax.models.layers import NORMS, Attention, Mlp, Stack, attend, drop
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.fusion import CrossAttention


class Seen(NamedTuple):
    """Keys and values of visual tokens, for all blocks or for one."""

    keys: Float[Array, "*L B N Q G K"]
    values: Float[Array, "*L B N Q G K"]


class CrossBlock(nnx.Module):
    """x + tanh(gate) * part(norm(x)) for attention to an image, then for a feed-forward part."""

    def __init__(self, fusion: CrossAttention, width: int, rngs: nnx.Rngs):
        f, norm = fusion, NORMS[fusion.norm]
        self.fusion = fusion
        self.norm1 = norm(width, f.norm_eps)
        self.attention = Attention(
            width,
            f.heads,
            f.kv_heads,
            f.head_dim,
            context=f.width or width,
            bias=False,
            rngs=rngs,
        )
        self.query_norm = norm(f.head_dim, f.norm_eps) if f.qk_norm else None
        self.key_norm = norm(f.head_dim, f.norm_eps) if f.qk_norm else None
        feeds = f.mlp > 0
        self.norm2 = norm(width, f.norm_eps) if feeds else None
        sizes = width, f.mlp, f.activation
        self.mlp = Mlp(*sizes, gated=f.gated, bias=False, rngs=rngs) if feeds else None
        closed, size = f.gate != "none", width if f.gate == "vector" else 1
        self.attention_gate = nnx.Param(jnp.zeros(size)) if closed else None
        self.mlp_gate = nnx.Param(jnp.zeros(size)) if closed and feeds else None

    def project(self, visual: Float[Array, "B N Q E"]) -> Seen:
        """Keys and values of visual tokens."""
        tokens = visual.reshape(visual.shape[0], -1, visual.shape[-1])
        key, value = self.attention.keys_values(tokens)
        key = key if self.key_norm is None else self.key_norm(key)
        shape = (*visual.shape[:3], *key.shape[2:])
        return Seen(key.reshape(shape), value.reshape(shape))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        image_index: Int[Array, "B T"],
        seen: Seen | None,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        """One block; `seen` is None where no row has an image."""
        keys = (None,) * 2 if key is None else jax.random.split(key)
        rate = self.fusion.dropout
        if seen is not None:
            y = drop(self._look(self.norm1(x), image_index, seen), rate, keys[0])
            x = x + _open(self.attention_gate, y)
        if self.mlp is not None:
            x = x + _open(self.mlp_gate, drop(self.mlp(self.norm2(x)), rate, keys[1]))
        return constrain(x, "batch", None, None)

    def _look(self, y: Float[Array, "B T D"], image_index, seen: Seen) -> Float[Array, "B T D"]:
        query = self.attention.queries(y)
        query = query if self.query_norm is None else self.query_norm(query)
        rows, images, queries = seen.keys.shape[:3]
        key, value = (part.reshape(rows, images * queries, *part.shape[3:]) for part in seen)
        found = attend(query, key, value, visible(image_index, images, queries))
        there = image_index[..., None, None] >= 0
        return self.attention.out(jnp.where(there, found, 0))


def _open(gate: nnx.Param | None, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return y if gate is None else jnp.tanh(gate[...]).astype(y.dtype) * y


def visible(image_index: Int[Array, "B T"], images: int, queries: int) -> Bool[Array, "B 1 T S"]:
    """True where a token looks: at all visual tokens, S = N * Q, of its image."""
    owner = jnp.arange(images * queries) // queries
    return (image_index[..., None] == owner)[:, None]


class Cross(nnx.Module):
    """All gated blocks of a decoder."""

    def __init__(self, fusion: CrossAttention, decoder: Decoder, rngs: nnx.Rngs):
        self.fusion, self.dtype = fusion, decoder.dtype
        make = lambda rngs: CrossBlock(fusion, decoder.width, rngs)  # noqa: E731
        self.stack = Stack(make, len(fusion.places(decoder.depth)), remat=decoder.remat, rngs=rngs)

    def project(self, visual: Float[Array, "B N Q E"]) -> Seen:
        """Keys and values of visual tokens for all blocks: what generation computes once."""
        visual = visual.astype(self.dtype)
        apply = lambda block, carry, _, key: (carry, block.project(visual))  # noqa: E731
        return self.stack(apply, None)[1]

    def hook(
        self,
        image_index: Int[Array, "B T"],
        visual: Float[Array, "B N Q E"] | None = None,
        seen: Seen | None = None,
    ) -> Hook:
        """The blocks in their places.

        Args:
          image_index: which image of its row a token looks at, -1 = none.
          visual: visual tokens, of which each block makes its own keys and values.
          seen: or keys and values made by `project`; with neither, no token looks at an image.
        """
        visual = None if visual is None else visual.astype(self.dtype)

        def apply(block, x, seen, key):
            made = block.project(visual) if seen is None and visual is not None else seen
            return block(x, image_index, made, key)

        return Hook(self.stack, self.fusion.start, self.fusion.every, apply, seen)
