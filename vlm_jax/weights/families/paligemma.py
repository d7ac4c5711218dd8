"""PaliGemma 1 and 2: names of published PaliGemmaForConditionalGeneration folders.

Their decoders are Gemma's and Gemma 2's. Tokens of the prompt, `token_type_ids` 0, see each other
both ways, which no window hinders. Visual tokens are not multiplied by the root of the width, as
embeddings are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import DataError
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import llava, paligemma_projector, siglip_vision_model
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "PaliGemmaForConditionalGeneration"
VISION, TEXT = llava.VISION, llava.TEXT
renames, carried = llava.renames, llava.carried


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    vision = {"model_type": "siglip_vision_model", **(hf.get("vision_config") or {})}
    fields.expect(vision, model_type="siglip_vision_model")
    encoder = siglip_vision_model.read(vision)
    text = dict(hf.get("text_config") or {})
    # It says that prompts see both ways, which is left to the inputs.
    text.pop("use_bidirectional_attention", None)
    text["tie_word_embeddings"] = hf.get("tie_word_embeddings", True)
    decoder = towers.read(towers.DECODERS, text, "gemma")
    width = hf.get("projection_dim", 2048)
    fields.expect({"projection_dim": width}, projection_dim=decoder.width)
    decoder = dataclasses.replace(decoder, window_in_blocks=not decoder.window)
    return Model(encoder, paligemma_projector.read(hf), decoder)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    vision = siglip_vision_model.write(model.encoder)
    return {
        "model_type": "paligemma",
        "vision_config": vision | {"vision_use_head": False},
        "text_config": towers.write(towers.DECODERS, model.decoder),
        "projection_dim": model.decoder.width,
        "hidden_size": model.decoder.width,
        "tie_word_embeddings": model.decoder.tied,
        **paligemma_projector.write(model.connector),
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return [
        *placed(siglip_vision_model.rows(model.encoder), "encoder/", VISION),
        *placed(paligemma_projector.rows(model.connector), "connector/"),
        *placed(towers.decoder_rows(model.decoder), "decoder/", TEXT),
    ]


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W]; without `token_type_ids` all is causal.

    Raises:
      DataError: the arrays are of other shapes.
    """
    prompts = inputs_.text(arrays, ("pixel_values", "token_type_ids"))
    if "token_type_ids" in arrays:
        types = inputs_.array(arrays, "token_type_ids", 2)
        if types.shape != prompts.order.shape:
            raise DataError(
                f"token_type_ids have shape {types.shape}; input_ids have {prompts.order.shape}"
            )
        prefix = (prompts.moved(types) == 0) & (prompts.batch.segments > 0)
        prompts = prompts._replace(batch=prompts.batch._replace(blocks=prefix.astype(np.int32)))
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.pictures(model.encoder, inputs_.array(arrays, "pixel_values", 4))
    token = hf.get("image_token_index", hf.get("image_token_id", 256_000))
    return inputs_.in_sequence(prompts, model, token, pictures)
