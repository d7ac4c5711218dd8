"""SigLIP: image and text tower, names of published SiglipModel folders.

SigLIP 2's towers of one image size are of this family too.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vlm_jax.config import Model
from vlm_jax.weights import fields, pictures
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import siglip_vision_model, text_tower
from vlm_jax.weights.tables import Row, linear, placed

ARCHITECTURE = "SiglipModel"
DEFAULTS = {
    "vocab_size": 32_000,
    "max_position_embeddings": 64,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def renames(model: Model) -> tuple[tuple[str, str], ...]:
    """transformers 5 saves the names that published files have."""
    return ()


def read(hf: Mapping[str, Any], tower: ModuleType = siglip_vision_model) -> Model:
    """The pair of a config.json; `tower` is the family of its image tower.

    Raises:
      ConfigError: it says what no preset does.
    """
    vision, text = (dict(hf.get(name) or {}) for name in ("vision_config", "text_config"))
    fields.expect(vision, vision_use_head=True)
    encoder = dataclasses.replace(tower.read(vision), pool="map")
    width = text.get("hidden_size", DEFAULTS["hidden_size"])
    out = text.get("projection_size") or width
    return Model(
        encoder, text=text_tower.read(text, DEFAULTS, out=out, out_bias=True, logit_bias=True)
    )


def write(
    model: Model, name: str = "siglip", tower: ModuleType = siglip_vision_model
) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return {
        "model_type": name,
        "vision_config": tower.write(model.encoder),
        "text_config": {
            "model_type": f"{name}_text_model",
            **text_tower.write(model.text),
            "projection_size": model.text.out,
        },
    }


def rows(model: Model, tower: ModuleType = siglip_vision_model) -> list[Row]:
    """Where our leaves are."""
    return [
        *placed(tower.rows(model.encoder), "encoder/"),
        *placed(text_tower.rows(), "text/", "text_model."),
        *linear("text/project", "text_model.head"),
        Row("text/logit_scale", "logit_scale", "number"),
        Row("text/logit_bias", "logit_bias", "number"),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Everything is computed."""
    return ()


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> pictures.Seen:
    """Pictures and texts."""
    return pictures.with_texts(pictures.RESIZED_ON_DEMAND, model.encoder, arrays)
