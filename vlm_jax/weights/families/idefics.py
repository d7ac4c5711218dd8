"""Idefics1: names of published IdeficsForVisionText2Text folders.

OpenCLIP's tower, perhaps a resampler, and a Llama whose gated blocks look at the images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import DataError
from vlm_jax.presets.connectors import Connector
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights import towers
from vlm_jax.weights.families import idefics_resampler, idefics_text, idefics_vision
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "IdeficsForVisionText2Text"
VISION = "model.vision_model."


def renames(model: Model) -> tuple[tuple[str, str], ...]:
    """How names of folders become those of the table: transformers never changed these."""
    return ()


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    decoder, fusion = idefics_text.read(hf)
    encoder = idefics_vision.read(hf.get("vision_config") or {})
    resampled = hf.get("use_resampler", False)
    connector = idefics_resampler.read(hf) if resampled else _plain(encoder.width)
    return Model(encoder, connector, decoder, fusion=fusion)


def _plain(width: int) -> Connector:
    """Features as they are: every one is looked at."""
    return Connector("none", out=width)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`.

    Raises:
      ConfigError: presets that no Idefics1 has.
    """
    resampled = model.connector.kind == "perceiver"
    plain = {"use_resampler": False, "perceiver_config": {"use_resampler": False}}
    hf = {
        **idefics_text.write(model.decoder, model.fusion),
        **(idefics_resampler.write(model.connector) if resampled else plain),
        "vision_config": idefics_vision.write(model.encoder),
    }
    towers.refuse_unlike(model, read(hf), "idefics")
    return hf


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    resampled = model.connector.kind == "perceiver"
    connector = idefics_resampler.rows(model.connector) if resampled else []
    return [
        *placed(idefics_vision.rows(model.encoder), "encoder/", VISION),
        *placed(connector, "connector/", "model."),
        *placed(idefics_text.rows(model.decoder, model.fusion), "decoder/"),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Names of what the system does not compute: the tower's last norm, rotary frequencies."""
    vision = (VISION.replace(".", r"\.") + pattern for pattern in idefics_vision.CARRIED)
    return (*vision, *idefics_text.CARRIED)


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [B, N, 3, H, W] that `image_attention_mask` [B, T, N]
    shows to their tokens.

    Raises:
      DataError: an array is missing or of another shape, or a token is shown several pictures.
    """
    prompts = inputs_.text(arrays, ("pixel_values", "image_attention_mask"))
    if not arrays.keys() & {"pixel_values", "image_attention_mask"}:
        return prompts
    pixels = inputs_.array(arrays, "pixel_values", 5)
    shown = inputs_.array(arrays, "image_attention_mask", 3).astype(bool)
    expected = (*prompts.batch.tokens.shape, pixels.shape[1])
    if shown.shape != expected or len(pixels) != len(shown):
        raise DataError(
            f"image_attention_mask has shape {shown.shape} and pixel_values {pixels.shape}; "
            f"expected {expected} and {expected[0]} rows of pictures, as input_ids says"
        )
    if (shown.sum(axis=-1) > 1).any():
        raise DataError(
            "image_attention_mask shows several pictures to one token; expected at most one, "
            "as the published processor has it: the last before the token"
        )
    index = np.where(shown.any(axis=-1), shown.argmax(axis=-1), -1)
    index = np.where(prompts.batch.segments > 0, prompts.moved(index), -1).astype(np.int32)
    pictures = inputs_.pictures(model.encoder, pixels.reshape(-1, *pixels.shape[2:]))
    images = inputs_.rows_of(pictures, [pixels.shape[1]] * len(pixels))
    return prompts._replace(batch=prompts.batch._replace(image_index=index, images=images))
