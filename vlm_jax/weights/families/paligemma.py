"""PaliGemma 1 and 2: names of published PaliGemmaForConditionalGeneration folders.

Their decoders are Gemma's and Gemma 2's. Tokens of the prompt, `token_type_ids` 0, see each other
both ways, which no window hinders. Visual tokens are not multiplied by the root of the width, as
embeddings are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import DataError
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import llava, paligemma_projector, siglip_vision_model
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "PaliGemmaForConditionalGeneration"
VISION, TEXT = llava.VISION, llava.TEXT
renames, loaded, carried = llava.renames, llava.loaded, llava.carried
# Where config.json has none: PaliGemma 3B at 224 pixels.
VISION_CONFIG = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
TEXT_CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257_152,
}


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    text = dict(fields.part(hf, "text_config", TEXT_CONFIG))
    # It says that prompts see both ways, which is left to the inputs.
    text.pop("use_bidirectional_attention", None)
    vision = fields.part(hf, "vision_config", VISION_CONFIG)
    parts = {"text_config": text, "vision_config": vision}
    encoder, decoder = read_towers({**hf, **parts}, "gemma")
    width = hf.get("projection_dim", 2048)
    fields.expect({"projection_dim": width}, projection_dim=decoder.width)
    decoder = dataclasses.replace(decoder, window_in_blocks=not decoder.window)
    return Model(encoder, paligemma_projector.read(hf), decoder)


def read_towers(hf: Mapping[str, Any], default: str) -> tuple[Encoder, Decoder]:
    """Encoder and decoder, in Gemma 3 too; `default` is the decoder's model_type."""
    vision = {"model_type": "siglip_vision_model", **fields.part(hf, "vision_config")}
    fields.expect(vision, model_type="siglip_vision_model")
    text = {
        **fields.part(hf, "text_config"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", True),
    }
    return siglip_vision_model.read(vision), towers.read(towers.DECODERS, text, default)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return {
        "model_type": "paligemma",
        **written_towers(model),
        "projection_dim": model.decoder.width,
        "hidden_size": model.decoder.width,
        **paligemma_projector.write(model.connector),
    }


def written_towers(model: Model) -> dict[str, Any]:
    """Fields that speak of encoder and decoder: the inverse of `read_towers`."""
    vision = siglip_vision_model.write(model.encoder)
    return {
        "vision_config": vision | {"vision_use_head": False},
        "text_config": towers.write(towers.DECODERS, model.decoder),
        "tie_word_embeddings": model.decoder.tied,
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return [*placed(paligemma_projector.rows(model.connector), "connector/"), *tower_rows(model)]


def tower_rows(model: Model) -> list[Row]:
    """Where the leaves of encoder and decoder are."""
    return [
        *placed(siglip_vision_model.rows(model.encoder), "encoder/", VISION),
        *placed(towers.decoder_rows(model.decoder), "decoder/", TEXT),
    ]


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W]; without `token_type_ids` all is causal.

    Raises:
      DataError: the arrays are of other shapes.
    """
    prefix = lambda types: (types == 0).astype(np.int32)  # noqa: E731
    token = fields.image_token(hf, 256_000)
    return with_blocks(model, token, arrays, prefix)


def with_blocks(
    model: Model,
    token: int,
    arrays: inputs_.Arrays,
    blocks: Callable[[np.ndarray], np.ndarray],
) -> inputs_.Prompts:
    """Prompts with pictures, and with blocks where `token_type_ids` are given.

    Args:
      model: the system.
      token: id of the placeholder.
      arrays: by keyword.
      blocks: token_type_ids [B, T] -> ids of blocks, 0 = none.

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
        batch = prompts.batch
        found = np.where(batch.segments > 0, prompts.moved(blocks(types)), 0)
        prompts = prompts._replace(batch=batch._replace(blocks=found.astype(np.int32)))
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.pictures(model.encoder, inputs_.array(arrays, "pixel_values", 4))
    return inputs_.in_sequence(prompts, model, token, pictures)
