"""Where a new run's parameters come from: folders of imported weights, part by part."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jaxtyping import Array

from vlm_jax.config import Config, Init
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.weights import store


def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the leaves that `config.init` names, as the folders hold them.

    Raises:
      ConfigError: a part is not in its folder, or of another shape than the model's.
    """
    wanted, found = params.abstract(config.model), {}
    for init, stored, pairs in _sources(config, wanted):
        tensors = stored.parameters.tensors
        for ours, theirs in pairs.items():
            shape = wanted[ours].shape
            if theirs not in tensors or tensors[theirs].shape != shape:
                given = tensors[theirs].shape if theirs in tensors else "nothing"
                raise ConfigError(
                    f"config.init: {init.folder} has {given} for {ours}; the model needs {shape}: "
                    "its presets are not those of the folder"
                )
            found[ours] = jax.ShapeDtypeStruct(shape, tensors[theirs].dtype)
    return found


def load(config: Config, places: Mapping[str, jax.sharding.Sharding]) -> dict[str, Array]:
    """The same leaves on their devices, in the folders' dtypes."""
    found = {}
    for _, stored, pairs in _sources(config, params.abstract(config.model)):
        loaded = store.load(stored, {theirs: places[ours] for ours, theirs in pairs.items()})
        found |= {ours: loaded[theirs] for ours, theirs in pairs.items()}
    return found


def _sources(
    config: Config, wanted: Mapping[str, object]
) -> Iterator[tuple[Init, store.Stored, dict[str, str]]]:
    """Of every entry, its folder and its leaves as path -> path in the folder."""
    for init in config.init:
        prefix = f"{init.part}/" if init.part else ""
        source = f"{init.source or init.part}/" if init.part else ""
        paths = [path for path in wanted if path.startswith(prefix)]
        if not paths:
            raise ConfigError(f"config.init: the model has no part {init.part!r}")
        stored = store.open_model(Path(init.folder).expanduser().absolute())
        yield init, stored, {path: source + path.removeprefix(prefix) for path in paths}
