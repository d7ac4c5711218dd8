"""Connectors: features of an image to its visual tokens of the decoder's width.

Made of a preset, the presets of all encoders, the decoder's width and a source of random numbers.
Called with what each encoder saw, the second text of each image `Int[n S]` (0 = padding) or None,
and dropout's key or None; the result is `Float[n Q D]`.

n counts images, P features, Q visual tokens, E the features' width, D the decoder's.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.joining import joined, with_newlines
from vlm_jax.models.layers import (
    ACTIVATIONS,
    NORMS,
    Attention,
    Features,
    Linear,
    Mlp,
    Stack,
    attend,
    attention_weights,
    drop,
)
from vlm_jax.models.mapping import Mapping
from vlm_jax.models.qformer import QFormer
from vlm_jax.models.sva import Sva
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.connectors import Connector

Texts = Int[Array, "n S"] | None
Mask = Bool[Array, "n 1 1 S"] | None


class Projector(nnx.Module):
    """Linear layers with an activation between them, or none; one visual token per feature."""

    def __init__(self, connector: Connector, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.connector, self.encoders = connector, encoders
        _, _, features = connector.pooled(encoders)
        normed = connector.input_norm != "none"
        self.input_norm = _norm(connector.input_norm, features, connector) if normed else None
        sizes = itertools.pairwise(connector.sizes(features, width))
        self.layers = nnx.List(
            [Linear((i,), (o,), bias=connector.bias, rngs=rngs) for i, o in sizes]
        )
        if self.layers:
            _rescale(self.layers[-1], connector)
        self.newline = _newline(connector, width, rngs)

    def __call__(self, seen: tuple[Features, ...], texts: Texts = None, key: Array | None = None):
        x = joined(self.connector, self.encoders, seen).x.astype(self.connector.dtype)
        x = x if self.input_norm is None else self.input_norm(x)
        for i, layer in enumerate(self.layers):
            x = layer(ACTIVATIONS[self.connector.activation](x) if i else x)
        return _finished(self, x, key)


class Flat(nnx.Module):
    """One linear layer from all features of an image to all its visual tokens."""

    def __init__(self, connector: Connector, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.connector, self.encoders = connector, encoders
        _, count, features = connector.pooled(encoders)
        normed = connector.input_norm != "none"
        self.input_norm = _norm(connector.input_norm, features, connector) if normed else None
        outputs = connector.queries, connector.output(width)
        self.flat = Linear((count, features), outputs, bias=connector.bias, rngs=rngs)
        _rescale(self.flat, connector)
        self.newline = _newline(connector, width, rngs)

    def __call__(self, seen: tuple[Features, ...], texts: Texts = None, key: Array | None = None):
        x = joined(self.connector, self.encoders, seen).x.astype(self.connector.dtype)
        x = x if self.input_norm is None else self.input_norm(x)
        return _finished(self, self.flat(x), key)


class PerceiverBlock(nnx.Module):
    """Latents look at the patches and at each other, then a feed-forward part."""

    def __init__(self, connector: Connector, width: int, rngs: nnx.Rngs):
        head_dim = connector.head_dim or width // connector.heads
        self.connector = connector
        self.norm_latents = _norm(connector.norm, width, connector)
        self.norm_context = _norm(connector.norm, width, connector)
        heads = connector.heads, connector.kv_heads, head_dim
        self.attention = Attention(width, *heads, bias=connector.block_bias, rngs=rngs)
        normed = connector.qk_norm
        self.query_norm = _norm(connector.norm, head_dim, connector) if normed else None
        self.key_norm = _norm(connector.norm, head_dim, connector) if normed else None
        self.norm_mlp = _norm(connector.norm, width, connector)
        self.mlp = Mlp(
            width,
            connector.hidden or 4 * width,
            connector.mlp_activation,
            gated=connector.gated,
            bias=connector.block_bias,
            inner_eps=connector.mlp_norm_eps,
            rngs=rngs,
        )

    def project(self, latents: Float[Array, "n Q D"], context: Float[Array, "n P D"]):
        """Queries, keys and values of normed latents: keys are the patches', then the latents'."""
        keys = jnp.concatenate([self.norm_context(context), latents], axis=1)
        query, key, value = self.attention.project(latents, keys)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def __call__(
        self, latents: Float[Array, "n Q D"], context: Float[Array, "n P D"], mask: Mask = None
    ) -> Float[Array, "n Q D"]:
        normed = self.norm_latents(latents)
        attended = self.attention.out(attend(*self.project(normed, context), mask))
        latents = (normed if self.connector.normed_residual else latents) + attended
        latents = latents + self.mlp(self.norm_mlp(latents))
        return constrain(latents, "batch", None, None)


class Perceiver(nnx.Module):
    """Perceiver resampler: learned queries pool any number of patches to Q visual tokens."""

    def __init__(self, connector: Connector, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.connector, self.encoders = connector, encoders
        _, _, features = connector.pooled(encoders)
        out = connector.output(width)
        inner = connector.width or out
        linear, swiglu = connector.embed == "linear", connector.embed == "swiglu"
        self.embed = Linear((features,), (inner,), bias=False, rngs=rngs) if linear else None
        sizes = features, connector.embed_hidden, "silu"
        made = Mlp(*sizes, gated=True, bias=False, out=inner, rngs=rngs) if swiglu else None
        self.embed_mlp = made
        # Unit scale: the block's norm would undo any other, and ones (Idefics2) start all alike.
        self.queries = nnx.Param(jax.random.normal(rngs(), (connector.queries, inner)))
        make = lambda rngs: PerceiverBlock(connector, inner, rngs)  # noqa: E731
        self.stack = Stack(make, connector.layers, remat=connector.remat, rngs=rngs)
        self.norm = _norm(connector.norm, inner, connector) if connector.final_norm else None
        wider = inner != out
        bias = connector.block_bias
        self.project = Linear((inner,), (out,), bias=bias, rngs=rngs) if wider else None
        self.newline = _newline(connector, width, rngs)

    def __call__(self, seen: tuple[Features, ...], texts: Texts = None, key: Array | None = None):
        latents, context, mask = self._start(seen)

        def apply(block, latents, _, key):
            return block(latents, context, mask), None

        y, _ = self.stack(apply, latents)
        y = y if self.norm is None else self.norm(y)
        return _finished(self, y if self.project is None else self.project(y), key)

    def attention_maps(self, seen: tuple[Features, ...]) -> Float[Array, "n Q P"]:
        """Where each query of the last block looks: mean over heads, patches only, sums to <= 1."""
        latents, context, mask = self._start(seen)

        def apply(block, latents, _, key):
            query, keys, _ = block.project(block.norm_latents(latents), context)
            return block(latents, context, mask), attention_weights(query, keys, mask).mean(axis=1)

        _, weights = self.stack(apply, latents)
        return weights[-1, :, :, : context.shape[1]]

    def _start(self, seen: tuple[Features, ...]):
        """Latents, what they look at, and which of it (and of themselves) they may look at."""
        x, mask = joined(self.connector, self.encoders, seen)
        x = x.astype(self.connector.dtype)
        context = x if self.embed is None else self.embed(x)
        context = context if self.embed_mlp is None else self.embed_mlp(x)
        queries = self.queries[...].astype(context.dtype)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, len(queries))), constant_values=True)[:, None, None]
        return jnp.broadcast_to(queries, (len(x), *queries.shape)), context, mask


def _norm(name: str, width: int, connector: Connector) -> nnx.Module:
    return NORMS[name](width, connector.norm_eps)


def _rescale(layer: Linear, connector: Connector) -> None:
    """Makes the layer's initial weights as large as the connector wants them."""
    layer.kernel[...] *= connector.out_scale


def _newline(connector: Connector, width: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """The learned token behind others; drawn as LLaVA-NeXT's."""
    width = connector.output(width)
    absent = connector.newline == "none"
    return None if absent else nnx.Param(jax.random.normal(rngs(), (width,)) / math.sqrt(width))


def _finished(module: nnx.Module, x: Float[Array, "n Q D"], key: Array | None):
    """Visual tokens with their newlines and dropout."""
    connector = module.connector
    if module.newline is not None:
        rows = connector.pooled(module.encoders)[0][0] if connector.newline == "row" else 0
        x = with_newlines(x, module.newline[...], rows)
    return drop(x, connector.dropout, key)


CONNECTORS = {
    "none": Projector,
    "linear": Projector,
    "mlp": Projector,
    "flat": Flat,
    "perceiver": Perceiver,
    "mapping": Mapping,
    "qformer": QFormer,
    "sva": Sva,
}
