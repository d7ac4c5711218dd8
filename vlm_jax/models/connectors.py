"""Connectors: features of an image to its visual tokens of the decoder's width.

Called with what each encoder saw, the second text of each image `Int[n S]` (0 = padding) or None,
and dropout's key or None; the result is `Float[n Q D]`.

n counts images, P patches, Q visual tokens, E the encoder's width, D the decoder's.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.models.layers import (
    Attention,
    Features,
    Linear,
    Mlp,
    RMSNorm,
    Stack,
    attend,
    attention_weights,
    drop,
)
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.connectors import Connector


class Projector(nnx.Module):
    """Linear layers with GELU between them (LLaVA-1.5's has two); one visual token per patch."""

    def __init__(self, connector: Connector, widths: tuple, width: int, rngs: nnx.Rngs):
        self.connector = connector
        layers = 1 if connector.kind == "linear" else connector.layers
        sizes = [widths[0], *[connector.hidden or width] * (layers - 1), width]
        self.layers = nnx.List(
            [Linear((i,), (o,), bias=True, rngs=rngs) for i, o in itertools.pairwise(sizes)]
        )

    def __call__(self, seen: tuple[Features, ...], texts=None, key: Array | None = None):
        x = self.layers[0](seen[0].x.astype(self.connector.dtype))
        for layer in self.layers[1:]:
            x = layer(jax.nn.gelu(x, approximate=False))
        return drop(x, self.connector.dropout, key)


class PerceiverBlock(nnx.Module):
    """Latents look at the patches and at each other, then a SwiGLU part (Idefics2's form)."""

    def __init__(self, connector: Connector, width: int, rngs: nnx.Rngs):
        head_dim = width // connector.heads
        self.norm_latents = RMSNorm(width, connector.norm_eps)
        self.norm_context = RMSNorm(width, connector.norm_eps)
        self.attention = Attention(
            width, connector.heads, connector.kv_heads, head_dim, bias=False, rngs=rngs
        )
        self.norm_mlp = RMSNorm(width, connector.norm_eps)
        hidden = connector.hidden or 4 * width
        self.mlp = Mlp(width, hidden, "silu", gated=True, bias=False, rngs=rngs)

    def project(self, latents: Float[Array, "n Q D"], context: Float[Array, "n P D"]):
        """Queries, keys and values of this block: keys are the patches', then the latents'."""
        queries = self.norm_latents(latents)
        keys = jnp.concatenate([self.norm_context(context), queries], axis=1)
        return self.attention.project(queries, keys)

    def __call__(
        self, latents: Float[Array, "n Q D"], context: Float[Array, "n P D"]
    ) -> Float[Array, "n Q D"]:
        latents = latents + self.attention.out(attend(*self.project(latents, context)))
        latents = latents + self.mlp(self.norm_mlp(latents))
        return constrain(latents, "batch", None, None)


class Perceiver(nnx.Module):
    """Perceiver resampler: learned queries pool any number of patches to Q visual tokens."""

    def __init__(self, connector: Connector, widths: tuple, width: int, rngs: nnx.Rngs):
        self.connector = connector
        inner = connector.width or width
        self.embed = Linear((widths[0],), (inner,), bias=False, rngs=rngs)
        # Unit scale: the block's norm would undo any other, and ones (Idefics2) start all alike.
        self.queries = nnx.Param(jax.random.normal(rngs(), (connector.queries, inner)))
        make = lambda rngs: PerceiverBlock(connector, inner, rngs)  # noqa: E731
        self.stack = Stack(make, connector.layers, remat=connector.remat, rngs=rngs)
        self.norm = RMSNorm(inner, connector.norm_eps)
        wider = inner != width
        self.project = Linear((inner,), (width,), bias=False, rngs=rngs) if wider else None

    def __call__(self, seen: tuple[Features, ...], texts=None, key: Array | None = None):
        latents, context = self._start(seen[0].x)

        def apply(block, latents, _, key):
            return block(latents, context), None

        latents, _ = self.stack(apply, latents)
        y = self.norm(latents)
        y = y if self.project is None else self.project(y)
        return drop(y, self.connector.dropout, key)

    def attention_maps(self, seen: tuple[Features, ...]) -> Float[Array, "n Q P"]:
        """Where each query of the last block looks: mean over heads, patches only, sums to <= 1."""
        latents, context = self._start(seen[0].x)

        def apply(block, latents, _, key):
            query, keys, _ = block.project(latents, context)
            return block(latents, context), attention_weights(query, keys).mean(axis=1)

        _, weights = self.stack(apply, latents)
        return weights[-1, :, :, : seen[0].x.shape[1]]

    def _start(self, x: Float[Array, "n P E"]):
        context = self.embed(x.astype(self.connector.dtype))
        queries = self.queries[...].astype(context.dtype)
        return jnp.broadcast_to(queries, (x.shape[0], *queries.shape)), context


CONNECTORS = {"linear": Projector, "mlp": Projector, "perceiver": Perceiver}
