"""Idefics2's vision tower, with the names of transformers' Idefics2VisionTransformer.

A SigLIP tower that takes images of any grid: a patch has the position of the part of a square table
that it begins in. `config.json` does not say how many patches an image may have: `read` takes as
many as the table.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, norm

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
FIXED = {"num_channels": 3, "attention_dropout": 0.0}
CARRIED = vision.DROPPED


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    return [
        Row("stem/embed/kernel", "embeddings.patch_embedding.weight", "patch"),
        Row("stem/embed/bias", "embeddings.patch_embedding.bias"),
        Row("positions", "embeddings.position_embedding.weight"),
        *vision.block_rows("encoder.layers.{}"),
        *norm("norm", "post_layernorm"),
    ]


def read(hf: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS) -> Encoder:
    """The preset of a vision_config; `defaults` are those of the family.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, defaults, FIXED)
    patches = (found["image_size"] // found["patch_size"]) ** 2
    fields = vision.fields(found)
    return Encoder(**fields, max_patches=patches, position_resize="bucket")


def write(preset: Encoder, model_type: str = "idefics2_vision") -> dict[str, Any]:
    """The vision_config of a preset."""
    return {"model_type": model_type, **vision.written(preset), **FIXED}
