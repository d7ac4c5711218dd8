"""SmolVLM: Idefics3 under other names, those of SmolVLMForConditionalGeneration folders."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.weights.families import idefics3, smolvlm_vision

ARCHITECTURE = "SmolVLMForConditionalGeneration"
rows, carried = idefics3.rows, idefics3.carried
fitted, inputs = idefics3.fitted, idefics3.inputs


def read(hf: Mapping[str, Any]) -> Model:
    """The system of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    return idefics3.read(hf, smolvlm_vision)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    return idefics3.write(model, "smolvlm", smolvlm_vision)
