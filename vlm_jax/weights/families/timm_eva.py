"""EVA-CLIP's towers, with the names of timm's `Eva` (models/eva.py), which publishes them.

Their config.json names an architecture, and the sizes are those of `presets.encoder_sizes`. Tensors
named `head` are CLIP's projection.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import vision
from vlm_jax.weights.tables import Row, linear, norm, placed

# Their architectures by ours.
ARCHITECTURES = {
    "eva_giant_patch14_clip_224": "eva-clip-g14",
    "eva02_large_patch14_clip_224": "eva02-clip-l14",
    "eva02_large_patch14_clip_336": "eva02-clip-l14-336",
    "eva02_enormous_patch14_clip_224": "eva02-clip-e14",
}
CARRIED = (r"blocks\.\d+\..*", r"norm\..*", r"head\..*")
QKV = ("query", "key", "value")
NORMS = {"norm1": "norm1", "norm2": "norm2"}


def rows(preset: Encoder) -> list[Row]:
    """The table of names; towers with gated blocks have queries, keys and values apart."""
    block = "blocks.{}"
    return [
        Row("stem/embed/kernel", "patch_embed.proj.weight", "patch"),
        Row("stem/embed/bias", "patch_embed.proj.bias"),
        Row("class_token", "cls_token", "token"),
        Row("positions", "pos_embed", "first"),
        *vision.block_rows(block, _linear(preset.gated), NORMS),
        *placed([] if preset.gated else _fused(), "stack/blocks/", f"{block}."),
        *placed(norm("inner_norm", "attn.norm"), "stack/blocks/", f"{block}."),
        *placed(norm("mlp/norm", "mlp.norm"), "stack/blocks/", f"{block}."),
        *norm("norm", "norm"),
    ]


def _linear(gated: bool) -> dict[str, str]:
    if not gated:
        return {"attention/out": "attn.proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
    apart = {f"attention/{name}": f"attn.{name[0]}_proj" for name in QKV}
    mlp = {"mlp/gate": "mlp.fc1_g", "mlp/up": "mlp.fc1_x", "mlp/down": "mlp.fc2"}
    return {"attention/out": "attn.proj", **apart, **mlp}


def _fused() -> list[Row]:
    matrices = [
        row
        for i, name in enumerate(QKV)
        for row in linear(f"attention/{name}", "attn.qkv", bias=False, part=(i, 3))
    ]
    biases = [Row(f"attention/{name}/bias", f"attn.{name[0]}_bias", "flat") for name in QKV]
    return matrices + biases


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a config.json.

    Raises:
      ConfigError: its architecture is not among ours.
    """
    name = hf.get("architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"architecture of config.json is {name!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    return published(ARCHITECTURES[name])


def write(preset: Encoder) -> dict[str, Any]:
    """The config.json of a preset.

    Raises:
      ConfigError: it is none of the published ones.
    """
    compared = ("width", "depth", "mlp", "heads", "patch", "gated", "post_norm", "rotary_grid")
    for theirs, ours in ARCHITECTURES.items():
        known = published(ours)
        same = all(getattr(preset, field) == getattr(known, field) for field in compared)
        if same and preset.table_grid == known.table_grid:
            return {"architecture": theirs}
    raise ConfigError(
        f"no architecture of timm has the sizes of {dataclasses.asdict(preset)}; expected one of "
        f"{', '.join(ARCHITECTURES)}"
    )
