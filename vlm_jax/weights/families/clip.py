"""CLIP: image and text tower with their projections, names of published CLIPModel folders."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights import pictures
from vlm_jax.weights.families import clip_vision_model, text_tower
from vlm_jax.weights.tables import Row, linear, placed

ARCHITECTURE = "CLIPModel"
DEFAULTS = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
END = 49407
# What configs written before transformers 4.31 say is the end; the largest id was taken for it.
LEGACY_END = 2


def renames(model: Model) -> tuple[tuple[str, str], ...]:
    """transformers 5 saves the names that published files have."""
    return ()


def read(hf: Mapping[str, Any]) -> Model:
    """The pair of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    vision, text = (_part(hf, name) for name in ("vision_config", "text_config"))
    end = text.get("eos_token_id", END)
    if type(end) is not int:
        raise ConfigError(f"eos_token_id of text_config is {end!r}; expected a whole number")
    encoder = dataclasses.replace(clip_vision_model.read(vision), final_norm=True, pool="class")
    return Model(
        encoder,
        text=text_tower.read(
            text,
            DEFAULTS,
            out=hf.get("projection_dim", 512),
            causal=True,
            pool="largest" if end == LEGACY_END else "first",
            end=end,
            project_images=True,
        ),
    )


def _part(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part's config: older files also have another one, which transformers then goes by."""
    other = hf.get(f"{name}_dict")
    return dict((hf.get(name) or {}) if other is None else other)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    text = model.text
    return {
        "model_type": "clip",
        "projection_dim": text.out,
        "vision_config": clip_vision_model.write(model.encoder) | {"projection_dim": text.out},
        "text_config": {
            "model_type": "clip_text_model",
            **text_tower.write(text),
            "projection_dim": text.out,
            "eos_token_id": text.end,
        },
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    return [
        *placed(clip_vision_model.rows(model.encoder), "encoder/"),
        *placed(text_tower.rows(), "text/", "text_model."),
        *linear("text/project", "text_projection", bias=False),
        *linear("text/image_project", "visual_projection", bias=False),
        Row("text/logit_scale", "logit_scale"),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Everything is computed."""
    return ()


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> pictures.Seen:
    """Pictures and texts."""
    return pictures.with_texts(pictures.RESIZED_ON_DEMAND, model.encoder, arrays)
