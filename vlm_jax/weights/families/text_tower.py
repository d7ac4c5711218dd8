"""What text towers of CLIP and SigLIP share: fields of a text_config, names."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.text import TextTower
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, norm

# Fields of config.json, and ours.
FIELDS = {
    "vocab_size": "vocab",
    "max_position_embeddings": "length",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
FIXED = {"attention_dropout": 0.0}


def read(hf: Mapping[str, Any], defaults: Mapping[str, Any], **fields: Any) -> TextTower:
    """The preset of a text_config; `defaults` and further fields are those of the family.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    return TextTower(**vision.fields(vision.filled(hf, defaults, FIXED), FIELDS), **fields)


def write(text: TextTower) -> dict[str, Any]:
    """The text_config of a preset."""
    return {**vision.written(text, FIELDS), **FIXED}


def rows() -> list[Row]:
    """The table of names, but for the projection."""
    return [
        Row("embedding", "embeddings.token_embedding.weight"),
        Row("positions", "embeddings.position_embedding.weight"),
        *vision.block_rows("encoder.layers.{}"),
        *norm("norm", "final_layer_norm"),
    ]
