"""What the connectors' families share in reading a config.json."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError

# Their names of activations, ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}


def setting(hf: Mapping[str, Any], key: str, default: Any, supported: Mapping[Any, Any]) -> Any:
    """Our value of a setting, their classes' default where the file leaves it out.

    Raises:
      ConfigError: it has a value that no system of ours has.
    """
    value = hf.get(key, default)
    if value not in supported:
        expected = ", ".join(str(name) for name in supported)
        raise ConfigError(f"{key} of config.json is {value!r}; expected one of {expected}")
    return supported[value]


def part(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a config.json that may be left out."""
    return hf.get(key) or {}
