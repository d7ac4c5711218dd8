"""Adapters as the PEFT library stores them: adapter_config.json and adapter_model.safetensors.

A module of theirs has `lora_A.weight` [R, D], `lora_B.weight` [F, R] and for DoRA
`lora_magnitude_vector` [F]; what is trained as a whole is among `modules_to_save`. Theirs has a
module per layer where ours stacks them. Prefixes are stored otherwise, see `peft_prefix`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError, StorageError
from vlm_jax.models import adapters, params
from vlm_jax.weights import files, peft_prefix, tables
from vlm_jax.weights.registry import Family, family
from vlm_jax.weights.tables import Row

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Layouts of what is a linear layer in both, whose matrix theirs holds transposed.
LINEAR = ("linear", "linear_out")
# Their names of our leaves; the magnitudes once had ".weight" behind them.
NAMES = {
    adapters.A: "lora_A.weight",
    adapters.B: "lora_B.weight",
    adapters.MAGNITUDE: "lora_magnitude_vector",
}
# What is none of LoRA and DoRA on linear layers, and would change what the adapter computes.
UNKNOWN = (
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
)

Arrays = dict[str, np.ndarray]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds one."""
    return (folder / CONFIG).is_file()


def write(
    folder: Path,
    model: Model,
    model_type: str,
    leaves: Mapping[str, Any],
    trained: Iterable[str] = (),
    dropout: float = 0.0,
) -> None:
    """Writes the adapters among a model's leaves.

    Args:
      folder: where to.
      model: its presets.
      model_type: the family whose class of transformers the adapter is for.
      leaves: all of the model's by path, adapters' included; kernels may be held in few bits.
      trained: paths of other leaves that go along, whole.
      dropout: of further training.

    Raises:
      ConfigError: there is no adapter, or PEFT has no place for one of them or for a leaf.
      StorageError: a file cannot be written.
    """
    if adapters.kernels(leaves, adapters.DOWN):
        raise ConfigError("there are bottleneck adapters, which PEFT has no place for")
    if peft_prefix.there(leaves):
        _store(folder, *peft_prefix.written(model, leaves, trained))
        return
    known = family(model_type)
    rows = {row.ours: row for row in known.rows(model)}
    tensors, ranks, alphas = {}, {}, {}
    for path in adapters.kernels(leaves):
        row = _linear(rows.get(path), path, model_type)
        own = {
            n: np.asarray(leaves[p])
            for n in adapters.LEAVES
            if (p := adapters.beside(path, n)) in leaves
        }
        own = own if "{}" in row.theirs else {name: leaf[None] for name, leaf in own.items()}
        for i, name in enumerate(row.names(len(own[adapters.A]))):
            module = _loaded(known, model, name).removesuffix(".weight")
            rank = own[adapters.A].shape[-1]
            ranks[module], alphas[module] = rank, _plain(own[adapters.SCALE][i] * rank)
            for leaf in NAMES.keys() & own.keys():
                tensors[f"{PREFIX}{module}.{NAMES[leaf]}"] = np.ascontiguousarray(own[leaf][i].T)
    _check_kinds(tensors, ranks)
    whole = _whole(known, model, leaves, trained)
    tensors |= {PREFIX + name: array for name, array in whole.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": dropout,
        "use_rslora": False,
        "use_dora": any(name.endswith(NAMES[adapters.MAGNITUDE]) for name in tensors),
        "target_modules": list(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        **_patterns("r", "rank_pattern", ranks),
        **_patterns("lora_alpha", "alpha_pattern", alphas),
    }
    _store(folder, config, tensors)


def _linear(row: Row | None, path: str, model_type: str) -> Row:
    if row is None or row.layout not in LINEAR or row.part != (0, 1):
        raise ConfigError(
            f"{path} has an adapter, but is no linear layer of its own in a {model_type} of "
            "transformers; expected adapters of others only (export merges any)"
        )
    return row


def _loaded(known: Family, model: Model, name: str) -> str:
    """The name of a folder's tensor as that of the class in memory, which PEFT goes by."""
    for pattern, replacement in known.loaded(model):
        name = re.sub(pattern, replacement, name)
    return name


def _plain(number: float) -> int | float:
    """Without the noise of float32, and whole where it can be."""
    number = float(f"{float(number):.6g}")
    return int(number) if number == int(number) else number


def _check_kinds(tensors: Arrays, modules: Mapping[str, int]) -> None:
    if not modules:
        raise ConfigError("no parameter has an adapter: there is nothing to write")
    rescaled = sum(name.endswith(NAMES[adapters.MAGNITUDE]) for name in tensors)
    if rescaled not in (0, len(modules)):
        raise ConfigError(
            f"{rescaled} of {len(modules)} modules have a DoRA adapter and the others LoRA; an "
            "adapter of PEFT is one of both throughout"
        )


def _patterns(field: str, pattern: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The most frequent value, and those that differ from it by module."""
    common = max(values.values(), key=list(values.values()).count)
    others = {f"^{re.escape(name)}": value for name, value in values.items() if value != common}
    return {field: common, pattern: others}


def _whole(
    known: Family, model: Model, leaves: Mapping[str, Any], trained: Iterable[str]
) -> Arrays:
    """Modules that hold trained leaves, with all of their tensors, by the names in memory."""
    shapes = params.abstract(model)
    flat = {p: np.asarray(leaves[p]) if p in leaves else leaf for p, leaf in shapes.items()}
    rows = known.rows(model)
    trained, theirs = set(trained), tables.theirs_of(rows, flat)
    homeless = trained - {row.ours for row in rows}
    if homeless:
        raise ConfigError(f"the family has no place for {min(homeless)}, which was trained")
    touched = {
        name.rpartition(".")[0]
        for name, entry in theirs.items()
        if any(row.ours in trained for row, _ in entry.parts)
    }
    found = {}
    for name, entry in theirs.items():
        module = next((m for m in touched if name.startswith(f"{m}.")), None)
        if module is None:
            continue
        if "." in name.removeprefix(f"{module}."):
            raise ConfigError(
                f"{module} was trained in part: PEFT stores whole modules; freeze it or train "
                f"what is below it"
            )
        held = [row.ours for row, _ in entry.parts if row.ours not in leaves]
        if held:
            raise ConfigError(
                f"{module} was trained in part and {held[0]} is held in few bits: PEFT stores "
                "whole modules; freeze the rest of it"
            )
        parts = [
            (row, flat[row.ours] if i is None else flat[row.ours][i]) for row, i in entry.parts
        ]
        own, arrays = zip(*parts, strict=True)
        found[_loaded(known, model, name)] = tables.to_theirs(list(own), list(arrays))
    return found


def _store(folder: Path, config: Mapping[str, Any], tensors: Arrays) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / TENSORS, tensors, lambda name: [tensors[name]], {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error


def read(folder: Path, model: Model, model_type: str) -> Arrays:
    """Adapters and whole modules of a folder, as leaves of ours by path.

    Raises:
      ConfigError: it asks for what is no LoRA or DoRA of linear layers, and no prefix.
      DataError: it is missing, damaged, or of another model.
    """
    config = files.read_json(folder / CONFIG)
    _refuse_unknown(folder, config)
    if not (folder / TENSORS).is_file():
        raise DataError(
            f"{folder} has no {TENSORS}: pickled adapters may hold code and are never opened; save "
            "it as safetensors first"
        )
    source, known = files.Safetensors([folder / TENSORS]), family(model_type)
    if config["peft_type"] == peft_prefix.KIND:
        return peft_prefix.read(folder, model, config, source)
    names = {_canonical(known, model, name): name for name in source.shapes}
    found, used = {}, set()
    for path, row, group in _groups(known, model):
        there = [names[name] for name in group if name in names]
        if not there:
            continue
        if len(there) < len(group) or len({source.shapes[name] for name in there}) > 1:
            raise DataError(
                f"{folder}: {path} is there for {len(there)} of {len(group)} layers, or of "
                "several ranks; expected all layers, of one rank"
            )
        used.update(there)
        found[path] = _stacked(row, [_ours(model, path, row, source.read(name)) for name in there])
        if path.endswith(f"/{adapters.A}"):
            scales = [np.float32(_scale(config, name, source.shapes[name])) for name in there]
            found[adapters.beside(row.ours, adapters.SCALE)] = _stacked(row, scales)
    left = sorted(set(source.shapes) - used)
    if left:
        raise DataError(
            f"{folder}: {len(left)} tensors are of no layer of the {model_type} that an adapter "
            f"may have, the first of them {left[0]}"
        )
    _refuse_misfits(folder, model, found)
    return found


def _refuse_misfits(folder: Path, model: Model, found: Arrays) -> None:
    """Raises DataError unless every adapter is whole and fits its kernel."""
    flat, inputs = params.abstract(model), params.linears(model)
    adapted = {path.rpartition("/")[0] for path in found if adapters.is_leaf(path)}
    for kernel in sorted(f"{layer}/{adapters.KERNEL}" for layer in adapted):
        a = found.get(adapters.beside(kernel, adapters.A))
        spec = adapters.Spec(0 if a is None else a.shape[-1], 1.0, magnitude=True)
        stacked = "/stack/blocks/" in kernel
        for name, leaf in adapters.shapes(spec, flat[kernel], inputs[kernel], stacked).items():
            given = found.get(adapters.beside(kernel, name))
            if given is None and name == adapters.MAGNITUDE:
                continue
            if given is None or given.shape != leaf.shape:
                shape = "nothing" if given is None else given.shape
                raise DataError(
                    f"{folder} has {shape} for {adapters.beside(kernel, name)}; expected "
                    f"{leaf.shape}: is it another model's?"
                )


def _refuse_unknown(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", peft_prefix.KIND):
        expected = f"'LORA' or '{peft_prefix.KIND}'"
        raise ConfigError(f"{folder / CONFIG}: peft_type is {kind!r}; expected {expected}")
    asked = [name for name in UNKNOWN if config.get(name)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if asked:
        raise ConfigError(
            f"{folder / CONFIG}: {asked[0]} is {config[asked[0]]!r}; expected LoRA or DoRA of "
            "linear layers without it"
        )


def _canonical(known: Family, model: Model, name: str) -> str:
    """The name of a tensor with its module as the table of names calls it."""
    # Beside an adapted output matrix peft saves the base layer too, unless told not to.
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    name = re.sub(rf"({NAMES[adapters.MAGNITUDE]})\.weight$", r"\1", name)
    own = next((own for own in NAMES.values() if name.endswith(f".{own}")), "")
    name = name.removesuffix(own) + "weight" if own else name
    for pattern, replacement in known.renames(model):
        name = re.sub(pattern, replacement, name)
    return name.removesuffix("weight") + own if own else name


def _groups(known: Family, model: Model) -> Iterator[tuple[str, Row, list[str]]]:
    """Leaves that a folder may have, with the row of the kernel and their names, one per layer."""
    flat, kernels = params.abstract(model), params.linears(model)
    for row in known.rows(model):
        if row.ours not in flat or row.part != (0, 1):
            continue
        theirs = row.names(tables.layers_of(row.ours, flat[row.ours].shape))
        yield row.ours, row, theirs
        if row.ours in kernels and row.layout in LINEAR:
            modules = [name.removesuffix("weight") for name in theirs]
            for leaf, name in NAMES.items():
                yield adapters.beside(row.ours, leaf), row, [module + name for module in modules]


def _ours(model: Model, path: str, row: Row, array: np.ndarray) -> np.ndarray:
    if path != row.ours:
        return array.T
    shape = params.abstract(model)[path].shape
    return tables.to_ours(row, array, shape[1:] if "{}" in row.theirs else shape)


def _stacked(row: Row, layers: list) -> np.ndarray:
    return np.stack(layers) if "{}" in row.theirs else np.asarray(layers[0])


def _scale(config: Mapping[str, Any], name: str, a: tuple[int, ...]) -> float:
    """Factor of the product of A and B of a module, given the shape of its A."""
    rank = max((*a, 1)[0], 1)
    module = name.removeprefix(PREFIX).removesuffix("." + NAMES[adapters.A])
    patterns = config.get("alpha_pattern") or {}
    try:
        matches = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(patterns.get(next(matches, None), config.get("lora_alpha", 8)))
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{CONFIG}: the alpha of {module} cannot be read: {error}") from error
    if not 0 < alpha < math.inf:
        raise DataError(f"{CONFIG}: the alpha of {module} is {alpha}; expected more than 0")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
