"""DINOv2, with the names that published files give transformers' Dinov2Model.

(Since version 5 transformers renames queries, keys and values in memory, and cuts the two matrices
of the gated feed-forward part apart; files have them as here.)
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.encoder_sizes import IMAGENET_PIXELS
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, norm, placed

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
FIXED = {"num_channels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CARRIED = (*vision.DROPPED, r"embeddings\.mask_token")
FIELDS = {k: v for k, v in vision.FIELDS.items() if k != "intermediate_size"} | {
    "layerscale_value": "layer_scale",
    "drop_path_rate": "drop_path",
}
LINEAR = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
}
QKV = ("query", "key", "value")


def rows(preset: Encoder) -> list[Row]:
    """The table of names."""
    block = "encoder.layer.{}"
    mlp = _gated_rows() if preset.gated else _plain_rows()
    scales = [Row(f"scale{i}/scale", f"layer_scale{i}.lambda1") for i in (1, 2)]
    return [
        Row("stem/embed/kernel", "embeddings.patch_embeddings.projection.weight", "patch"),
        Row("stem/embed/bias", "embeddings.patch_embeddings.projection.bias"),
        Row("class_token", "embeddings.cls_token", "token"),
        Row("registers", "embeddings.register_tokens", "first"),
        Row("positions", "embeddings.position_embeddings", "first"),
        *vision.block_rows(block, LINEAR, {"norm1": "norm1", "norm2": "norm2"}),
        *placed(mlp + scales, "stack/blocks/", f"{block}."),
        *norm("norm", "layernorm"),
    ]


def _plain_rows() -> list[Row]:
    return [*linear("mlp/up", "mlp.fc1"), *linear("mlp/down", "mlp.fc2")]


def _gated_rows() -> list[Row]:
    gate = linear("mlp/gate", "mlp.weights_in", part=(0, 2))
    up = linear("mlp/up", "mlp.weights_in", part=(1, 2))
    return [*gate, *up, *linear("mlp/down", "mlp.weights_out")]


def read(hf: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS, **fields: Any) -> Encoder:
    """The preset of a config.json; `defaults` and further fields are those of the family.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    found = vision.filled(hf, defaults, FIXED)
    if not found["layerscale_value"]:  # a preset that says 0 has no scales at all
        raise ConfigError(
            f"layerscale_value of config.json is {found['layerscale_value']!r}; expected another "
            "than 0, from which learned scales start"
        )
    gated = found["use_swiglu_ffn"]
    ours = vision.fields(found, FIELDS)
    hidden = int(ours["width"] * found["mlp_ratio"])
    if gated:
        ours["activation"] = "silu"  # whatever hidden_act says
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return Encoder(
        **ours,
        **IMAGENET_PIXELS,
        **fields,
        mlp=hidden,
        gated=gated,
        class_token=True,
        unbiased=() if found["qkv_bias"] else QKV,
    )


def write(preset: Encoder, model_type: str = "dinov2") -> dict[str, Any]:
    """The config.json of a preset.

    Raises:
      ConfigError: the feed-forward part has a width that config.json cannot say.
    """
    theirs = vision.written(preset, FIELDS)
    if preset.gated:
        theirs["hidden_act"] = "gelu"  # not looked at
    return {
        "model_type": model_type,
        **theirs,
        **FIXED,
        "mlp_ratio": _ratio(preset),
        "qkv_bias": preset.has_bias("query"),
        "use_swiglu_ffn": preset.gated,
    }


def _ratio(preset: Encoder) -> int:
    """The ratio whose feed-forward part is that wide: gated ones round two thirds of it up to 8."""
    # Rounded down, for what is rounded up to 8 came from no more than that.
    ratio = preset.mlp * (3 if preset.gated else 2) // 2 // preset.width
    hidden = preset.width * ratio
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if preset.gated else hidden
    if hidden != preset.mlp:
        raise ConfigError(
            f"mlp is {preset.mlp}; DINOv2's config.json can only say whole multiples of the width "
            f"{preset.width}, here {hidden}"
        )
    return ratio
