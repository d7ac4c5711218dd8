"""The vision-language model: images -> encoder -> connector -> decoder, joined by one gather."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.batch import Batch, Images
from vlm_jax.models import noise as noises
from vlm_jax.models.connectors import CONNECTORS
from vlm_jax.models.convnet import ConvNetEncoder
from vlm_jax.models.decoder import Cache, LanguageModel
from vlm_jax.models.hooks import Hook
from vlm_jax.models.layers import Features
from vlm_jax.models.matching import Matching
from vlm_jax.models.sam import SamEncoder
from vlm_jax.models.sva import Samplers, Visual
from vlm_jax.models.text import Text
from vlm_jax.models.vit import Vit

# Encoders by the kind that presets name.
ENCODERS = {
    "vit": Vit,
    "convnext": ConvNetEncoder,
    "efficientnet": ConvNetEncoder,
    "sam": SamEncoder,
}


class VLM(nnx.Module):
    """Encoders, a connector and a decoder that reads or looks at visual tokens; any may be absent.

    Or an encoder and a text tower, whose embeddings are compared, perhaps beside a decoder; or an
    encoder and a Q-Former, whose queries are compared with texts that it reads.

    Args:
      model: a `config.Model`.
      rngs: where initial parameters are drawn from.
    """

    def __init__(self, model, rngs: nnx.Rngs):
        self.visual_in_sequence = model.visual_in_sequence
        encoders = [ENCODERS[encoder.kind](encoder, rngs) for encoder in model.encoders]
        self.encoder = encoders[0] if encoders else None
        self.extra_encoders = nnx.List(encoders[1:])
        self.connector = None if model.connector is None else _connector(model, rngs)
        decoder = model.decoder
        self.decoder = None if decoder is None else LanguageModel(decoder, rngs, model.fusion)
        between = model.samplers
        make = lambda: Samplers(between, model.connector, decoder, rngs)  # noqa: E731
        self.samplers = None if between is None else make()
        self.text = None if model.text is None else _text(model, rngs)

    def features(
        self, images: tuple[Images, ...], dropout: Array | None = None
    ) -> tuple[Features, ...]:
        """What each encoder sees in its images."""
        encoders = (self.encoder, *self.extra_encoders)
        keys = (
            (None,) * len(encoders) if dropout is None else jax.random.split(dropout, len(encoders))
        )
        return tuple(map(seen_by, encoders, images, keys))

    def visual(
        self,
        images: Images | tuple[Images, ...],
        dropout: Array | None = None,
        texts: Int[Array, "B N S"] | None = None,
    ) -> Float[Array, "B N Q D"] | Visual:
        """Visual tokens of every image slot; what an empty slot holds is never looked at.

        With samplers between the decoder's layers, also what these look at.

        Args:
          images: as each encoder takes them, a tuple where there are several.
          dropout: its key; None = evaluation.
          texts: second texts of images, for connectors that read them.
        """
        keys = (None, None) if dropout is None else jax.random.split(dropout)
        images = (images,) if isinstance(images, Images) else images
        features = self.features(images, keys[0])
        return self.connected(features, images[0].grids.shape[:2], keys[1], texts)

    def connected(
        self,
        features: tuple[Features, ...],
        slots: tuple[int, int],
        dropout: Array | None = None,
        texts: Int[Array, "B N S"] | None = None,
    ) -> Float[Array, "B N Q D"] | Visual:
        """Visual tokens of what the encoders saw in the images of B rows with N slots."""
        if self.samplers is not None:
            windows = self.connector.windows(features)
            visual = Visual(self.connector.tokens(windows, dropout), windows)
        else:
            texts = None if texts is None else texts.reshape(-1, texts.shape[-1])
            visual = self.connector(features, texts, dropout)
        return jax.tree.map(lambda x: x.reshape(*slots, *x.shape[1:]), visual)

    def similarity(
        self,
        images: Images,
        tokens: Int[Array, "m T"],
        there: Bool[Array, "m T"],
        dropout: Array | None = None,
    ) -> Float[Array, "n m"]:
        """Logits of every image with every text; `there` is False for padding."""
        return self.text.similarity(*self.embeddings(images, tokens, there, dropout))

    def embeddings(
        self,
        images: Images,
        tokens: Int[Array, "m T"],
        there: Bool[Array, "m T"],
        dropout: Array | None = None,
    ) -> tuple[Float[Array, "n E"] | Float[Array, "n Q E"], Float[Array, "m E"]]:
        """Images and texts as vectors of length 1; `there` is False for padding.

        A Q-Former gives as many of an image as it has queries.
        """
        keys = (None, None) if dropout is None else jax.random.split(dropout)
        seen = seen_by(self.encoder, images, keys[0])
        if isinstance(self.text, Matching):
            texts = self.text.texts(self.connector, tokens, there, seen.x.shape[-1], keys[1])
            return self.text.images(self.connector, seen, keys[1]), texts
        return self.text.images(seen), self.text(tokens, there, keys[1])

    def hidden(
        self,
        batch: Batch,
        visual: Float[Array, "B N Q D"] | Visual | None,
        dropout: Array | None = None,
        neftune: float = 0.0,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the decoder; `visual` is None where no token stands for an image.

        With dropout's key, embeddings of tokens get NEFTune's noise of that alpha.
        """
        noise = None
        if dropout is not None and neftune:
            noise = noises.drawn(batch.segments, self.decoder.decoder.embedded, neftune, dropout)
        x = self.fuse(batch, visual, noise)
        hook = self.hook(batch.image_index, visual, visual_index=batch.visual_index)
        masks = {"mask": attention_mask(batch), "together": block_mask(batch)}
        x, _ = self.decoder(x, batch.positions, **masks, key=dropout, hook=hook)
        return x

    def hook(
        self,
        image_index: Int[Array, "B T"],
        visual: Float[Array, "B N Q D"] | Visual | None = None,
        cache: Cache | None = None,
        visual_index: Int[Array, "B T"] | None = None,
    ) -> Hook | None:
        """What stands between the decoder's layers, given which image each token looks at.

        With a cache from `empty_cache`, its keys and values of visual tokens are looked at.
        Samplers need `visual` and `visual_index`, without which no visual token is among the
        tokens.
        """
        if self.samplers is not None and visual is not None and visual_index is not None:
            return self.samplers.hook(visual_index, visual.windows)
        if self.decoder.cross is None:
            return None
        seen = None if cache is None else cache.seen
        return self.decoder.cross.hook(image_index, visual, seen)

    def empty_cache(
        self, rows: int, slots: int, visual: Float[Array, "B N Q D"] | Visual | None
    ) -> Cache:
        """The decoder's cache for `slots` positions, with what cross-attention looks at."""
        cache = self.decoder.empty_cache(rows, slots)
        if self.decoder.cross is None or visual is None:
            return cache
        return cache._replace(seen=self.decoder.cross.project(visual))

    def fuse(
        self,
        batch: Batch,
        visual: Float[Array, "B N Q D"] | Visual | None,
        noise: Float[Array, "B T E"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The sequence the decoder reads: embeddings, and visual tokens where they stand."""
        x = self.decoder.embed(batch.tokens, noise)
        if visual is None or not self.visual_in_sequence:
            return x
        visual = tokens_of(visual)
        visual = visual.reshape(visual.shape[0], -1, visual.shape[-1]).astype(x.dtype)
        index = batch.visual_index
        gathered = jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where(index[..., None] >= 0, gathered, x)

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states."""
        return self.decoder.unembed(hidden)

    def attention_maps(self, images: Images | tuple[Images, ...]) -> Float[Array, "B N Q P"]:
        """Where each visual token of a Perceiver looks; see `Perceiver.attention_maps`."""
        images = (images,) if isinstance(images, Images) else images
        maps = self.connector.attention_maps(self.features(images))
        return maps.reshape(*images[0].grids.shape[:2], *maps.shape[1:])


def seen_by(encoder: nnx.Module, images: Images, key: Array | None) -> Features:
    """What an encoder sees, unless the images come with what it saw before."""
    if images.features is None:
        return encoder(images, key)
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    mask = images.feature_mask
    return Features(flat(images.features), None if mask is None else flat(mask))


def _connector(model, rngs: nnx.Rngs) -> nnx.Module:
    make = CONNECTORS[model.connector.kind]
    return make(model.connector, model.encoders, model.visual_width, rngs)


def _text(model, rngs: nnx.Rngs) -> nnx.Module:
    if model.matched:
        return Matching(model.text, model.connector, rngs)
    return Text(model.text, model.encoder, rngs)


def tokens_of(visual: Float[Array, "B N Q D"] | Visual) -> Float[Array, "B N Q D"]:
    """The visual tokens alone of what `VLM.visual` gives."""
    return visual.tokens if isinstance(visual, Visual) else visual


def attention_mask(batch: Batch) -> Bool[Array, "B 1 T T"]:
    """True where a token may look: at its own document's past, and at all of its own block."""
    segments = batch.segments
    same_document = segments[:, None, :, None] == segments[:, None, None, :]
    order = jnp.arange(segments.shape[1])
    past = order[:, None] >= order[None, :]
    return same_document & (past | block_mask(batch))


def block_mask(batch: Batch) -> Bool[Array, "B 1 T T"]:
    """True where two tokens have one block id: of one block, where they are of one document."""
    blocks = batch.blocks
    same = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] > 0)
    return same[:, None]


def target_weights(batch: Batch) -> Float[Array, "B T"]:
    """Weight of the prediction made at each position: that of the next token of its document."""
    weight = jnp.roll(batch.loss_weights, -1, axis=1)
    same_document = jnp.roll(batch.segments, -1, axis=1) == batch.segments
    last = jnp.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1
    return jnp.where(same_document & ~last, weight, 0.0)
