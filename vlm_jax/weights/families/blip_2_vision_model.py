"""BLIP-2's and InstructBLIP's EVA-CLIP tower, with the names of transformers' Blip2VisionModel.

EVA has no bias on keys; transformers stores one of zeros in the fused bias, so it is a leaf here.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoder_sizes import CLIP_PIXELS
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, norm, placed

DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
FIXED = {"attention_dropout": 0.0}
CARRIED = vision.DROPPED
QKV = ("query", "key", "value")


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    block = "encoder.layers.{}"
    fused = [
        row
        for i, name in enumerate(QKV)
        for row in linear(f"attention/{name}", "self_attn.qkv", part=(i, 3))
    ]
    linears = {
        "attention/out": "self_attn.projection",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
    }
    return [
        Row("stem/embed/kernel", "embeddings.patch_embedding.weight", "patch"),
        Row("stem/embed/bias", "embeddings.patch_embedding.bias"),
        Row("class_token", "embeddings.class_embedding", "token"),
        Row("positions", "embeddings.position_embedding", "first"),
        *vision.block_rows(block, linears),
        *placed(fused, "stack/blocks/", f"{block}."),
        *norm("norm", "post_layernorm"),
    ]


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config: all features, the class token's first, normed.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, DEFAULTS, FIXED)
    return Encoder(
        **vision.fields(found),
        **CLIP_PIXELS,
        class_token=True,
        keep_class=True,
        unbiased=() if found["qkv_bias"] else QKV,
    )


def write(preset: Encoder, model_type: str = "blip_2_vision_model") -> dict[str, Any]:
    """The vision_config of a preset."""
    theirs = vision.written(preset)
    qkv_bias = preset.has_bias("query")
    return {"model_type": model_type, **theirs, **FIXED, "qkv_bias": qkv_bias}
