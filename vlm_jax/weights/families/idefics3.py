"""Idefics3: names of published Idefics3ForConditionalGeneration folders."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import DataError
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import idefics2, idefics3_connector, idefics3_vision
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "Idefics3ForConditionalGeneration"
carried = idefics2.carried


def read(hf: Mapping[str, Any], vision: ModuleType = idefics3_vision) -> Model:
    """The system of a config.json; `vision` is the module of its encoder.

    Raises:
      ConfigError: it says what no preset does.
    """
    encoder = vision.read(fields.part(hf, "vision_config"))
    return Model(encoder, idefics3_connector.read(hf), idefics2.decoder(hf, "llama"))


def write(
    model: Model, model_type: str = "idefics3", vision: ModuleType = idefics3_vision
) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return {
        "model_type": model_type,
        "vision_config": vision.write(model.encoder),
        "text_config": towers.write(towers.DECODERS, model.decoder),
        "tie_word_embeddings": model.decoder.tied,
        **idefics3_connector.write(model.connector),
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    connector = idefics3_connector.rows(model.connector)
    return [*placed(connector, "connector/", "model."), *idefics2.tower_rows(model)]


def fitted(model: Model, arrays: inputs_.Arrays) -> Model:
    """The model whose encoder has room for the patches of `pixel_values`.

    Raises:
      ConfigError: the connector takes no such grid.
      DataError: they are no squares.
    """
    model = idefics2.fitted(model, arrays)
    if "pixel_values" in arrays and len(set(model.encoder.grid)) > 1:
        sides = np.shape(arrays["pixel_values"])[-2:]
        raise DataError(f"pixel_values are of {sides} pixels; the connector takes squares")
    return model


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [B, N, 3, H, W] and their `pixel_attention_mask`.

    Patches at the edge of a picture are looked at where one of their pixels is there.
    """
    return idefics2.with_pictures(model, hf.get("image_token_id", 128_257), arrays, whole=False)
