"""The Q-Former: BERT's layers over learned queries and text, where queries look at the image.

n counts images, Q queries, S text positions, P features, W the Q-Former's width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.layers import Attention, Features, LayerNorm, Linear, Mlp, Stack, drop
from vlm_jax.parallel.sharding import constrain
from vlm_jax.presets.qformer import QFormer as Preset


class Branch(nnx.Module):
    """BERT's residual: the norm stands behind the sum."""

    def __init__(self, preset: Preset):
        self.norm = LayerNorm(preset.width, preset.norm_eps)
        self.dropout = preset.dropout

    def __call__(self, x: Float[Array, "n T W"], change: Float[Array, "n T W"], key):
        return self.norm(x + drop(change, self.dropout, key))


class Layer(nnx.Module):
    """Self-attention of queries and text, then queries may look at the image; a feed-forward part.

    Args:
      preset: the Q-Former.
      features: width of the image's features; 0 = this layer does not look at them.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, preset: Preset, features: int, rngs: nnx.Rngs):
        width, heads = preset.width, preset.heads
        sizes = width, heads, heads, width // heads
        self.attention = Attention(*sizes, bias=True, rngs=rngs)
        self.attended = Branch(preset)
        cross = features > 0
        self.cross_attention = (
            Attention(*sizes, bias=True, context=features, rngs=rngs) if cross else None
        )
        self.cross_attended = Branch(preset) if cross else None
        feed = width, preset.mlp, preset.activation
        self.mlp = Mlp(*feed, gated=False, bias=True, rngs=rngs)
        self.fed = Branch(preset)
        text = preset.vocab > 0
        self.text_mlp = Mlp(*feed, gated=False, bias=True, rngs=rngs) if text else None
        self.text_fed = Branch(preset) if text else None
        self.queries = preset.queries

    def __call__(
        self,
        x: Float[Array, "n Q+S W"],
        seen: Features,
        visible: Bool[Array, "n 1 1 Q+S"] | None,
        key: Array | None,
    ) -> Float[Array, "n Q+S W"]:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        x = self.attended(x, self.attention(x, x, visible), keys[0])
        queries, texts = x[:, : self.queries], x[:, self.queries :]
        if self.cross_attention is not None:
            mask = None if seen.mask is None else seen.mask[:, None, None]
            looked = self.cross_attention(queries, seen.x, mask)
            queries = self.cross_attended(queries, looked, keys[1])
        queries = self.fed(queries, self.mlp(queries), keys[2])
        if texts.shape[1]:
            texts = self.text_fed(texts, self.text_mlp(texts), keys[3])
        return constrain(jnp.concatenate([queries, texts], axis=1), "batch", None, None)


class Period(nnx.Module):
    """Layers of which the first looks at the image: what the Q-Former repeats."""

    def __init__(self, preset: Preset, features: int, rngs: nnx.Rngs):
        looks = (features, *(0 for _ in range(preset.every - 1)))
        self.layers = nnx.List([Layer(preset, width, rngs) for width in looks])

    def __call__(self, x, seen: Features, visible, key: Array | None) -> Float[Array, "n Q+S W"]:
        count = len(self.layers)
        keys = (None,) * count if key is None else jax.random.split(key, count)
        for layer, key in zip(self.layers, keys):
            x = layer(x, seen, visible, key)
        return x


class QFormer(nnx.Module):
    """Learned queries to visual tokens: connectors' arguments, see `models.connectors`."""

    def __init__(self, preset: Preset, encoders: tuple, width: int, rngs: nnx.Rngs):
        self.preset = preset
        _, features = encoders[0].features
        # BERT's deviation, by which BLIP-2 and InstructBLIP draw tables and queries.
        draw = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs(), shape))  # noqa: E731
        self.queries = draw(preset.queries, preset.width)
        self.embedding = draw(preset.vocab, preset.width) if preset.vocab else None
        self.positions = draw(preset.positions, preset.width) if preset.vocab else None
        self.norm = LayerNorm(preset.width, preset.norm_eps)
        make = lambda rngs: Period(preset, features, rngs)  # noqa: E731
        periods = preset.depth // preset.every
        self.stack = Stack(make, periods, remat=preset.remat, rngs=rngs)
        # Without a width, what the queries say is read by other heads (BLIP-2's first stage).
        self.project = Linear((preset.width,), (width,), bias=True, rngs=rngs) if width else None

    def __call__(
        self,
        seen: tuple[Features, ...],
        texts: Int[Array, "n S"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "n Q D"]:
        if texts is None or self.embedding is None:
            x = self.states(seen[0], (), None, key)
        else:
            x = self.states(seen[0], (texts,), self.whole(texts > 0), key)
        last = None if key is None else jax.random.split(key, 3)[2]
        return drop(self.project(x[:, : self.preset.queries]), self.preset.dropout, last)

    def whole(self, there: Bool[Array, "n S"]) -> Bool[Array, "n 1 1 Q+S"]:
        """The mask by which queries and a text all see each other, but for padding."""
        queries = ((0, 0), (self.preset.queries, 0))
        return jnp.pad(there, queries, constant_values=True)[:, None, None]

    def states(
        self,
        seen: Features,
        texts: tuple[Int[Array, "n _S"], ...],
        visible: Bool[Array, "n 1 #Q+S Q+S"] | None,
        key: Array | None = None,
    ) -> Float[Array, "n Q+S W"]:
        """What queries and texts end as.

        Args:
          seen: what the encoder saw, of as many images as there are texts.
          texts: which stand one behind the other, each with positions from 0 on.
          visible: who sees whom among queries and texts, S being the length of all texts.
          key: dropout's; None = evaluation.

        Raises:
          ValueError: a text is longer than the table of positions.
        """
        preset, queries = self.preset, self.queries[...]
        keys = (None, None) if key is None else jax.random.split(key, 3)[:2]
        features = seen._replace(x=seen.x.astype(preset.dtype))
        queries = jnp.broadcast_to(queries, (len(features.x), *queries.shape))
        x = jnp.concatenate([queries, *map(self._embedded, texts)], axis=1)
        x = drop(self.norm(x.astype(preset.dtype)), preset.dropout, keys[0])

        def apply(period, x, _, key):
            return period(x, features, visible, key), None

        return self.stack(apply, x, key=keys[1])[0]

    def _embedded(self, texts: Int[Array, "n S"]) -> Float[Array, "n S W"]:
        if texts.shape[1] > self.preset.positions:
            raise ValueError(
                f"texts of images have {texts.shape[1]} tokens; the Q-Former has "
                f"{self.preset.positions} positions"
            )
        embedded = self.embedding[...][texts] + self.positions[...][: texts.shape[1]]
        return constrain(embedded, "batch", None, None)
