"""Published weights in and out, and a check of them.

python -m vlm_jax.convert import SOURCE DIR
python -m vlm_jax.convert export DIR HF_DIR    # DIR: an imported model, or a run
python -m vlm_jax.convert adapter DIR PEFT_DIR # DIR: a run
python -m vlm_jax.convert check DIR INPUTS.npz OUTPUTS.npz --new_tokens=16

SOURCE is a folder as transformers writes it, with config.json and safetensors; a decoder's .gguf;
a .npz of big_vision, which goes out as one again where HF_DIR ends so; or the .pth of an
EfficientNet-Lite, which only comes in. `export` merges a run's adapters into what it writes, and
with --adapter=PEFT_DIR one of PEFT's; kernels that the run held in few bits are written as it
computed with them. `adapter` writes a run's adapters, and what it trained beside them, in PEFT's
format. `check` feeds the arrays that `forward` of transformers takes, by keyword, and writes
float32 `logits` and greedy `tokens`; of an encoder alone `last_hidden_state`, of a contrastive pair
`logits_per_image` and `logits_per_text`. Nothing that came with weights is ever executed.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from vlm_jax import doors
from vlm_jax.errors import ConfigError, DataError, StorageError

_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 0, "check: tokens to make after the prompt.")
_DAMAGED = (zipfile.BadZipFile, zlib.error)
_ADAPTER = flags.DEFINE_string("adapter", "", "export: a folder of PEFT to merge.")
_FAMILY = flags.DEFINE_string("family", "", "export: model_type, if not the one imported.")


def main(argv: Sequence[str]) -> None:
    """Imports, exports or checks."""
    command, words = (argv[1] if len(argv) > 1 else ""), argv[2:]
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; expected {', '.join(COMMANDS)}")
    function, names = COMMANDS[command]
    if len(words) != len(names):
        raise ConfigError(f"{command} was given {len(words)} words; expected {' '.join(names)}")
    try:
        function(*map(doors.folder, words))
    except OSError as error:  # a folder that cannot be made, a full disk
        raise StorageError(f"{command} failed: {error}") from error


def import_(source: Path, target: Path) -> None:
    """Turns published weights into a model's folder."""
    from vlm_jax.weights import conversion

    stored = conversion.import_weights(source, target)
    numbers = sum(int(np.prod(leaf.shape)) for leaf in stored.parameters.tensors.values())
    print(f"{target}: {stored.family}, {numbers:,} parameters")


def export(source: Path, target: Path) -> None:
    """Writes a model's folder as transformers loads it."""
    from vlm_jax.models import adapters
    from vlm_jax.weights import conversion, store

    stored = store.open_model(source) if store.is_model(source) else _restored(_run(source)[1])
    if _ADAPTER.value:
        stored = _adapted(stored, doors.folder(_ADAPTER.value))
    if stored.trained is not None:
        stored = dataclasses.replace(stored, trained=adapters.merged(stored.trained))
    if target.suffix == ".npz":
        conversion.export_npz(stored, target)
    else:
        conversion.export_folder(stored, target, _FAMILY.value)
    print(target)


def _restored(stored):
    """The run with kernels that it held in few bits as floats; says so."""
    from vlm_jax.models import params, quantised

    held = quantised.kernels(stored.trained)
    if not held:
        return stored
    print(
        f"{stored.path}: {len(held)} kernels were held in few bits; what they stood for in "
        "training is written, in float32, with the adapters merged"
    )
    return dataclasses.replace(stored, trained=params.restored(stored.model, stored.trained))


def _adapted(stored, folder: Path):
    """The model with the adapters of a folder of PEFT."""
    from vlm_jax.weights import peft

    if not peft.is_adapter(folder):
        raise DataError(f"{folder} is no adapter: it has no {peft.CONFIG}")
    parameters = stored.parameters
    leaves = {path: parameters.read(path) for path in parameters.shapes}
    leaves |= peft.read(folder, stored.model, _FAMILY.value or stored.family)
    return dataclasses.replace(stored, trained=leaves)


def adapter(source: Path, target: Path) -> None:
    """Writes a run's adapters as PEFT loads them."""
    from vlm_jax.models import adapters
    from vlm_jax.training import adaptation
    from vlm_jax.weights import peft

    config, stored = _run(source)
    plan = adaptation.of(config)
    whole = [path for path in plan.lr if not adapters.is_leaf(path)]
    rates = set(plan.dropout.values())
    dropout = rates.pop() if len(rates) == 1 else 0.0  # theirs has one for all
    model_type = _FAMILY.value or stored.family
    peft.write(target, stored.model, model_type, stored.trained, whole, dropout)
    print(target)


def _run(workdir: Path):
    """A run's config, and its parameters for the folder that the run started from."""
    from vlm_jax.training import checkpoints
    from vlm_jax.weights import store

    config, leaves = checkpoints.load_params(workdir)
    origin = _origin(config)
    if origin is None and not _FAMILY.value:
        raise ConfigError(
            f"{workdir} did not start from a whole imported model: name the model_type to export "
            "to with --family"
        )
    if origin is None:
        return config, store.Stored(workdir, config.model, _FAMILY.value, {}, leaves)
    return config, dataclasses.replace(origin, model=config.model, trained=leaves)


def _origin(config):
    """The whole imported model that a run started from, or the run that it started from, and so on.

    None where there is none.
    """
    from vlm_jax.training import checkpoints, stages
    from vlm_jax.weights import store

    whole = [init.folder for init in config.init if not init.part]
    if not whole:
        return None
    folder = doors.folder(whole[0])
    if (stages.latest(folder) / stages.CHECKPOINTS).is_dir():
        return _origin(checkpoints.param_shapes(folder)[0])
    return store.open_model(folder)


def check(folder: Path, inputs: Path, outputs: Path) -> None:
    """Runs a model on given arrays."""
    from vlm_jax.weights import checking, store

    try:
        with np.load(inputs, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # What numpy and zipfile raise where the file is none, is cut short or holds objects.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, *_DAMAGED) as error:
        raise DataError(f"{inputs} is no npz file of plain arrays: {error}") from error
    found = checking.run(store.open_model(folder), arrays, _NEW_TOKENS.value)
    try:
        with outputs.open("wb") as file:
            np.savez(file, **found)
    except OSError as error:
        raise StorageError(f"{outputs} cannot be written: {error}") from error
    print(", ".join(f"{name} {array.shape}" for name, array in found.items()))


COMMANDS = {
    "import": (import_, ("SOURCE", "DIR")),
    "export": (export, ("DIR", "HF_DIR")),
    "adapter": (adapter, ("DIR", "PEFT_DIR")),
    "check": (check, ("DIR", "INPUTS.npz", "OUTPUTS.npz")),
}


if __name__ == "__main__":
    doors.run(main)
