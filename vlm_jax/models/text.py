"""What embeds texts and images in one space: a contrastive model's text tower and projections.

m counts texts, n images, E is the width of the shared space.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.layers import Features, LayerNorm, Linear, Stack, attend
from vlm_jax.models.vit import Block, MapHead
from vlm_jax.presets.text import TextTower


class Text(nnx.Module):
    """The text tower, the projections to the shared space, and the scale of similarities.

    Args:
      text: its preset.
      encoder: preset of what sees the images.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, text: TextTower, encoder, rngs: nnx.Rngs):
        self.text = text
        width, image_width = text.width, encoder.features[1]
        learn = lambda *shape: nnx.Param(jax.random.normal(rngs(), shape) / math.sqrt(width))  # noqa: E731
        self.embedding = learn(text.vocab, width)
        self.positions = learn(text.length, width)
        make = lambda rngs: Block(text.blocks, rngs)  # noqa: E731
        self.stack = Stack(make, text.depth, remat=text.remat, rngs=rngs)
        self.norm = LayerNorm(width, text.norm_eps)
        self.project = Linear((width,), (text.out,), bias=text.out_bias, rngs=rngs)
        sizes = (image_width,), (text.out,)
        images = text.project_images
        self.image_project = Linear(*sizes, bias=False, rngs=rngs) if images else None
        self.image_head = MapHead(encoder, rngs) if text.image_pool == "map" else None
        # Where the published models start from: CLIP at 1 / 0.07, SigLIP at 10 and a bias of -10.
        start = 10.0 if text.logit_bias else 1 / 0.07
        self.logit_scale = nnx.Param(jnp.asarray(math.log(start)))
        self.logit_bias = nnx.Param(jnp.asarray(-10.0)) if text.logit_bias else None

    def __call__(
        self, tokens: Int[Array, "m T"], there: Bool[Array, "m T"], key: Array | None = None
    ) -> Float[Array, "m E"]:
        """Embeddings of length 1 of texts, in float32; `there` is False for padding."""
        length = tokens.shape[1]
        x = self.embedding[...][tokens] + self.positions[...][:length]
        mask = there[:, None, None] & jnp.ones((length, length), bool)
        mask = jnp.tril(mask) if self.text.causal else mask
        look = functools.partial(attend, mask=mask)
        step = lambda block, x, _, key: (block(x, look, None, 0.0, key), None)  # noqa: E731
        x, _ = self.stack(step, x.astype(self.text.dtype), key=key)
        x = self.norm(jnp.take_along_axis(x, self._pooled(tokens)[:, None, None], axis=1)[:, 0])
        return unit(self.project(x, jnp.float32))

    def there(self, segments: Int[Array, "m T"]) -> Bool[Array, "m T"]:
        """Which positions of texts are read: padding too, as by the published towers."""
        return jnp.ones(segments.shape, bool)

    def _pooled(self, tokens: Int[Array, "m T"]) -> Int[Array, " m"]:
        """At which position a text's hidden state is taken."""
        if self.text.pool == "last":
            return jnp.full(len(tokens), tokens.shape[1] - 1)
        largest = self.text.pool == "largest"
        return jnp.argmax(tokens if largest else tokens == self.text.end, axis=1)

    def images(self, features: Features) -> Float[Array, "n E"]:
        """Embeddings of length 1 of images, in float32."""
        x = features.x
        if self.image_head is not None:
            mask = features.mask
            x = self.image_head(x, None if mask is None else mask[:, None, None])
        x = x[:, 0]
        return unit(x if self.image_project is None else self.image_project(x, jnp.float32))

    def similarity(
        self, images: Float[Array, "n E"], texts: Float[Array, "m E"]
    ) -> Float[Array, "n m"]:
        """The logits that contrastive losses are made of."""
        scale, bias = self.scale_and_bias()
        return jnp.matmul(images, texts.T) * scale + bias

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """What makes logits of products of embeddings."""
        bias = jnp.zeros(()) if self.logit_bias is None else self.logit_bias[...]
        return jnp.exp(self.logit_scale[...]), bias


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
