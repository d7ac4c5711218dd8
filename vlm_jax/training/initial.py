"""Where a new run's parameters come from: folders of imported weights and of runs, part by part.

A folder of PEFT gives its adapters, and what was trained beside them, to the part that an entry
above it has filled.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from vlm_jax.config import Config, Init, Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import adapters, params
from vlm_jax.training import adaptation
from vlm_jax.weights import peft, store

# What `presets.decoders.Decoder.added` adds to a vocabulary: drawn where the folder has none.
ADDED = re.compile(r"decoder/added_(embedding|output/kernel)")


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
    adapted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in _adapters(config).items()
    }
    return found | adapted


def load(
    config: Config,
    places: Mapping[str, jax.sharding.Sharding],
    taken: Callable[[dict[str, Array]], dict[str, Array]] = lambda leaf: leaf,
) -> dict[str, Array]:
    """The same leaves on their devices, in the folders' dtypes.

    Args:
      config: the run.
      places: where each leaf lies, by path.
      taken: what stands for a leaf, {path: leaf} -> leaves by path; asked as soon as it is there.
    """
    found = {}
    for _, stored, pairs in _sources(config, params.abstract(config.model)):
        for ours, theirs in pairs.items():
            found |= taken({ours: store.load(stored, {theirs: places[ours]})[theirs]})
    for path, leaf in _adapters(config).items():
        made = jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)
        found |= taken({path: made})
    return found


def _sources(
    config: Config, wanted: Mapping[str, object]
) -> Iterator[tuple[Init, store.Stored, dict[str, str]]]:
    """Of every entry, its folder and its leaves as path -> path in the folder."""
    for init in config.init:
        if peft.is_adapter(_folder(init)):
            continue
        prefix = f"{init.part}/" if init.part else ""
        source = f"{init.source or init.part}/" if init.part else ""
        paths = [path for path in wanted if path.startswith(prefix)]
        if not paths:
            raise ConfigError(f"config.init: the model has no part {init.part!r}")
        stored = _opened(_folder(init))
        pairs = {path: source + path.removeprefix(prefix) for path in paths}
        there = stored.parameters.shapes
        yield init, stored, {p: t for p, t in pairs.items() if t in there or not ADDED.fullmatch(p)}


def _folder(init: Init) -> Path:
    return Path(init.folder).expanduser().absolute()


def _adapters(config: Config) -> dict[str, np.ndarray]:
    """The leaves of PEFT's folders.

    Raises:
      ConfigError: no entry above says of which family the part is, or the adapters are not those
        that the adaptation makes.
    """
    found, families = {}, {}
    for init in config.init:
        if not peft.is_adapter(_folder(init)):
            if store.is_model(_folder(init)):
                families[init.part] = store.open_model(_folder(init)).family
            continue
        if init.part not in families:
            raise ConfigError(
                f"config.init: {init.folder} is an adapter; expected an entry of part "
                f"{init.part!r} above it with the model that it adapts"
            )
        whole = config.model
        model = Model(**{init.part: getattr(whole, init.part)}) if init.part else whole
        leaves = peft.read(_folder(init), model, families[init.part])
        _refuse_others(config, init, leaves)
        found |= leaves
    return found


def _refuse_others(config: Config, init: Init, leaves: Mapping[str, np.ndarray]) -> None:
    plan = adaptation.of(config)
    shapes = plan.shapes | {path: held.kernel for path, held in plan.held.items()}
    for path, leaf in leaves.items():
        made = shapes[path].shape if path in shapes else "nothing"
        if made != leaf.shape:
            raise ConfigError(
                f"config.init: {init.folder} has {leaf.shape} for {path}; config.adaptation makes "
                f"{made}: give its rule the adapter's mode and rank"
            )
        spec = plan.adapters.get(path.removesuffix(adapters.SCALE) + adapters.KERNEL)
        if path.endswith(f"/{adapters.SCALE}") and not np.allclose(leaf, spec.scale):
            raise ConfigError(
                f"config.init: {init.folder} scales {path} by {leaf.max():g}; config.adaptation by "
                f"{spec.scale:g}: give its rule the adapter's alpha"
            )


def _opened(folder: Path) -> store.Stored:
    """An imported model, or what a run's newest checkpoint holds."""
    if store.is_model(folder) or not (folder / "checkpoints").is_dir():
        return store.open_model(folder)
    # Here and not above: checkpoints are of states, which start from this module.
    from vlm_jax.training import checkpoints

    config, leaves = checkpoints.load_params(folder)
    merged = adapters.merged(params.restored(config.model, leaves))
    return store.Stored(folder, config.model, "", {}, merged)
