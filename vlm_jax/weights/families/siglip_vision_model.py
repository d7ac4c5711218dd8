"""SigLIP's vision tower, with the names that published files give transformers' SiglipVisionModel.

`read` gives the features of all patches; with `pool="map"` the head is computed, else carried.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import SQUASH, Resize
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, norm, placed

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
FIXED = {"num_channels": 3, "attention_dropout": 0.0}
CARRIED = (*vision.DROPPED, r"vision_model\.head\..*", r"vision_model\.embeddings\.position_ids")


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    embed = "embeddings.patch_embedding"
    ours = [
        Row("stem/embed/kernel", f"{embed}.weight", "patch"),
        Row("stem/embed/bias", f"{embed}.bias"),
        *shared_rows(),
    ]
    return placed(ours, theirs="vision_model.")


def shared_rows() -> list[Row]:
    """Rows of all but the embedding of patches, which SigLIP 2 stores as a matrix."""
    rows = [
        Row("positions", "embeddings.position_embedding.weight"),
        *vision.block_rows("encoder.layers.{}"),
        *norm("norm", "post_layernorm"),
        Row("head/probe", "head.probe", "token"),
        *linear("head/attention/out", "head.attention.out_proj"),
        *norm("head/norm", "head.layernorm"),
        *linear("head/mlp/up", "head.mlp.fc1"),
        *linear("head/mlp/down", "head.mlp.fc2"),
    ]
    fused = "head.attention.in_proj_"
    for i, name in enumerate(("query", "key", "value")):
        ours = f"head/attention/{name}"
        rows.append(Row(f"{ours}/kernel", f"{fused}weight", "linear", part=(i, 3)))
        rows.append(Row(f"{ours}/bias", f"{fused}bias", "flat", part=(i, 3)))
    return rows


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, DEFAULTS, FIXED)
    left = found["image_size"] % found["patch_size"]
    how = Resize(side=found["image_size"]) if left else SQUASH
    return Encoder(**vision.fields(found), resize=how)


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset; whether its folder has the head, computed or carried, is the
    system's to say: by default it has."""
    found = {"model_type": "siglip_vision_model", **vision.written(preset), **FIXED}
    # With what is left of the last whole patch, as published.
    whole = preset.resize.side and preset.table_grid == preset.grid
    return found | ({"image_size": preset.resize.side} if whole else {})
