"""What an imported model makes of the arrays that transformers' `forward` takes."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlm_jax import config as configs
from vlm_jax.batch import Batch, Images
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params, sampling
from vlm_jax.weights import store

TEXT = ("input_ids", "attention_mask")
NO_END = -1  # no token: generation goes on to the last


class Rows(NamedTuple):
    """Prompts with their padding moved to the right.

    Attributes:
      batch: the prompts.
      order: int [B, T], where in the given row each position of the batch stood.
    """

    batch: Batch
    order: np.ndarray


def run(
    stored: store.Stored, arrays: Mapping[str, np.ndarray], new_tokens: int = 0
) -> dict[str, np.ndarray]:
    """Logits of a prompt and greedy tokens after it, or an encoder's features, in float32.

    Args:
      stored: the model.
      arrays: by the keywords of `forward`.
      new_tokens: how many tokens to make after the prompt.

    Returns:
      `logits` [B, T, V] and with new_tokens `tokens` [B, new_tokens]; or `last_hidden_state`.

    Raises:
      ConfigError, DataError: the arrays are not what the model takes.
    """
    model = exact(stored.model)
    places = dict.fromkeys(params.abstract(model), jax.sharding.SingleDeviceSharding(_device()))
    leaves = store.load(stored, places, dict.fromkeys(places, np.float32))
    if model.decoder is None:
        images = encoder_images(model.encoder, arrays)
        features = jax.jit(lambda leaves: params.build(model, leaves).features((images,))[0].x)
        return {"last_hidden_state": np.asarray(features(leaves))}
    rows = prompts(arrays)
    return _answers(model, leaves, rows, new_tokens)


def exact(model: configs.Model) -> configs.Model:
    """The same model, computed in float32."""
    plain = configs.plain(model)
    for part in (*plain.values(), *plain["extra_encoders"]):
        if isinstance(part, dict):
            part.update(dtype="float32", remat=False)
    return configs.typed(configs.Model, plain, "model")


def prompts(arrays: Mapping[str, np.ndarray]) -> Rows:
    """Text as `input_ids` and `attention_mask`, padded on either side.

    Raises:
      DataError: an array is missing or of another shape.
    """
    _refuse_unknown(arrays, TEXT)
    tokens = _array(arrays, "input_ids", 2).astype(np.int32)
    mask = arrays.get("attention_mask")
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape:
        raise DataError(f"attention_mask has shape {real.shape}; input_ids has {tokens.shape}")
    order = np.argsort(~real, axis=1, kind="stable")
    moved = np.take_along_axis(real, order, axis=1)
    nothing = np.full(tokens.shape, -1, np.int32)
    batch = Batch(
        tokens=np.where(moved, np.take_along_axis(tokens, order, axis=1), 0),
        segments=moved.astype(np.int32),
        positions=np.where(moved, np.arange(tokens.shape[1]), 0).astype(np.int32),
        loss_weights=np.zeros(tokens.shape, np.float32),
        blocks=np.zeros(tokens.shape, np.int32),
        visual_index=nothing,
        image_index=nothing,
        image_texts=np.zeros((len(tokens), 0, 0), np.int32),
        images=Images(np.zeros((len(tokens), 0, 2), np.int32)),
    )
    return Rows(batch, order)


def _answers(
    model: configs.Model, leaves: Mapping[str, Array], rows: Rows, new_tokens: int
) -> dict[str, np.ndarray]:
    def answer(leaves, batch):
        vlm = params.build(model, leaves)
        logits = vlm.unembed(vlm.hidden(batch, None))
        if not new_tokens:
            return logits, None
        return logits, sampling.greedy(vlm, batch, None, new_tokens, NO_END)

    logits, tokens = jax.jit(answer)(leaves, jax.tree.map(jnp.asarray, rows.batch))
    found = {"logits": _back(np.asarray(logits), rows.order)}
    return found if tokens is None else found | {"tokens": np.asarray(tokens)}


def _back(array: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What belongs to the positions of a batch, at those of the given rows."""
    back = np.argsort(order, axis=1)[..., None]
    return np.take_along_axis(array, back, axis=1)


def encoder_images(encoder, arrays: Mapping[str, np.ndarray]) -> Images:
    """Pictures as `pixel_values` [n, 3, H, W], one per row.

    Raises:
      DataError: the array is missing or of another shape.
    """
    _refuse_unknown(arrays, ("pixel_values",))
    pixels = _array(arrays, "pixel_values", 4).astype(np.float32).transpose(0, 2, 3, 1)
    if pixels.shape[1:3] != encoder.size:
        raise DataError(f"pixel_values are of {pixels.shape[1:3]}; the model takes {encoder.size}")
    grids = np.tile(np.int32(encoder.grid), (len(pixels), 1, 1))
    if encoder.reads == "pixels":
        return Images(grids, pixels=pixels[:, None])
    return Images(grids, patches=patchify(pixels, encoder.patch))


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Pictures [n, H, W, 3] as flattened patches [n, P, patch * patch * 3], row by row."""
    n, height, width, channels = pixels.shape
    x = pixels.reshape(n, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, patch * patch * channels)


def _array(arrays: Mapping[str, np.ndarray], name: str, axes: int) -> np.ndarray:
    if name not in arrays:
        raise DataError(f"the inputs lack {name}; they have {', '.join(arrays) or 'nothing'}")
    array = np.asarray(arrays[name])
    if array.ndim != axes:
        raise DataError(f"{name} has shape {array.shape}; expected {axes} axes")
    return array


def _refuse_unknown(arrays: Mapping[str, np.ndarray], known: tuple[str, ...]) -> None:
    unknown = [name for name in arrays if name not in known]
    if unknown:
        raise ConfigError(f"inputs {', '.join(unknown)} are not taken; expected {', '.join(known)}")


def _device() -> jax.Device:
    return jax.local_devices()[0]
