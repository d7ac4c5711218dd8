"""BLIP-2 before a decoder: names of published Blip2ForConditionalGeneration folders.

EVA-CLIP's tower, the Q-Former, and OPT; visual tokens stand where the text has placeholders.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights import fields, towers
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import blip_2_qformer, blip_2_vision_model
from vlm_jax.weights.tables import Row, placed

ARCHITECTURE = "Blip2ForConditionalGeneration"
VISION, TEXT = "vision_model.", "language_model."


def renames(model: Model) -> tuple[tuple[str, str], ...]:
    """How names of folders become those of the table: transformers never changed these."""
    return ()


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    return around(hf, blip_2_qformer.read(hf), "blip_2_vision_model")


def around(hf: Mapping[str, Any], connector: Any, vision: str) -> Model:
    """The towers of a config.json, and a Q-Former between them.

    Args:
      hf: the config.json.
      connector: the Q-Former.
      vision: model_type of the vision tower.
    """
    encoder = blip_2_vision_model.read({"model_type": vision} | dict(hf.get("vision_config") or {}))
    return Model(
        encoder, connector, towers.read(towers.DECODERS, hf.get("text_config") or {}, "opt")
    )


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`.

    Raises:
      ConfigError: presets that no BLIP-2 has.
    """
    hf = {
        "model_type": "blip-2",
        "vision_config": blip_2_vision_model.write(model.encoder),
        "text_config": towers.write(towers.DECODERS, model.decoder),
        **blip_2_qformer.write(model.connector),
    }
    towers.refuse_unlike(model, read(hf), "blip-2")
    return hf


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return [*tower_rows(model), *placed(blip_2_qformer.rows(model.connector), "connector/")]


def tower_rows(model: Model) -> list[Row]:
    """Those of the encoder and the decoder."""
    return [
        *placed(blip_2_vision_model.rows(model.encoder), "encoder/", VISION),
        *placed(towers.decoder_rows(model.decoder), "decoder/", TEXT),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Names of what the system does not compute: none, as it reads all its tensors."""
    return ()


def image_token(hf: Mapping[str, Any]) -> int:
    """Id of the token that stands where a visual token will.

    Raises:
      ConfigError: config.json does not say it.
    """
    token = fields.image_token(hf)
    if token is None:
        raise ConfigError(
            "image_token_index of config.json is null, so that nothing says where visual tokens "
            "stand; expected the id of a placeholder, as newer folders of the same model have it"
        )
    return token


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> inputs_.Prompts:
    """Prompts with pictures `pixel_values` [n, 3, H, W], in the order of their placeholders."""
    prompts = inputs_.text(arrays, ("pixel_values",))
    if "pixel_values" not in arrays:
        return prompts
    pictures = inputs_.pictures(model.encoder, inputs_.array(arrays, "pixel_values", 4))
    return inputs_.in_sequence(prompts, model, image_token(hf), pictures)
