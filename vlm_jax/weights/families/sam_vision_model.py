"""The image encoder of Segment Anything: transformers' SamVisionModel.

Published files are of SamModel, whose other parts are carried.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.sam import Sam
from vlm_jax.weights.fields import ACTIVATIONS, NAMES
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED = (r"(shared_image_embedding|prompt_encoder|mask_decoder)\..*",)

# transformers fixes this epsilon of the neck in code.
EPS = 1e-6
# Ours: theirs, of numbers that pass through.
FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "mlp_dim",
    "window": "window_size",
    "patch": "patch_size",
    "image_size": "image_size",
    "absolute": "use_abs_pos",
    "relative": "use_rel_pos",
    "qkv_bias": "qkv_bias",
    "out": "output_channels",
    "norm_eps": "layer_norm_eps",
}
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "window_size": 14,
    "patch_size": 16,
    "image_size": 1024,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "qkv_bias": True,
    "output_channels": 256,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "hidden_act": "gelu",
    "attention_dropout": 0.0,
    "global_attn_indexes": (2, 5, 8, 11),
    "mlp_ratio": 4.0,
    "mlp_dim": None,
}


def rows(preset: Sam) -> list[Row]:
    """The table of SamVisionModel's state_dict, and of SamModel's part of that name."""
    found = [
        Row("embed/kernel", "patch_embed.projection.weight", "patch"),
        Row("embed/bias", "patch_embed.projection.bias"),
        Row("position_grid", "pos_embed", "first"),
        Row("neck/project/kernel", "neck.conv1.weight", "pointwise"),
        *norm("neck/norm1", "neck.layer_norm1"),
        Row("neck/conv/kernel", "neck.conv2.weight", "conv"),
        *norm("neck/norm2", "neck.layer_norm2"),
    ]
    for kind in ("local", "global"):
        numbers = tuple(i for i, layer in enumerate(preset.layers) if layer == kind)
        block = [row._replace(numbers=numbers) for row in _block()]
        found += placed(block, f"{kind}_layers/stack/blocks/", "layers.{}.")
    return placed(found, theirs="vision_encoder.")


def _block() -> list[Row]:
    parts = enumerate(("query", "key", "value"))
    fused = [linear(f"attention/{name}", "attn.qkv", part=(i, 3)) for i, name in parts]
    return [
        *norm("norm1", "layer_norm1"),
        *(row for rows in fused for row in rows),
        *linear("attention/out", "attn.proj"),
        Row("relative_rows", "attn.rel_pos_h"),
        Row("relative_columns", "attn.rel_pos_w"),
        *norm("norm2", "layer_norm2"),
        *linear("mlp/up", "mlp.lin1"),
        *linear("mlp/down", "mlp.lin2"),
    ]


def read(hf: Mapping[str, Any]) -> Sam:
    """The preset of a config.json of SamVisionModel, or of SamModel's part `vision_config`.

    Absent fields have the defaults of transformers.

    Raises:
      ConfigError: a setting that we do not support.
    """
    hf = DEFAULTS | dict(hf.get("vision_config", hf))
    if hf["mlp_dim"] is None:
        hf["mlp_dim"] = int(hf["hidden_size"] * hf["mlp_ratio"])
    whole = ("image_size", "patch_size", "window_size", "mlp_dim")
    supported = {
        **{field: isinstance(hf[field], int) for field in whole},
        "num_channels": hf["num_channels"] == 3,
        "attention_dropout": hf["attention_dropout"] == 0,
        "hidden_act": hf["hidden_act"] in ACTIVATIONS,
    }
    for field, holds in supported.items():
        if not holds:
            raise ConfigError(f"config.json: {field} is {hf[field]!r}, which no SAM here has")
    return Sam(
        **{ours: hf[theirs] for ours, theirs in FIELDS.items()},
        # Numbers of layers that are not there say nothing to transformers.
        global_layers=tuple(
            i for i in hf["global_attn_indexes"] if 0 <= i < hf["num_hidden_layers"]
        ),
        activation=ACTIVATIONS[hf["hidden_act"]],
        neck_eps=EPS,
    )


def write(preset: Sam) -> dict[str, Any]:
    """The fields of config.json, with the size that the tables are made for: `read`'s inverse.

    Raises:
      ConfigError: transformers has no such SAM.
    """
    if preset.neck_eps != EPS:
        raise ConfigError(f"neck_eps is {preset.neck_eps}; transformers' SAM has {EPS}")
    if len(set(preset.trained_grid)) > 1:
        raise ConfigError(f"image_size is {preset.image_size}; transformers' SAM has a square one")
    return {theirs: getattr(preset, ours) for ours, theirs in FIELDS.items()} | {
        "model_type": "sam_vision_model",
        "image_size": preset.trained_grid[0] * preset.patch,
        "global_attn_indexes": list(preset.global_layers),
        "hidden_act": NAMES[preset.activation],
        "num_channels": 3,
        "attention_dropout": 0.0,
    }
