"""Idefics1's vision tower: names as in the state_dict of transformers' `IdeficsVisionTransformer`.

OpenCLIP's ViT-H/14, whose features are all those of the last block, without its norm.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoder_sizes import CLIP_PIXELS
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, norm

FIELDS = {
    "embed_dim" if name == "hidden_size" else name: ours for name, ours in vision.FIELDS.items()
}
DEFAULTS = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
FIXED = {"num_channels": 3, "attention_dropout": 0.0}
CARRIED = (r"post_layernorm\..*",)


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    return [
        Row("stem/embed/kernel", "embeddings.patch_embedding.weight", "patch"),
        Row("class_token", "embeddings.class_embedding"),
        Row("positions", "embeddings.position_embedding.weight"),
        *norm("pre_norm", "pre_layrnorm"),
        *vision.block_rows("encoder.layers.{}"),
    ]


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    return Encoder(
        **vision.fields(vision.filled(hf, DEFAULTS, FIXED), FIELDS),
        **CLIP_PIXELS,
        class_token=True,
        pre_norm=True,
        unbiased=("patch",),
        final_norm=False,
        keep_class=True,
    )


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset."""
    return {"model_type": "idefics_vision", **vision.written(preset, FIELDS), **FIXED}
