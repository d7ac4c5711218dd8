"""Gemma 3 with pictures: names of published Gemma3ForConditionalGeneration folders.

Tokens of a picture, `token_type_ids` 1, see each other both ways, as far as a layer's window goes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm_jax.config import Model
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import gemma3_projector, llava, paligemma
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "Gemma3ForConditionalGeneration"
renames, loaded, carried = llava.renames, llava.loaded, llava.carried


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    encoder, decoder = paligemma.read_towers(hf, "gemma3_text")
    return Model(encoder, gemma3_projector.read(hf), towers.uncapped(decoder))


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    own = gemma3_projector.write(model.connector)
    parts = paligemma.written_towers(model)
    vision = parts["vision_config"] | own.pop("vision_config")
    return {"model_type": "gemma3", **parts, "vision_config": vision, **own}


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    connector = gemma3_projector.rows(model.connector)
    return [*placed(connector, "connector/"), *paligemma.tower_rows(model)]


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W]; without `token_type_ids` all is causal.

    Raises:
      DataError: the arrays are of other shapes.
    """
    token = fields.image_token(hf, 262_144)
    return paligemma.with_blocks(model, token, arrays, _runs)


def _runs(types: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """1, 2, ... for each run of ones in a row, else 0."""
    ones = types == 1
    starts = ones & ~np.pad(ones, ((0, 0), (1, 0)))[:, :-1]
    return np.where(ones, np.cumsum(starts, axis=1), 0)
