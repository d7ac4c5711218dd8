"""SmolVLM's vision tower, with the names of transformers' SmolVLMVisionTransformer: Idefics2's."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.families import idefics2_vision as idefics2

DEFAULTS = idefics2.DEFAULTS | {"hidden_size": 1152, "num_attention_heads": 16}
CARRIED = idefics2.CARRIED
rows = idefics2.rows


def read(hf: Mapping[str, Any]) -> Encoder:
    """The preset of a vision_config.

    Raises:
      ConfigError: it has a setting that we do not compute.
    """
    return idefics2.read(hf, DEFAULTS)


def write(preset: Encoder) -> dict[str, Any]:
    """The vision_config of a preset."""
    return idefics2.write(preset, "smolvlm_vision")
