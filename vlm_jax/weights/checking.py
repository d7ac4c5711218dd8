"""What an imported model makes of the arrays that transformers' `forward` takes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlm_jax import config as configs
from vlm_jax.models import params, sampling
from vlm_jax.presets.generation import Generation
from vlm_jax.weights import inputs, registry, store


def run(
    stored: store.Stored, arrays: inputs.Arrays, new_tokens: int = 0, beams: int = 1
) -> dict[str, np.ndarray]:
    """Logits of a prompt and greedy tokens after it, or an encoder's features, in float32.

    Args:
      stored: the model.
      arrays: by the keywords of `forward`.
      new_tokens: how many tokens to make after the prompt; no token ends it.
      beams: hypotheses of a beam search; 1 = greedy.

    Returns:
      `logits` [B, T, V] and with new_tokens `tokens` [B, new_tokens]; or `last_hidden_state`.

    Raises:
      ConfigError, DataError: the arrays are not what the model takes.
    """
    known = registry.family(stored.family)
    model = known.fitted(exact(stored.model), arrays)
    places = dict.fromkeys(params.abstract(model), jax.sharding.SingleDeviceSharding(_device()))
    leaves = store.load(stored, places, dict.fromkeys(places, np.float32))
    if model.decoder is None:
        return {"last_hidden_state": _features(model, leaves, arrays)}
    options = Generation(max_new_tokens=new_tokens, beams=beams)
    return _answers(model, leaves, known.inputs(model, stored.published, arrays), options)


def exact(model: configs.Model) -> configs.Model:
    """The same model, computed in float32."""
    plain = configs.plain(model)
    for part in (*plain.values(), *plain["extra_encoders"]):
        if isinstance(part, dict) and "dtype" in part:
            part.update(dtype="float32", remat=False)
    return configs.typed(configs.Model, plain, "model")


def _features(model: configs.Model, leaves: Mapping[str, Array], arrays) -> np.ndarray:
    inputs.refuse_unknown(arrays, ("pixel_values",))
    images = inputs.pictures(model.encoder, inputs.array(arrays, "pixel_values", 4))
    features = jax.jit(lambda leaves: params.build(model, leaves).features((images,))[0].x)
    return np.asarray(features(leaves))


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
