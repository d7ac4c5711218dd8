"""BLIP-2's first stage: what a Q-Former's queries and the texts that it reads are compared by.

The Q-Former sees texts under three masks (Li et al. 2023, figure 2): queries and text each see only
themselves (comparing), all see all (matching), or the text sees the queries and its own past
(generating). The first and the last stand in one pass, as the queries see no text in either.

n counts images and m texts, Q queries, S tokens of a text, W the Q-Former's width, E that of the
space in which they are compared, V the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.layers import ACTIVATIONS, Features, LayerNorm, Linear
from vlm_jax.models.qformer import QFormer
from vlm_jax.models.text import unit
from vlm_jax.presets.matching import Matching as Preset
from vlm_jax.presets.qformer import QFormer as QFormerPreset


class Read(NamedTuple):
    """What one pass over pairs of an image and a text gives.

    Attributes:
      images: of length 1, one per query.
      texts: of length 1.
      generated: the text's states as seen from its past, for `Matching.unembed`; None unless asked.
    """

    images: Float[Array, "n Q E"]
    texts: Float[Array, "n E"]
    generated: Float[Array, "n S W"] | None = None


class Matching(nnx.Module):
    """The heads.

    Args:
      preset: theirs.
      qformer: that of the Q-Former.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, preset: Preset, qformer: QFormerPreset, rngs: nnx.Rngs):
        self.preset = preset
        width = qformer.width
        self.project = Linear((width,), (preset.out,), bias=True, rngs=rngs)
        self.image_project = Linear((width,), (preset.out,), bias=True, rngs=rngs)
        start = preset.temperature
        self.temperature = nnx.Param(jnp.asarray(start)) if start else None
        self.match = Linear((width,), (2,), bias=True, rngs=rngs)
        # BERT's head: its output matrix is the table of tokens.
        says = preset.generates
        self.transform = Linear((width,), (width,), bias=True, rngs=rngs) if says else None
        self.transform_norm = LayerNorm(width, qformer.norm_eps) if says else None
        self.output_bias = nnx.Param(jnp.zeros(qformer.vocab)) if says else None

    def there(self, segments: Int[Array, "m S"]) -> Bool[Array, "m S"]:
        """Which positions of texts are read: padding is not."""
        return segments > 0

    def read(
        self,
        qformer: QFormer,
        seen: Features,
        tokens: Int[Array, "n S"],
        there: Bool[Array, "n S"],
        key: Array | None = None,
        generate: bool = False,
    ) -> Read:
        """Images and texts that do not see each other; and texts that are told from their image.

        Args:
          qformer: the model's.
          seen: what the encoder saw.
          tokens: one text per image.
          there: False for padding.
          key: dropout's; None = evaluation.
          generate: whether to read the texts from their past too.
        """
        queries, length = qformer.preset.queries, tokens.shape[1]
        texts = (tokens, self.begun(tokens)) if generate else (tokens,)
        visible = allowed(queries, length, generate) & _keys(queries, there, len(texts))
        x = qformer.states(seen, texts, visible, key)
        first, end = x[:, queries], queries + length
        return Read(
            unit(self.image_project(x[:, :queries], jnp.float32)),
            unit(self.project(first, jnp.float32)),
            x[:, end:] if generate else None,
        )

    def images(
        self, qformer: QFormer, seen: Features, key: Array | None = None
    ) -> Float[Array, "n Q E"]:
        """Embeddings of length 1 of images alone, one per query."""
        return unit(self.image_project(qformer.states(seen, (), None, key), jnp.float32))

    def texts(
        self,
        qformer: QFormer,
        tokens: Int[Array, "m S"],
        there: Bool[Array, "m S"],
        width: int,
        key: Array | None = None,
    ) -> Float[Array, "m E"]:
        """Embeddings of length 1 of texts alone; `width` is that of an image's features."""
        nothing = Features(jnp.zeros((len(tokens), 1, width)))
        return self.read(qformer, nothing, tokens, there, key).texts

    def begun(self, tokens: Int[Array, "n S"]) -> Int[Array, "n S"]:
        """Texts as they are generated, beginning with another token."""
        return jnp.asarray(tokens).at[:, 0].set(self.preset.start)

    def matches(
        self,
        qformer: QFormer,
        seen: Features,
        tokens: Int[Array, "n S"],
        there: Bool[Array, "n S"],
        key: Array | None = None,
    ) -> Float[Array, "n 2"]:
        """Logits of whether an image and a text do not belong together, and of whether they do.

        Every query is asked, and their answers are averaged.
        """
        x = qformer.states(seen, (tokens,), qformer.whole(there), key)
        return self.match(x[:, : qformer.preset.queries], jnp.float32).mean(axis=1)

    def unembed(self, qformer: QFormer, x: Float[Array, "n S W"]) -> Float[Array, "n S V"]:
        """Float32 logits of the next token."""
        y = self.transform_norm(ACTIVATIONS[qformer.preset.activation](self.transform(x)))
        table = qformer.embedding[...].astype(y.dtype)
        logits = jnp.einsum("nsw,vw->nsv", y, table, preferred_element_type=jnp.float32)
        return logits + self.output_bias[...]

    def similarity(
        self, images: Float[Array, "n Q E"], texts: Float[Array, "m E"]
    ) -> Float[Array, "n m"]:
        """The logits that are compared: of the nearest of an image's queries."""
        return jax.lax.map(lambda image: jnp.max(image @ texts.T, axis=0), images) * self.scale()

    def scale(self) -> Float[Array, ""]:
        """What makes logits of products of embeddings."""
        return jnp.ones(()) if self.temperature is None else 1.0 / self.temperature[...]


def allowed(queries: int, length: int, generate: bool) -> Bool[np.ndarray, "Q+S Q+S"]:
    """Who may see whom: queries and a text only themselves; a text to be generated, which stands
    behind both, the queries and its own past."""
    part = np.repeat([0, 1, 2], [queries, length, length * generate])
    row, column = part[:, None], part[None, :]
    order = np.arange(len(part))
    past = order[:, None] >= order[None, :]
    return np.where(row < 2, row == column, (column == 0) | ((column == 2) & past))


def _keys(queries: int, there: Bool[Array, "n S"], texts: int) -> Bool[Array, "n 1 1 Q+S"]:
    first = jnp.ones((len(there), queries), bool)
    return jnp.concatenate([first, *[there] * texts], axis=1)[:, None, None]
