"""From published folders to ours and back, tensor by tensor, so that memory holds one at a time."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.weights import files, gguf, gguf_tokenizer, npz, processors, registry, store, towers
from vlm_jax.weights.families import big_vision, efficientnet_lite
from vlm_jax.weights.registry import Family, family
from vlm_jax.weights.tables import (
    Row,
    layers_of,
    placed,
    scatter,
    theirs_of,
    to_ours,
    to_theirs,
)
from vlm_jax.weights.torch_legacy import TorchFile

# Files of a published folder that export gives back.
KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
OUTPUT = r"(.*\.)?lm_head\.weight"
SHOWN = 3  # names in a message


def import_weights(source: Path, target: Path) -> store.Stored:
    """Turns published weights into one of our folders.

    Args:
      source: a folder of transformers, or a file whose suffix is a key of FILES.
      target: the folder to write.

    Raises:
      ConfigError: they are of a kind that no preset describes.
      DataError: they are missing, damaged or not what their config promises.
    """
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not store.is_model(target):
        raise ConfigError(f"{target} holds something else; expected a new folder or a model's")
    if source.is_dir():
        return import_folder(source, target)
    if not source.is_file():
        raise DataError(f"{source} does not exist")
    if source.suffix not in FILES:
        raise DataError(f"{source}: expected a folder, or a file of {', '.join(FILES)}")
    return FILES[source.suffix](source, target)


def import_gguf(source: Path, target: Path) -> store.Stored:
    """Turns a GGUF decoder and its tokenizer into one of our folders; see `import_weights`."""
    file = gguf.Gguf(source)
    model, kind = configs.Model(decoder=file.decoder()), file.model_type
    known = dataclasses.replace(
        family(kind),
        rows=lambda model: placed(file.rows(), "decoder/"),
        carried=lambda model: (),
        ignored=gguf.IGNORED,
        renames=lambda model: (),
    )
    stored = store.Stored(target, model, kind, {})
    import_tensors(file, stored, known)
    gguf_tokenizer.save(file.metadata, target / store.SOURCE)
    store.write_config(stored)
    return stored


def import_npz(source: Path, target: Path) -> store.Stored:
    """Turns a checkpoint of big_vision into one of our folders; see `import_weights`."""
    file = npz.Npz(source)
    root = big_vision.root(file.shapes)
    form = {"prefix": file.form.prefix, "stacked": sorted(file.form.stacked), "root": root}
    stored = store.Stored(target, big_vision.read(file.shapes), big_vision.FAMILY, form)
    import_tensors(file, stored, registry.big_vision_family(root))
    store.write_config(stored)
    return stored


def import_torch(source: Path, target: Path) -> store.Stored:
    """Turns a state_dict of an EfficientNet-Lite into one of our folders; see `import_weights`."""
    file = TorchFile(source)
    try:
        published = efficientnet_lite.published(file.shapes)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    model = configs.Model(encoder=efficientnet_lite.read(published))
    stored = store.Stored(target, model, efficientnet_lite.FAMILY, published)
    import_tensors(file, stored, registry.EFFICIENTNET_LITE)
    store.write_config(stored)
    return stored


# How a file is imported, by its suffix.
FILES = {".gguf": import_gguf, ".npz": import_npz, ".pth": import_torch}


def import_folder(source: Path, target: Path) -> store.Stored:
    """Turns a folder of transformers into one of ours.

    Raises:
      ConfigError: its config.json says what no preset does.
      DataError: its tensors are not those its config.json promises; names the first.
    """
    folder = files.Folder(source)
    kind = registry.kind_of(folder.config)
    known = family(kind)
    model = _untied(known, folder, _model(known, folder, kind))
    stored = store.Stored(target, model, kind, folder.config)
    import_tensors(folder, stored, known)
    copy_kept(source, target / store.SOURCE)
    store.write_config(stored)
    return stored


def _model(known: Family, folder: files.Folder, kind: str) -> configs.Model:
    """The model of a config.json, however wrong that may be."""
    layers = max([0, *_layers(folder.config)])
    if layers > len(folder.shapes):
        raise ConfigError(
            f"{folder.path}/config.json speaks of {layers} layers; the folder has only "
            f"{len(folder.shapes)} tensors"
        )
    try:
        model = known.read(folder.config)
        configs.check_model(model)
        empty = [path for path, leaf in params.abstract(model).items() if not leaf.size]
        if empty:
            raise ValueError(f"nothing would be in {_first(empty)}")
    except (ConfigError, DataError):
        raise
    except Exception as error:  # sizes that make no sense fail wherever they are first used
        raise ConfigError(f"{folder.path}/config.json is not of a {kind}: {error!r}") from error
    return model


LAYERS = re.compile(r".*(n_|num_.*)layers|.*depths?")  # fields that count layers


def _layers(config: Any, counts: bool = False) -> Iterator[int]:
    """Whatever a config.json says of numbers of layers, nested configs included.

    A table has a row per layer: what is wildly wrong must be seen before one is made.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _layers(value, bool(LAYERS.fullmatch(str(key))))
    elif isinstance(config, list):
        for value in config:
            yield from _layers(value, counts)
    elif counts and isinstance(config, int):
        yield config


def _untied(known: Family, folder: files.Folder, model: configs.Model) -> configs.Model:
    """The model, with an output matrix of its own where the folder holds one.

    Where config.json ties it to the embedding table, as transformers does: only if both are equal.
    """
    if model.decoder is None or not model.decoder.tied:
        return model
    names = _canonical(folder.shapes, known.renames(model))
    table = {row.ours: row.theirs for row in known.rows(model)}.get("decoder/embedding")
    output = next((n for n in names if re.fullmatch(OUTPUT, n)), None)
    if output is None or table not in names:
        return model
    if np.array_equal(folder.read(names[output]), folder.read(names[table])):
        return model
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, tied=False))


def import_tensors(source: files.Source, stored: store.Stored, known: Family) -> None:
    """Writes parameters and carried tensors of a folder.

    Raises:
      DataError: a tensor is missing, left over, or of another shape.
    """
    names = _canonical(source.shapes, known.renames(stored.model))
    leaves = params.abstract(stored.model)
    rows = {row.ours: row for row in known.rows(stored.model)}
    computed = theirs_of(rows.values(), leaves)
    _check(stored.model, known, leaves, {n: source.shapes[o] for n, o in names.items()})
    stored.path.mkdir(parents=True, exist_ok=True)
    (stored.path / "config.json").unlink(missing_ok=True)
    dtypes = {path: _dtype(source, names, rows[path], leaves[path].shape) for path in leaves}
    shapes = {path: _struct(leaf.shape, dtypes[path]) for path, leaf in leaves.items()}

    def layers(path: str) -> Iterator[np.ndarray]:
        row, shape = rows[path], leaves[path].shape
        stacked = "{}" in row.theirs
        for name in row.names(layers_of(path, shape)):
            array = to_ours(row, source.read(names[name]), shape[1:] if stacked else shape)
            yield array.astype(dtypes[path], copy=False)

    files.write(stored.path / store.PARAMETERS, shapes, layers)
    carried = [n for n in _carried(stored.model, known, names) if n not in computed]
    theirs = {n: _struct(source.shapes[names[n]], source.dtypes[names[n]]) for n in carried}
    write = files.write if theirs else lambda path, *_: path.unlink(missing_ok=True)
    write(stored.path / store.CARRIED, theirs, lambda name: [source.read(names[name])])


def copy_kept(source: Path, target: Path) -> None:
    """Copies the tokenizer's and processor's files."""
    found = sorted({path for pattern in KEPT for path in source.glob(pattern) if path.is_file()})
    for path in found:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)


def _canonical(names: Iterable[str], renames: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The names that tables know -> the names that the source has."""
    found = {}
    for name in names:
        known = name
        for pattern, replacement in renames:
            known = re.sub(pattern, replacement, known)
        if known in found:
            raise DataError(f"tensors {name} and {found[known]} are one and the same")
        found[known] = name
    return found


def _check(model: configs.Model, known: Family, leaves, shapes: Mapping[str, tuple]) -> None:
    """Raises DataError unless these are the tensors that the table speaks of."""
    wanted = theirs_of(known.rows(model), leaves)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise DataError(
            f"{len(missing)} tensors are missing, the first of them {_first(missing)}: the "
            f"config.json speaks of {len(wanted)}"
        )
    for name, expected in wanted.items():
        if shapes[name] != expected.shape:
            raise DataError(
                f"tensor {name} has shape {shapes[name]}; by config.json it is {expected.shape}"
            )
    patterns = (*known.carried(model), *known.ignored, *_tied(model))
    extra = [
        name
        for name in shapes
        if name not in wanted and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    if extra:
        raise DataError(
            f"{len(extra)} tensors are left over, the first of them {_first(extra)}: config.json "
            "does not speak of them"
        )


def _tied(model: configs.Model) -> tuple[str, ...]:
    """An output matrix that some folders store although it is the embedding table."""
    tied = model.decoder is not None and model.decoder.tied
    return (OUTPUT,) if tied else ()


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _dtype(source: files.Source, names: Mapping[str, str], row: Row, shape: tuple) -> np.dtype:
    """The dtype that holds every layer of a leaf exactly."""
    dtypes = {source.dtypes[names[name]] for name in row.names(layers_of(row.ours, shape))}
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def _struct(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _carried(model: configs.Model, known: Family, names: Iterable[str]) -> list[str]:
    patterns = known.carried(model)
    return sorted(n for n in names if any(re.fullmatch(pattern, n) for pattern in patterns))


def export_npz(stored: store.Stored, target: Path) -> None:
    """Writes a checkpoint of big_vision, in the form it came in.

    Raises:
      ConfigError: the model did not come from one.
    """
    if stored.family != big_vision.FAMILY:
        raise ConfigError(f"{stored.path} is of {stored.family}; only big_vision's go out as npz")
    form, carried = stored.published, stored.carried
    leaves = {path: stored.parameters.read(path) for path in stored.parameters.shapes}
    tensors = scatter(big_vision.rows(stored.model, form["root"]), leaves)
    tensors |= {name: carried.read(name) for name in carried.shapes}
    npz.write(target, tensors, npz.Form(form["prefix"], frozenset(form["stacked"])))


def export_folder(stored: store.Stored, target: Path, model_type: str = "") -> None:
    """Writes a folder that transformers loads with its own class.

    Args:
      stored: the model.
      target: the folder to write.
      model_type: another family than the one it came from.

    Raises:
      ConfigError: the family has no place for a leaf of the model.
    """
    if target.exists() and target.resolve() == stored.path.resolve():
        raise ConfigError(f"{target} is the model's own folder; expected another one")
    model_type = model_type or stored.family
    known = family(model_type)
    parameters, carried = stored.parameters, stored.carried
    leaves = params.abstract(stored.model)
    table = known.rows(stored.model)
    homeless = leaves.keys() - {row.ours for row in table}
    if homeless:
        raise ConfigError(f"{model_type} has no place for {_first(sorted(homeless))}")
    wanted = theirs_of(table, leaves)
    tensors = {
        name: _struct(entry.shape, parameters.dtypes[entry.parts[0][0].ours])
        for name, entry in wanted.items()
    } | dict(carried.tensors)

    def pieces(name: str) -> list[np.ndarray]:
        if name not in wanted:
            return [carried.read(name)]
        rows, layers = zip(*wanted[name].parts, strict=True)
        arrays = [
            parameters.read(row.ours, ... if layer is None else layer)
            for row, layer in zip(rows, layers, strict=True)
        ]
        return [to_theirs(list(rows), arrays)]

    target.mkdir(parents=True, exist_ok=True)
    files.write_shards(target, tensors, pieces)
    copy_kept(stored.path / store.SOURCE, target)
    for name, content in processors.written(stored.model, model_type).items():
        if not (target / name).exists():
            (target / name).write_text(json.dumps(content, indent=2) + "\n")
    config = _config(stored, known)
    # A class of the same family with a head that we carry, say, stays that class.
    same = model_type == stored.family and stored.published.get("architectures")
    config |= {
        "architectures": same or [known.architecture],
        "dtype": str(_main_dtype(tensors)),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _config(stored: store.Stored, known: Family) -> dict[str, Any]:
    """What the model's config.json says.

    What it said when the model came is left where our fields say the same: an image size of 384
    pixels, say, of which patches of 14 see 378.
    """
    try:
        if known.read(stored.published) == stored.model:
            return dict(stored.published)
    except (ConfigError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError):
        pass  # it is of another family, or there is none
    written = known.write(stored.model)
    try:
        same = known.write(known.read(stored.published)) == written
    except (ConfigError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError):
        same = False  # it is of another family, or there is none
    found = _merged(written, stored.published) if same else _merged(stored.published, written)
    # What a family cannot say, such as a cap on a system's logits, must not get lost on the way.
    towers.refuse_unlike(stored.model, known.read(found), found["model_type"])
    return found


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first config.json with what the second says in its place, nested configs too."""
    found = dict(first)
    for key, value in second.items():
        nested = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if nested else value
    return found


def _main_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """The dtype that most numbers have."""
    sizes: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        dtype = np.dtype(tensor.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(tensor.shape))
    return max(sizes, key=sizes.get)
