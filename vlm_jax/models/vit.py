"""The vision transformer: pixels or patches to patch features.

Every difference between published towers is a field of `presets.encoders.Encoder`. n counts images,
whatever row they came from, or in the blocks the rows of packed ones (`packed.py`).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vlm_jax.batch import Images
from vlm_jax.models import grids, packed
from vlm_jax.models.layers import (
    NORMS,
    Attention,
    Features,
    LayerNorm,
    Mlp,
    Stack,
    attend,
    drop,
)
from vlm_jax.models.stems import STEMS
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.encoders import Encoder


class LayerScale(nnx.Module):
    """A learned factor per channel on a branch (Touvron et al. 2021)."""

    def __init__(self, width: int, start: float):
        self.scale = nnx.Param(jnp.full(width, start))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x * self.scale[...].astype(x.dtype)


class Block(nnx.Module):
    """Self-attention and feed-forward part, each with a norm and a residual.

    Called with tokens, the attention between them, rotary angles, the rate of stochastic depth,
    dropout's key, and of packed rows whose tokens stand where.
    """

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        self.encoder = encoder
        width, heads, size = encoder.width, encoder.heads, encoder.key_width
        make_norm, eps = NORMS[encoder.norm], encoder.norm_eps
        query, key, value, out = (encoder.has_bias(p) for p in ("query", "key", "value", "out"))
        biases = {"bias": query, "key_bias": key, "value_bias": value, "out_bias": out}
        self.norm1 = make_norm(width, eps)
        self.attention = Attention(width, heads, heads, size, **biases, rngs=rngs)
        self.inner_norm = LayerNorm(heads * size, eps) if encoder.inner_norm else None
        self.norm2 = make_norm(width, eps)
        self.mlp = Mlp(
            width,
            encoder.mlp,
            encoder.activation,
            gated=encoder.gated,
            bias=encoder.has_bias("mlp"),
            inner_eps=eps if encoder.inner_norm else 0.0,
            rngs=rngs,
        )
        start = encoder.layer_scale
        self.scale1, self.scale2 = (LayerScale(width, start) if start else None for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "n T D"],
        look: Callable,
        angle: Float[Array, "m T 1 R"] | None,
        path_rate: Float[Array, ""] | float,
        key,
        rows: packed.Rows | None = None,
    ) -> Float[Array, "n T D"]:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        attention = lambda y: self._attention(y, look, angle)  # noqa: E731
        y = self._branch(x, attention, self.norm1, self.scale1)
        x = x + _drop_path(drop(y, self.encoder.dropout, keys[0]), path_rate, keys[1], rows)
        y = self._branch(x, self.mlp, self.norm2, self.scale2)
        x = x + _drop_path(drop(y, self.encoder.dropout, keys[2]), path_rate, keys[3], rows)
        return constrain(x, "batch", None, None)

    def _branch(self, x, function, norm, scale) -> Float[Array, "n T D"]:
        y = norm(function(x)) if self.encoder.post_norm else function(norm(x))
        return y if scale is None else scale(y)

    def _attention(self, x, look, angle) -> Float[Array, "n T D"]:
        query, key, value = self.attention.project(x, x)
        if angle is not None:
            query, key = grids.rotate_pairs(query, angle), grids.rotate_pairs(key, angle)
        scale, prefix = self.encoder.attention_scale or None, self.attention.prefix
        y = look(query, key, value, scale=scale, prefix=prefix)
        if self.inner_norm is not None:
            y = self.inner_norm(y.reshape(*x.shape[:2], -1)).reshape(y.shape)
        return self.attention.out(y)


class MapHead(nnx.Module):
    """Multi-head attention pooling: one learned probe looks at all patches (SigLIP, big_vision)."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        width, heads = encoder.width, encoder.heads
        bound = math.sqrt(6 / (1 + width))
        self.probe = nnx.Param(jax.random.uniform(rngs(), (width,), minval=-bound, maxval=bound))
        self.attention = Attention(width, heads, heads, width // heads, bias=True, rngs=rngs)
        self.norm = LayerNorm(width, encoder.norm_eps)
        self.mlp = Mlp(width, encoder.mlp, encoder.activation, gated=False, bias=True, rngs=rngs)

    def __call__(
        self, x: Float[Array, "n P D"], mask: Bool[Array, "n 1 1 P"] | None
    ) -> Float[Array, "n 1 D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        pooled = self.attention(probe, x, mask)
        return pooled + self.mlp(self.norm(pooled))


class Vit(nnx.Module):
    """Images to features, one per patch, or one in all when pooled."""

    def __init__(self, encoder: Encoder, rngs: nnx.Rngs):
        self.encoder = encoder
        width, make_norm, eps = encoder.width, NORMS[encoder.norm], encoder.norm_eps
        rows, columns = encoder.table_grid
        learn = lambda *shape: nnx.Param(jax.random.normal(rngs(), shape) / math.sqrt(width))  # noqa: E731
        self.stem = STEMS[encoder.stem](encoder, rngs)
        learned, crossed = (encoder.position == kind for kind in ("learned", "row_column"))
        entries = encoder.class_token + rows * columns
        self.positions = learn(entries, width) if learned else None
        self.row_positions = learn(rows, width) if crossed else None
        self.column_positions = learn(columns, width) if crossed else None
        self.class_token = learn(width) if encoder.class_token else None
        self.registers = learn(encoder.registers, width) if encoder.registers else None
        self.pre_norm = make_norm(width, eps) if encoder.pre_norm else None
        make = lambda rngs: Block(encoder, rngs)  # noqa: E731
        self.stack = Stack(make, encoder.blocks, remat=encoder.remat, rngs=rngs)
        self.norm = make_norm(width, eps) if encoder.final_norm else None
        self.head = MapHead(encoder, rngs) if encoder.pool == "map" else None

    def __call__(self, images: Images, key: Array | None = None) -> Features:
        encoder = self.encoder
        x, mask = self._run(images, key)
        before = encoder.class_token + encoder.registers
        if encoder.pool == "class":
            return Features(self._normed(x[:, :1]))
        first = x[:, : encoder.keep_class]
        x = self._normed(jnp.concatenate([first, x[:, before:]], axis=1))
        mask = _looked_at(mask, int(encoder.keep_class))
        if self.head is not None:
            return Features(self.head(x, mask))
        return Features(x, None if mask is None else mask[:, 0, 0])

    def tokens(self, images: Images) -> Float[Array, "n T D"]:
        """All tokens after the last block: class token, registers, patches; normed as features."""
        return self._normed(self._run(images, None)[0])

    def _normed(self, x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
        return x if self.norm is None else self.norm(x)

    def _run(
        self, images: Images, key: Array | None
    ) -> tuple[Float[Array, "n T _D"], Bool[Array, "n P"] | None]:
        """All tokens after the last block, or of all taps, and which patches there are."""
        encoder = self.encoder
        before = encoder.class_token + encoder.registers
        seen = grids.places(images, encoder)
        rows = None if images.starts is None else packed.rows(images, before, encoder.patches)
        # As many of each token before the patches as a sequence has images.
        slots = 1 if rows is None else images.grids.shape[1]
        x = self.stem(images, encoder)
        x = constrain(x + self._positions(seen).astype(x.dtype), "batch", None, None)
        x = self._prefixed(x, slots)
        x = x if self.pre_norm is None else self.pre_norm(x)
        angle = self._angles(seen, slots * before)
        look = functools.partial(attend, mask=_looked_at(seen.mask, before))
        look = look if rows is None else functools.partial(packed.attention, rows=rows)
        # Stochastic depth's rate rises linearly from 0 at the first block (Huang et al. 2016).
        rates = jnp.linspace(0.0, encoder.drop_path, encoder.depth)[: encoder.blocks]

        def apply(block, x, rate, key):
            x = block(x, look, angle, rate if encoder.drop_path else 0.0, key, rows)
            return x, x if encoder.taps else None

        last, outputs = self.stack(apply, x, per_layer=rates, key=key)
        if encoder.taps:
            # Counted from the last block of the published tower, which need not run.
            outputs = jnp.concatenate([x[None], outputs])
            tapped = [outputs[encoder.depth + 1 + tap] for tap in encoder.taps]
            last = jnp.concatenate(tapped, axis=-1)
        if rows is None:
            return last, seen.mask
        return packed.apart(last, rows), rows.there[..., before:].reshape(-1, encoder.patches)

    def _positions(self, seen: grids.Places) -> Float[Array, "m P D"] | Float[Array, ""]:
        """What is added to the patches."""
        encoder = self.encoder
        if encoder.position == "sincos2d":
            return grids.sincos2d(encoder.grid, encoder.width)
        if encoder.position == "row_column":
            # Entry 0 is for padding, which nothing looks at: what it is given does not matter.
            row, column = seen.at[..., 0] + 1, seen.at[..., 1] + 1
            return self.row_positions[...][row] + self.column_positions[...][column]
        if encoder.position == "none":
            return jnp.zeros(())
        table = self.positions[...][int(encoder.class_token) :]
        if not encoder.max_patches and encoder.table_grid == encoder.grid:
            return table
        table = table.reshape(*encoder.table_grid, encoder.width)
        return grids.resized(table, seen, encoder.position_resize)

    def _prefixed(self, x: Float[Array, "n P D"], slots: int) -> Float[Array, "n T D"]:
        """With the class token, which has the first learned position, and registers before it.

        Of `slots` images those of the first, then those of the second and so on.
        """
        tokens = []
        if self.class_token is not None:
            first = 0.0 if self.positions is None else self.positions[...][0]
            tokens.append((self.class_token[...] + first)[None])
        if self.registers is not None:
            tokens.append(self.registers[...])
        if not tokens:
            return x
        tokens = jnp.tile(jnp.concatenate(tokens), (slots, 1)).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)

    def _angles(self, seen: grids.Places, before: int) -> Float[Array, "m T 1 R"] | None:
        """Rotary angles; tokens before the patches are not turned."""
        if not self.encoder.rotary_grid:
            return None
        angle = grids.angles(seen, self.encoder.rotary_grid, self.encoder.key_width)
        return jnp.pad(angle, ((0, 0), (before, 0), (0, 0), (0, 0)))


def _drop_path(x: Float[Array, "n T D"], rate, key, rows: packed.Rows | None):
    """Stochastic depth: drops a branch of whole images."""
    if key is None or rows is None or (isinstance(rate, float) and rate == 0.0):
        return drop(x, rate, key, per_row=True)
    keep = drop(jnp.ones((*rows.tokens.shape[:2], 1)), rate, key)
    return (x * packed.of_tokens(keep, rows)).astype(x.dtype)


def _looked_at(mask: Bool[Array, "n P"] | None, before: int) -> Bool[Array, "n 1 1 T"] | None:
    """The mask of keys, with so many tokens before the patches."""
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (before, 0)), constant_values=True)[:, None, None]
