"""Where a new run's parameters come from: folders of imported weights and of runs, part by part."""

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
        source = stored.parameters
        for ours, theirs in pairs.items():
            shape = wanted[ours].shape
            if source.shapes.get(theirs) != shape:
                given = source.shapes.get(theirs, "nothing")
                raise ConfigError(
                    f"config.init: {init.folder} has {given} for {ours}; the model needs {shape}: "
                    "its presets are not those of the folder"
                )
            found[ours] = jax.ShapeDtypeStruct(shape, source.dtypes[theirs])
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
        stored = _opened(Path(init.folder).expanduser().absolute())
        yield init, stored, {path: source + path.removeprefix(prefix) for path in paths}


def _opened(folder: Path) -> store.Stored:
    """An imported model, or what a run's newest checkpoint holds."""
    if store.is_model(folder) or not (folder / "checkpoints").is_dir():
        return store.open_model(folder)
    # Here and not above: checkpoints are of states, which start from this module.
    from vlm_jax.training import checkpoints

    config, leaves = checkpoints.load_params(folder)
    return store.Stored(folder, config.model, "", {}, leaves)
