"""Idefics2: names of published Idefics2ForConditionalGeneration folders."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model, check_model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import idefics2_connector as connector
from vlm_jax.weights.families import idefics2_vision as vision
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "Idefics2ForConditionalGeneration"
PIXELS = ("pixel_values", "pixel_attention_mask")


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    fields.expect(fields.part(hf, "perceiver_config"), attention_dropout=0.0)
    encoder = vision.read(fields.part(hf, "vision_config"))
    return Model(encoder, connector.read(hf), decoder(hf, "mistral"))


def decoder(hf: Mapping[str, Any], default: str) -> Any:
    """The decoder of a config.json, which says itself whether its output matrix is tied."""
    text = {
        **fields.part(hf, "text_config", connector.TEXT_CONFIG),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }
    return towers.uncapped(towers.read(towers.DECODERS, text, default))


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`.

    Raises:
      ConfigError: connector and decoder differ where config.json has one field for both.
    """
    text = towers.write(towers.DECODERS, model.decoder, "mistral")
    own = connector.write(model.connector)
    for name, value in own.pop("text_config").items():
        if text[name] != value:
            raise ConfigError(
                f"{name} of the decoder is {text[name]!r}; the connector needs {value!r}, and "
                "idefics2 has one field for both"
            )
    return {
        "model_type": "idefics2",
        "vision_config": vision.write(model.encoder),
        "text_config": text,
        "tie_word_embeddings": model.decoder.tied,
        **own,
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return [
        *placed(connector.rows(model.connector), "connector/", "model."),
        *tower_rows(model),
    ]


def tower_rows(model: Model) -> list[Row]:
    """Where the leaves of encoder and decoder are, in Idefics3 and SmolVLM too."""
    text = placed(towers.decoder_rows(model.decoder), "decoder/")
    return [
        *placed(vision.rows(model.encoder), "encoder/", "model.vision_model."),
        *(r._replace(theirs=re.sub(r"^model\.", "model.text_model.", r.theirs)) for r in text),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Names of what the system does not compute: blocks after the features."""
    return tuple(r"model\.vision_model\." + pattern for pattern in vision.CARRIED)


def fitted(model: Model, arrays: inputs_.Arrays) -> Model:
    """The model whose encoder has room for the patches of `pixel_values`.

    Raises:
      ConfigError: the connector takes no such grid.
      DataError: they are smaller than a patch.
    """
    if "pixel_values" not in arrays:
        return model
    encoder = model.encoder
    rows, columns = (int(side) // encoder.patch for side in np.shape(arrays["pixel_values"])[-2:])
    if not rows * columns:
        raise DataError(f"pixel_values are smaller than a patch of {encoder.patch} pixels")
    encoder = dataclasses.replace(
        encoder,
        image_size=(rows * encoder.patch, columns * encoder.patch),
        position_grid=encoder.table_grid,
        max_patches=rows * columns,
    )
    model = dataclasses.replace(model, encoder=encoder)
    check_model(model)
    return model


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [B, N, 3, H, W] and their `pixel_attention_mask`.

    Patches at the edge of a picture are looked at where all of their pixels are there.
    """
    return with_pictures(model, hf.get("image_token_id", 32_001), arrays, whole=True)


def with_pictures(model: Model, token: int, arrays: inputs_.Arrays, whole: bool) -> inputs_.Prompts:
    """Prompts with pictures of their own sizes; `whole` is of `inputs.padded_pictures`."""
    prompts = inputs_.text(arrays, PIXELS)
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.padded_pictures(model.encoder, arrays, whole)
    if not len(pictures.grids):
        return prompts
    return inputs_.in_sequence(prompts, model, token, pictures)
