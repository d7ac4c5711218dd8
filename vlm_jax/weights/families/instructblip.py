"""InstructBLIP before a decoder: names of published InstructBlipForConditionalGeneration folders.

BLIP-2's parts around a Q-Former that reads the instruction too, in BERT's tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import DataError
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights import towers
from vlm_jax.weights.families import blip_2, blip_2_vision_model, instructblip_qformer
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "InstructBlipForConditionalGeneration"
VISION_TYPE = "instructblip_vision_model"
INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")

renames = blip_2.renames
carried = blip_2.carried


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    return blip_2.around(hf, instructblip_qformer.read(hf), VISION_TYPE)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`.

    Raises:
      ConfigError: presets that no InstructBLIP has.
    """
    hf = {
        "model_type": "instructblip",
        "vision_config": blip_2_vision_model.write(model.encoder, VISION_TYPE),
        "text_config": towers.write(towers.DECODERS, model.decoder),
        **instructblip_qformer.write(model.connector),
    }
    towers.refuse_unlike(model, read(hf), "instructblip")
    return hf


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    connector = instructblip_qformer.rows(model.connector)
    return [*blip_2.tower_rows(model), *placed(connector, "connector/")]


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W], in the order of their placeholders, and
    for each picture the instruction `qformer_input_ids` [n, S] with `qformer_attention_mask`."""
    prompts = inputs_.text(arrays, ("pixel_values", *INSTRUCTION))
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.pictures(model.encoder, inputs_.array(arrays, "pixel_values", 4))
    texts = _instructions(arrays, len(pictures.grids))
    return inputs_.in_sequence(prompts, model, blip_2.image_token(hf), pictures, texts=texts)


def _instructions(arrays: inputs_.Arrays, images: int) -> np.ndarray:
    """What the Q-Former reads [n, S], 0 where the mask hides a token.

    Raises:
      DataError: an array has another shape, or a token to be read is 0, BERT's padding.
    """
    texts = inputs_.array(arrays, "qformer_input_ids", 2)
    read = np.asarray(arrays.get("qformer_attention_mask", np.ones_like(texts))).astype(bool)
    if len(texts) != images or read.shape != texts.shape:
        raise DataError(
            f"qformer_input_ids has shape {texts.shape} and qformer_attention_mask {read.shape}; "
            f"expected both to have a row for each of {images} pictures"
        )
    if (texts[read] == 0).any():
        raise DataError(
            "qformer_attention_mask shows tokens 0 of qformer_input_ids; expected it to hide "
            "them: 0 is padding ([PAD])"
        )
    return np.where(read, texts, 0).astype(np.int32)
