"""ConvNeXt by two names: transformers' and timm's.

Published files of transformers are of ConvNextForImageClassification, or of V2's; OpenCLIP's towers
have timm's names.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.weights.fields import ACTIVATIONS, NAMES
from vlm_jax.weights.tables import Row, linear, norm, placed

# Stages after the last tap, the norm after pooling where nothing is pooled, and the classifier
# where there are no classes.
CARRIED = (
    r"convnext(v2)?\.encoder\.stages\.\d+\..*",
    r"convnext(v2)?\.layernorm\..*",
    r"classifier\..*",
)
# The same of timm.
CARRIED_TIMM = (r"stages\.\d+\..*", r"head\..*")

# Ours: theirs. Norms, and layers with a matrix or convolution, of a block.
BLOCK = {"depthwise": "dwconv", "norm": "layernorm", "mlp/up": "pwconv1", "mlp/down": "pwconv2"}
BLOCK_TIMM = {"depthwise": "conv_dw", "norm": "norm", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}

# transformers fixes this epsilon in code.
EPS = 1e-6


def rows(preset: ConvNet) -> list[Row]:
    """The table of ConvNextForImageClassification's state_dict, V2's with `response_norm`."""
    found = [
        *_squares("stem/squares", "embeddings.patch_embeddings"),
        *norm("stem/norm", "embeddings.layernorm"),
        *norm("head/norm", "layernorm"),
    ]
    for i in range(len(preset.stages)):
        stage, theirs = f"stages/{i}", f"encoder.stages.{i}"
        if i:
            found += norm(f"{stage}/norm", f"{theirs}.downsampling_layer.0")
            found += _squares(f"{stage}/downsample", f"{theirs}.downsampling_layer.1")
        block = _block(BLOCK, scale="layer_scale_parameter", response="grn", layout="channels")
        found += placed(block, f"{stage}/stack/blocks/", f"{theirs}.layers.{{}}.")
    trunk = "convnextv2." if preset.response_norm else "convnext."
    return placed(found, theirs=trunk) + linear("classifier", "classifier")


def rows_timm(preset: ConvNet) -> list[Row]:
    """The table of timm's names; OpenCLIP's files put `visual.trunk.` before them."""
    found = [
        *_squares("stem/squares", "stem.0"),
        *norm("stem/norm", "stem.1"),
        *norm("head/norm", "head.norm"),
        *linear("classifier", "head.fc"),
    ]
    for i in range(len(preset.stages)):
        stage, theirs = f"stages/{i}", f"stages.{i}"
        if i:
            found += norm(f"{stage}/norm", f"{theirs}.downsample.0")
            found += _squares(f"{stage}/downsample", f"{theirs}.downsample.1")
        block = _block(BLOCK_TIMM, scale="gamma", response="mlp.grn", layout="same")
        found += placed(block, f"{stage}/stack/blocks/", f"{theirs}.blocks.{{}}.")
    return found


def _squares(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/embed/kernel", f"{theirs}.weight", "conv"),
        Row(f"{ours}/embed/bias", f"{theirs}.bias"),
    ]


def _block(names: Mapping[str, str], scale: str, response: str, layout: str) -> list[Row]:
    """Rows of a block; those of leaves that a preset lacks are passed over."""
    depthwise = [
        Row("depthwise/kernel", f"{names['depthwise']}.weight", "conv"),
        Row("depthwise/bias", f"{names['depthwise']}.bias"),
    ]
    responses = [
        Row("response/scale", f"{response}.weight", layout),
        Row("response/bias", f"{response}.bias", layout),
    ]
    layers = [row for ours in ("mlp/up", "mlp/down") for row in linear(ours, names[ours])]
    return [*depthwise, *norm("norm", names["norm"]), *layers, *responses, Row("scale", scale)]


def read(hf: Mapping[str, Any]) -> ConvNet:
    """The preset of a config.json of `model_type` convnext or convnextv2, without its classifier.

    Raises:
      ConfigError: a setting that we do not support.
    """
    second = hf.get("model_type") == "convnextv2"
    depths = hf.get("depths") or (3, 3, 9, 3)
    widths = hf.get("hidden_sizes") or (96, 192, 384, 768)
    activation, size = hf.get("hidden_act", "gelu"), hf.get("image_size", 224)
    _require(hf.get("model_type") in ("convnext", "convnextv2"), hf, "model_type")
    _require(hf.get("num_channels", 3) == 3, hf, "num_channels")
    _require(hf.get("num_stages", len(depths)) == len(depths) == len(widths), hf, "num_stages")
    _require(activation in ACTIVATIONS, hf, "hidden_act")
    _require(isinstance(hf.get("patch_size", 4), int), hf, "patch_size")
    return ConvNet(
        convnext_stages(depths, widths),
        widths[0],
        stem_stride=hf.get("patch_size", 4),
        image_size=size if isinstance(size, int) else tuple(size),
        layer_scale=0.0 if second else max(hf.get("layer_scale_init_value", 1e-6), 0.0),
        response_norm=second,
        activation=ACTIVATIONS[activation],
        norm_eps=EPS,
        final_norm_eps=hf.get("layer_norm_eps", 1e-12),
        drop_path=hf.get("drop_path_rate", 0.0),
    )


def write(preset: ConvNet) -> dict[str, Any]:
    """The fields of config.json: the inverse of `read`.

    Raises:
      ConfigError: transformers has no such ConvNeXt.
    """
    depths, widths = ([stage[i] for stage in preset.stages] for i in (0, 1))
    expected = {
        "kind": "convnext",
        "stages": convnext_stages(depths, widths),
        "norm_eps": EPS,
    } | ({"layer_scale": 0.0} if preset.response_norm else {})
    for field, value in expected.items():
        if getattr(preset, field) != value:
            raise ConfigError(
                f"{field} is {getattr(preset, field)}; transformers' ConvNeXt has {value}"
            )
    size = preset.image_size
    fields = {
        "model_type": "convnextv2" if preset.response_norm else "convnext",
        "num_channels": 3,
        "patch_size": preset.stem_stride,
        "num_stages": len(depths),
        "hidden_sizes": widths,
        "depths": depths,
        "hidden_act": NAMES[preset.activation],
        "layer_norm_eps": preset.final_norm_eps,
        "drop_path_rate": preset.drop_path,
        "image_size": size if isinstance(size, int) else list(size),
    }
    return fields | ({} if preset.response_norm else {"layer_scale_init_value": preset.layer_scale})


def _require(holds: bool, hf: Mapping[str, Any], field: str) -> None:
    if not holds:
        raise ConfigError(f"config.json: {field} is {hf.get(field)!r}, which no ConvNeXt here has")
