"""Idefics3's and SmolVLM's connector: names as in the state_dict of transformers'
`Idefics3Model`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector
from vlm_jax.weights.tables import Row, linear

CARRIED: tuple[str, ...] = ()


def rows(preset: Connector) -> list[Row]:
    """The table of this connector."""
    return linear("layers/0", "connector.modality_projection.proj", bias=False)


def read(hf: Mapping[str, Any]) -> Connector:
    """The connector of a config.json."""
    return Connector("linear", bias=False, pool="shuffle", factor=hf.get("scale_factor", 2))


def write(preset: Connector) -> dict[str, Any]:
    """The fields of config.json that speak of the connector."""
    return {"scale_factor": preset.factor}
