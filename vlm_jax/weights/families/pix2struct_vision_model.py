"""Pix2Struct's encoder, with the names of transformers' Pix2StructVisionModel.

Its images have grids of their own, and pixels are normed per image, not by fixed means.
`config.json` does not say how many patches an image may have: `read` takes 2048, as published, or
as many as there are rows and columns.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, norm

DEFAULTS = {
    "hidden_size": 768,
    "patch_embed_hidden_size": 768,
    "d_ff": 2048,
    "d_kv": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "dense_act_fn": "gelu_new",
    "layer_norm_eps": 1e-6,
    "seq_len": 4096,
}
FIXED = {"attention_dropout": 0.0, "dropout_rate": 0.0}
CARRIED = vision.DROPPED
FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "d_ff": "mlp",
    "d_kv": "head_dim",
    "num_attention_heads": "heads",
    "dense_act_fn": "activation",
    "layer_norm_eps": "norm_eps",
}
LINEAR = {
    "attention/query": "attention.query",
    "attention/key": "attention.key",
    "attention/value": "attention.value",
    "attention/out": "attention.output",
    "mlp/gate": "mlp.wi_0",
    "mlp/up": "mlp.wi_1",
    "mlp/down": "mlp.wo",
}
NORMS = {"norm1": "pre_attention_layer_norm", "norm2": "pre_mlp_layer_norm"}
MAX_PATCHES = 2048


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    return [
        *linear("stem/embed", "embeddings.patch_projection"),
        Row("row_positions", "embeddings.row_embedder.weight"),
        Row("column_positions", "embeddings.column_embedder.weight"),
        *vision.block_rows("encoder.layer.{}", LINEAR, NORMS),
        *norm("norm", "layernorm", bias=False),
    ]


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, DEFAULTS, FIXED)
    values = found["patch_embed_hidden_size"]
    patch = math.isqrt(values // 3)
    if 3 * patch**2 != values:
        raise ConfigError(
            f"patch_embed_hidden_size of config.json is {values}; expected that of square patches "
            "of three colours"
        )
    most = min(MAX_PATCHES, found["seq_len"] - 1)
    return Encoder(
        **vision.fields(found, FIELDS),
        patch=patch,
        image_size=patch * math.isqrt(most),
        max_patches=most,
        position="row_column",
        position_grid=(found["seq_len"], found["seq_len"]),
        norm="rms",
        gated=True,
        attention_scale=1.0,
        unbiased=("query", "key", "value", "out", "mlp"),
    )


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset."""
    return {
        "model_type": "pix2struct_vision_model",
        **vision.written(preset, FIELDS),
        **FIXED,
        "dense_act_fn": "gelu_new" if preset.activation == "gelu_tanh" else preset.activation,
        "patch_embed_hidden_size": 3 * preset.patch**2,
        "seq_len": preset.table_grid[0],
    }
