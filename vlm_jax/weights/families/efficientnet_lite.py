"""EfficientNet-Lite as the `efficientnet_lite_pytorch` package and its weight files name it.

Such files have no config.json; the architecture's name, as timm's files state it, stands for one.
"""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.convnets import EFFICIENTNET, ConvNet, efficientnet
from vlm_jax.weights.tables import Row, linear

FAMILY = "efficientnet_lite"  # its name among the model_types of transformers
# Counters that only training reads.
COUNTERS = r".*\.num_batches_tracked"
# Beside them: what stands after the last tap; the head where nothing is
# pooled, and the classifier where there are no classes.
CARRIED = (
    COUNTERS,
    r"_blocks\.\d+\..*",
    r"(_conv_head|_bn1|_fc)\..*",
)


def rows(preset: ConvNet) -> list[Row]:
    """The table of the network's state_dict; blocks are counted through all stages."""
    found = [
        Row("stem/conv/kernel", "_conv_stem.weight", "conv"),
        *_norm("stem/norm", "_bn0"),
        Row("head/wider/conv/kernel", "_conv_head.weight", "conv"),
        *_norm("head/wider/norm", "_bn1"),
        *linear("classifier", "_fc"),
    ]
    start = 0
    for i, (blocks, *_) in enumerate(preset.stages):
        found += _block(f"stages/{i}/first", f"_blocks.{start}")
        found += _block(f"stages/{i}/stack/blocks", "_blocks.{}", first=start + 1)
        start += blocks
    return found


def _block(ours: str, theirs: str, first: int = 0) -> list[Row]:
    """Rows of a block; those of leaves that a block lacks are passed over."""
    convolutions = [
        Row(f"{ours}/expand/kernel", f"{theirs}._expand_conv.weight", "pointwise", first=first),
        Row(f"{ours}/depthwise/kernel", f"{theirs}._depthwise_conv.weight", "conv", first=first),
        Row(f"{ours}/project/kernel", f"{theirs}._project_conv.weight", "pointwise", first=first),
    ]
    norms = [_norm(f"{ours}/norm{i}", f"{theirs}._bn{i}", first=first) for i in range(3)]
    return convolutions + [row for rows in norms for row in rows]


def _norm(ours: str, theirs: str, **fields) -> list[Row]:
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    return [Row(f"{ours}/{o}", f"{theirs}.{t}", **fields) for o, t in names.items()]


def read(hf: Mapping[str, Any]) -> ConvNet:
    """The preset of `{"architecture": "efficientnet_lite0", "num_classes": 1000}`.

    Raises:
      ConfigError: an architecture that is not in our table.
    """
    name = str(hf.get("architecture", "")).removeprefix("tf_").removeprefix("efficientnet_")
    if name not in EFFICIENTNET:
        raise ConfigError(
            f"config.json: architecture is {hf.get('architecture')!r}; expected one of "
            + ", ".join(f"efficientnet_{known}" for known in EFFICIENTNET)
        )
    return efficientnet(name, classes=hf.get("num_classes", 0))


def published(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What `read` takes, of a state_dict's shapes.

    Raises:
      ConfigError: it is of no EfficientNet-Lite in our table; names what it lacks.
    """
    missing = [name for name in ("_conv_stem.weight", "_fc.weight") if name not in shapes]
    if missing:
        raise ConfigError(
            f"is no EfficientNet-Lite, it lacks {missing[0]}: of torch's own files only these are "
            "imported; for others give the folder of config.json and safetensors"
        )
    # All sizes have the same first and last widths but for the last block's.
    known = {f"efficientnet_{name}": efficientnet(name) for name in EFFICIENTNET}
    blocks = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("_blocks."))
    for name, preset in known.items():
        if blocks == sum(stage[0] for stage in preset.stages):
            return {"architecture": name, "num_classes": shapes["_fc.weight"][0]}
    raise ConfigError(f"is an EfficientNet of {blocks} blocks; expected one of {', '.join(known)}")


def write(preset: ConvNet) -> dict[str, Any]:
    """What `read` takes.

    Raises:
      ConfigError: the network is not in the table, so that no published name speaks of it.
    """
    for name in EFFICIENTNET:
        if (preset.kind, preset.stages) == ("efficientnet", efficientnet(name).stages):
            return {"architecture": f"efficientnet_{name}", "num_classes": preset.classes}
    raise ConfigError("stages are those of no published EfficientNet-Lite")
