"""Reading config.json: what its fields say in our presets, and which of them we do not support."""

from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.errors import ConfigError

# Activations by the name that config.json gives them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # what GPT-NeoX-20B says
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
# The same the other way round; the first name of each is the usual one.
NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def activation(hf: Mapping[str, Any], key: str, default: str) -> str:
    """The preset's name of an activation."""
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: {key} is {name!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def expect(hf: Mapping[str, Any], **wanted: Any) -> None:
    """Refuses settings that no preset has.

    Args:
      hf: a config.json; a field that is absent or null is as wanted.
      **wanted: the only supported value of each field, or a tuple of them.

    Raises:
      ConfigError: a field says something else.
    """
    for key, value in wanted.items():
        given = hf.get(key)
        values = value if isinstance(value, tuple) else (value,)
        if given is not None and given not in values:
            raise ConfigError(
                f"config.json: {key} is {given!r}, which is not supported; expected "
                f"{' or '.join(map(repr, values))}"
            )


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


def part(
    hf: Mapping[str, Any], key: str, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """A part of a config.json that may be left out, where `default` stands for all of it.

    transformers fills a part that is there, even an empty one, with the defaults of its own class.
    """
    found = hf.get(key)
    return (default or {}) if found is None else found


def image_token(hf: Mapping[str, Any], default: int | None = None) -> int | None:
    """Id of the placeholder; of its two names the newer, `image_token_id`, wins in transformers."""
    found = hf.get("image_token_id")
    return hf.get("image_token_index", default) if found is None else found


def period(kinds: Iterable[str]) -> tuple[str, ...]:
    """The shortest pattern that, over and over, gives these kinds of layers."""
    kinds = tuple(kinds)
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds
