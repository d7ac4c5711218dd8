"""What an imported model makes of the arrays that transformers' `forward` takes."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.batch import Images
from vlm_jax.errors import DataError
from vlm_jax.models import params, sampling
from vlm_jax.models.vit import Vit
from vlm_jax.presets.convnets import ConvNet
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.generation import Generation
from vlm_jax.presets.sam import Sam
from vlm_jax.weights import inputs, pictures, registry, store


def run(
    stored: store.Stored, arrays: inputs.Arrays, new_tokens: int = 0, beams: int = 1
) -> dict[str, np.ndarray]:
    """Logits of a prompt and greedy tokens after it, or what else there is, in float32.

    Args:
      stored: the model.
      arrays: by the keywords of `forward`.
      new_tokens: how many tokens to make after the prompt; no token ends it.
      beams: hypotheses of a beam search; 1 = greedy.

    Returns:
      `logits` [B, T, V] and with new_tokens `tokens` [B, new_tokens]; of an encoder alone
      `last_hidden_state`, of a contrastive pair `logits_per_image` and `logits_per_text`.

    Raises:
      ConfigError, DataError: the arrays are not what the model takes.
    """
    known = registry.CONFIGLESS.get(stored.family) or registry.family(stored.family)
    model = known.fitted(exact(stored.model), arrays)
    places = dict.fromkeys(params.abstract(model), jax.sharding.SingleDeviceSharding(_device()))
    leaves = store.load(stored, places, dict.fromkeys(places, np.float32))
    if model.pair:
        seen = known.inputs(model, stored.published, arrays)
        return _similarities(model, leaves, seen)
    if model.decoder is None:
        seen = known.inputs(model, stored.published, arrays)
        return {"last_hidden_state": _features(model, leaves, seen)}
    prompts = known.inputs(model, stored.published, arrays)
    _check_range(model, prompts, new_tokens)
    return _answers(model, leaves, prompts, Generation(max_new_tokens=new_tokens, beams=beams))


def _check_range(model: configs.Model, prompts: inputs.Prompts, new_tokens: int) -> None:
    """Raises DataError where a table would be read beyond its end, which is silent in jax."""
    batch, decoder = prompts.batch, model.decoder
    ids = np.where(batch.visual_index >= 0, 0, batch.tokens)
    if ids.min() < 0 or ids.max() >= decoder.tokens:
        raise DataError(f"input_ids reach {ids.max()}; the model has {decoder.tokens} tokens")
    longest = batch.positions.max() + 1 + new_tokens
    room = decoder.positions - decoder.position_offset
    if decoder.position == "learned" and longest > room:
        raise DataError(f"{longest} tokens with the new ones; the model has {room} positions")


def exact(model: configs.Model) -> configs.Model:
    """The same model, computed in float32."""
    plain = schema.plain(model)
    for part in (*plain.values(), *plain["extra_encoders"]):
        if isinstance(part, dict) and "dtype" in part:
            part.update(dtype="float32", remat=False)
    return schema.typed(configs.Model, plain, "model")


def _tokens(encoder: Vit, preset: Encoder, images: Images) -> Float[Array, "n T D"]:
    """All tokens, as transformers gives them."""
    return encoder.tokens(images)


def _maps(encoder: nnx.Module, preset: ConvNet | Sam, images: Images) -> Float[Array, "n C h w"]:
    """Features in their grid, channels first."""
    x = encoder(images).x
    return x.reshape(len(x), *preset.grid, -1).transpose(0, 3, 1, 2)


# What `last_hidden_state` is, by the kind of an encoder's preset.
STATES = {"vit": _tokens, "convnext": _maps, "efficientnet": _maps, "sam": _maps}


def _features(model: configs.Model, leaves: Mapping[str, Array], seen: pictures.Seen) -> np.ndarray:
    preset = seen.encoder
    model = dataclasses.replace(model, encoder=preset)

    def run(leaves, images):
        return STATES[preset.kind](params.build(model, leaves).encoder, preset, images)

    return np.asarray(jax.jit(run)(leaves, seen.images))


def _similarities(
    model: configs.Model, leaves: Mapping[str, Array], seen: pictures.Seen
) -> dict[str, np.ndarray]:
    model = dataclasses.replace(model, encoder=seen.encoder)
    if seen.tokens.shape[1] > model.text.length:
        raise DataError(
            f"input_ids are {seen.tokens.shape[1]} long; the model takes {model.text.length}"
        )

    if seen.tokens.min() < 0 or seen.tokens.max() >= model.tokens:
        raise DataError(f"input_ids reach {seen.tokens.max()}; the model has {model.tokens} tokens")

    def run(leaves, seen):
        return params.build(model, leaves).similarity(*seen)

    logits = np.asarray(jax.jit(run)(leaves, (seen.images, seen.tokens, seen.mask)))
    return {"logits_per_image": logits, "logits_per_text": logits.T}


def _answers(
    model: configs.Model, leaves: Mapping[str, Array], prompts: inputs.Prompts, options: Generation
) -> dict[str, np.ndarray]:
    def answer(leaves, batch):
        vlm = params.build(model, leaves)
        visual = None
        if batch.images.grids.shape[1]:
            texts = batch.image_texts if batch.image_texts.size else None
            visual = vlm.visual((batch.images, *batch.extra_images), texts=texts)
        logits = vlm.unembed(vlm.hidden(batch, visual))
        if not options.max_new_tokens:
            return logits, None
        return logits, sampling.generate(vlm, batch, visual, options, ())

    logits, tokens = jax.jit(answer)(leaves, jax.tree.map(jnp.asarray, prompts.batch))
    found = {"logits": prompts.back(np.asarray(logits))}
    return found if tokens is None else found | {"tokens": np.asarray(tokens)}


def _device() -> jax.Device:
    return jax.local_devices()[0]
