"""CLIP's vision tower, with the names that published files give transformers' CLIPVisionModel.

(Since version 5 transformers drops `vision_model.` in memory, and adds it where a file has it.)
`config.json` does not say which features a system takes: `read` gives those of the last block,
without its norm and class token; LLaVA's are those of `layer=-2`, BLIP's have `final_norm` and
`keep_class`.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoder_sizes import CLIP_PIXELS
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import Resize
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, norm, placed

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
FIXED = {"num_channels": 3, "attention_dropout": 0.0}
CARRIED = (*vision.DROPPED, r"vision_model\.embeddings\.position_ids", r"visual_projection\..*")


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    ours = [
        Row("stem/embed/kernel", "embeddings.patch_embedding.weight", "patch"),
        Row("class_token", "embeddings.class_embedding"),
        Row("positions", "embeddings.position_embedding.weight"),
        *norm("pre_norm", "pre_layrnorm"),
        *vision.block_rows("encoder.layers.{}"),
        *norm("norm", "post_layernorm"),
    ]
    return placed(ours, theirs="vision_model.")


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    return Encoder(
        **vision.fields(vision.filled(hf, DEFAULTS, FIXED)),
        **CLIP_PIXELS,
        class_token=True,
        pre_norm=True,
        unbiased=("patch",),
        final_norm=False,
        resize=Resize("crop"),
    )


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset."""
    return {"model_type": "clip_vision_model", **vision.written(preset), **FIXED}
