"""LLaVA's projector: names as in the state_dict of transformers' `LlavaModel`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this projector."""
    name = "multi_modal_projector.linear_{}"
    first = linear("layers/0", name.format(1), preset.bias)
    return first + linear("layers/1", name.format(2), preset.bias)


def read(hf: Mapping[str, Any]) -> Connector:
    """The projector of a config.json.

    Raises:
      ConfigError: a setting that we do not have.
    """
    activation = fields.setting(hf, "projector_hidden_act", "gelu", fields.ACTIVATIONS)
    bias = fields.setting(hf, "multimodal_projector_bias", True, {True: True, False: False})
    return Connector("mlp", activation=activation, bias=bias)


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the projector."""
    return {
        "projector_hidden_act": fields.NAMES[preset.activation],
        "multimodal_projector_bias": preset.bias,
    }
