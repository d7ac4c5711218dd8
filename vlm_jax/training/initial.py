"""Where a new run's parameters come from: folders of imported weights and of runs, part by part.

A folder of PEFT gives its adapters, and what was trained beside them, to the part that an entry
above it has filled; one of BERT gives a Q-Former what it begins by (`weights.bert`). A table of
learned positions is brought to the grid of the model that reads it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.config import Config, Init, Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import adapters, grids, params
from vlm_jax.parallel import sharding
from vlm_jax.presets.encoders import Encoder
from vlm_jax.training import adaptation
from vlm_jax.weights import bert, peft, store

# What a system adds: rows of a published decoder's vocabulary and gated blocks between its layers;
# what a Q-Former of the first stage speaks to a decoder by. Drawn where the folder has none.
ADDED = (r"decoder/added_(embedding|output/kernel)", r"decoder/cross/.*", r"connector/project/.*")
ADDITIONS = tuple(map(re.compile, ADDED))

Places = Mapping[str, jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder holds.

    Attributes:
      model: its presets.
      shapes: shape and dtype of its leaves by path; a run's adapters are merged.
      read: gives the leaves that it is told places of.
      partial: whether what it lacks of a part is drawn.
    """

    model: Model
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[Places], dict[str, Array]]
    partial: bool = False


def shapes(
    config: Config, planned: Mapping[str, Source] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the leaves that `config.init` names, as a run would start from them.

    Args:
      config: the run.
      planned: what folders that are not there yet will hold, by their names.

    Raises:
      ConfigError: a part is not in its folder, or of another shape than the model's.
    """
    wanted, found = params.abstract(config.model), {}
    for init, source, pairs in _sources(config, wanted, planned or {}):
        for ours, theirs in pairs.items():
            shape, leaf = wanted[ours].shape, source.shapes.get(theirs)
            given = "nothing" if leaf is None else leaf.shape
            if given != shape and not _regrids(source.model, theirs, config.model, ours):
                raise ConfigError(
                    f"config.init: {init.folder} has {given} for {ours}; the model needs {shape}: "
                    "its presets are not those of the folder"
                )
            found[ours] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    adapted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in _adapters(config).items()
    }
    return found | adapted


def load(
    config: Config,
    places: Places,
    taken: Callable[[dict[str, Array]], dict[str, Array]] = lambda leaf: leaf,
    alone: Collection[str] = (),
) -> dict[str, Array]:
    """The same leaves on their devices, in the folders' dtypes.

    Args:
      config: the run.
      places: where each leaf lies, by path.
      taken: what stands for leaves of `alone`, {path: leaf} -> leaves by path.
      alone: paths of leaves that are read one by one, so that they are never there together.
    """
    wanted, found = params.abstract(config.model), {}
    for _, source, pairs in _sources(config, wanted, {}):
        together = {ours: theirs for ours, theirs in pairs.items() if ours not in alone}
        found |= _read(config, source, together, places) if together else {}
        for ours in pairs.keys() - together.keys():
            found |= taken(_read(config, source, {ours: pairs[ours]}, places))
    for path, leaf in _adapters(config).items():
        made = jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)
        found |= taken({path: made}) if path in alone else {path: made}
    return found


def _read(
    config: Config, source: Source, pairs: Mapping[str, str], places: Places
) -> dict[str, Array]:
    """Leaves of a source by the model's paths, tables of positions on its grids."""
    wanted, found = params.abstract(config.model), {}
    # A table of positions lies alike on every grid: its rows are whole everywhere.
    loaded = source.read({theirs: places[ours] for ours, theirs in pairs.items()})
    for ours, theirs in pairs.items():
        leaf = loaded.pop(theirs)
        if leaf.shape != wanted[ours].shape:
            old, new = _tables(source.model)[theirs], _tables(config.model)[ours]
            leaf = jax.device_put(regridded(leaf, old, new), places[ours])
        found[ours] = leaf
    return found


def regridded(table: Float[Array, "S D"], old: Encoder, new: Encoder) -> Float[Array, "T D"]:
    """One encoder's table of positions on another's grid, by the `position_resize` of the latter.

    What the class token adds stays as it is.
    """
    first = int(old.class_token)
    grid = table[first:].astype(jnp.float32).reshape(*old.table_grid, old.width)
    seen = grids.all_places(new.table_grid)
    rest = grids.resized(grid, seen, new.position_resize)
    return jnp.concatenate([table[:first], rest.reshape(-1, old.width).astype(table.dtype)])


def _regrids(old: Model, theirs: str, new: Model, ours: str) -> bool:
    """Whether both paths are tables of positions that differ in their grids alone."""
    before, after = _tables(old).get(theirs), _tables(new).get(ours)
    if before is None or after is None:
        return False
    return (before.width, before.class_token) == (after.width, after.class_token)


def _tables(model: Model) -> dict[str, Encoder]:
    """Encoders with learned positions, by the paths of those."""
    names = ("encoder", *(f"extra_encoders/{i}" for i in range(len(model.extra_encoders))))
    return {
        f"{name}/positions": encoder
        for name, encoder in zip(names, model.encoders, strict=False)
        if isinstance(encoder, Encoder) and encoder.position == "learned"
    }


def _sources(
    config: Config, wanted: Mapping[str, object], planned: Mapping[str, Source]
) -> Iterator[tuple[Init, Source, dict[str, str]]]:
    """Of every entry, what its folder holds and its leaves as path -> path there."""
    for init in config.init:
        if peft.is_adapter(_folder(init)):
            continue
        prefix = f"{init.part}/" if init.part else ""
        source = f"{init.source or init.part}/" if init.part else ""
        paths = [path for path in wanted if path.startswith(prefix)]
        if not paths:
            raise ConfigError(f"config.init: the model has no part {init.part!r}")
        found = planned.get(init.folder) or _opened(_folder(init), config)
        pairs = {path: source + path.removeprefix(prefix) for path in paths}
        new = _drawn(pairs, found)
        if found.partial and len(new) == len(paths):
            raise ConfigError(f"config.init: {init.folder} has nothing of {init.part!r}")
        yield init, found, {path: theirs for path, theirs in pairs.items() if path not in new}


def _drawn(pairs: Mapping[str, str], source: Source) -> set[str]:
    """The paths of what a source need not have: whatever a partial one lacks, else additions of
    which it has nothing."""
    found, there = set(), source.shapes
    if source.partial:
        return {path for path, theirs in pairs.items() if theirs not in there}
    for pattern in ADDITIONS:
        paths = {path for path in pairs if pattern.fullmatch(path)}
        found |= paths if not any(pairs[path] in there for path in paths) else set()
    return found


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


def _opened(folder: Path, config: Config) -> Source:
    """An imported model, what a run's newest checkpoint holds, or a BERT for its Q-Former."""
    # Here and not above: checkpoints are of states, which start from this module.
    from vlm_jax.training import checkpoints, stages

    if bert.is_folder(folder):
        source = bert.Bert(folder, config.model, config.seed)
        return Source(config.model, source.shapes, functools.partial(_put, source), partial=True)
    run = stages.latest(folder)
    if store.is_model(folder) or not (run / checkpoints.FOLDER).is_dir():
        stored = store.open_model(folder)
        file = stored.parameters
        leaves = {p: jax.ShapeDtypeStruct(s, file.dtypes[p]) for p, s in file.shapes.items()}
        return Source(stored.model, leaves, functools.partial(store.load, stored))
    config, leaves = checkpoints.param_shapes(run)
    return of_run(
        config.model, leaves, lambda places: checkpoints.load_params(run, None, places)[1]
    )


def _put(source: bert.Bert, places: Places) -> dict[str, Array]:
    return {
        path: jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)
        for path, leaf in source.read(places).items()
    }


def of_run(
    model: Model,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[Places], dict[str, Array]],
) -> Source:
    """A run as a source: its adapters are merged, and kernels in few bits are floats.

    Args:
      model: the run's.
      leaves: its parameters to evaluate, adapters among them.
      read: gives those that it is told places of.
    """
    whole = jax.eval_shape(functools.partial(_whole, model), dict(leaves))
    return Source(model, whole, functools.partial(_merged, model, leaves, set(whole), read))


def _whole(model: Model, leaves: dict[str, Array]) -> dict[str, Array]:
    return adapters.merged(params.restored(model, leaves))


def _merged(
    model: Model,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    whole: set[str],
    read: Callable[[Places], dict[str, Array]],
    places: Places,
) -> dict[str, Array]:
    """The leaves wanted, with what stands beside them merged layer by layer."""
    layers = {path.rpartition("/")[0] for path in places}
    beside = {
        path: leaf
        for path, leaf in leaves.items()
        if path not in whole and path.rpartition("/")[0] in layers
    }
    if not beside:
        return read(places)
    mesh = next(iter(places.values())).mesh
    found = read({**places, **sharding.named(mesh, beside, params.axes)})
    for layer in {path.rpartition("/")[0] for path in beside}:
        paths = [path for path in found if path.rpartition("/")[0] == layer]
        merged = _whole(model, {path: found.pop(path) for path in paths})
        found |= {path: jax.device_put(leaf, places[path]) for path, leaf in merged.items()}
    return found
