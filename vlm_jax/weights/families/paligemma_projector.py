"""PaliGemma's projector: names as in the state_dict of transformers' `PaliGemmaModel`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector
from vlm_jax.weights.tables import Row, linear

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this projector."""
    return linear("layers/0", "multi_modal_projector.linear")


def read(hf: Mapping[str, Any]) -> Connector:
    """The projector of a config.json, which has no setting but its width."""
    return Connector("linear")


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the projector but for its width: none."""
    return {}
