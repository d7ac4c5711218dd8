"""DINOv2 with registers, with the names of published files for Dinov2WithRegistersModel."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import dinov2

DEFAULTS = dinov2.DEFAULTS | {"patch_size": 16}
# Files have registers even where there are none: a tensor of no rows.
CARRIED = (*dinov2.CARRIED, r"embeddings\.register_tokens")
rows = dinov2.rows


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a config.json.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    registers = hf.get("num_register_tokens", 4)
    return dinov2.read(hf, DEFAULTS, registers=registers, position_resize="bicubic_antialias")


def write(preset: Encoder) -> dict[str, Any]:
    """The config.json of a preset.

    Raises:
      ConfigError: the feed-forward part has a width that config.json cannot say.
    """
    theirs = dinov2.write(preset, "dinov2_with_registers")
    return {**theirs, "num_register_tokens": preset.registers}
