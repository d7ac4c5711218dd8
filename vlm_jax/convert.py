"""Published weights in and out, and a check of them.

python -m vlm_jax.convert import SOURCE DIR
python -m vlm_jax.convert export DIR HF_DIR    # DIR: an imported model, or a run
python -m vlm_jax.convert check DIR INPUTS.npz OUTPUTS.npz --new_tokens=16

SOURCE is a folder as transformers writes it, with config.json and safetensors; a decoder's .gguf;
a .npz of big_vision, which goes out as one again where HF_DIR ends so; or the .pth of an
EfficientNet-Lite, which only comes in. `check` feeds the arrays that `forward` of transformers
takes, by keyword, and writes float32 `logits` and greedy `tokens`; of an encoder alone
`last_hidden_state`, of a contrastive pair `logits_per_image` and `logits_per_text`. Nothing that
came with weights is ever executed.
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
    from vlm_jax.weights import conversion, store

    stored = store.open_model(source) if store.is_model(source) else _run(source)
    if target.suffix == ".npz":
        conversion.export_npz(stored, target)
    else:
        conversion.export_folder(stored, target, _FAMILY.value)
    print(target)


def _run(workdir: Path):
    """A run's parameters, for the folder that the run started from."""
    from vlm_jax.training import checkpoints
    from vlm_jax.weights import store

    config, leaves = checkpoints.load_params(workdir)
    whole = [init.folder for init in config.init if not init.part]
    if not whole and not _FAMILY.value:
        raise ConfigError(
            f"{workdir} did not start from a whole imported model: name the model_type to export "
            "to with --family"
        )
    if not whole:
        return store.Stored(workdir, config.model, _FAMILY.value, {}, leaves)
    origin = store.open_model(doors.folder(whole[0]))
    return dataclasses.replace(origin, model=config.model, trained=leaves)


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
    "check": (check, ("DIR", "INPUTS.npz", "OUTPUTS.npz")),
}


if __name__ == "__main__":
    doors.run(main)
