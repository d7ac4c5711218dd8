"""Golden files of published models: written with torch, read without it."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.weights import files

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
BEAMS = 3  # of the beam searches
KINDS = ("tensors", "inputs", "outputs")


class Golden(NamedTuple):
    """A published model, what it was given and what it made of it."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def path(name: str) -> pathlib.Path:
    """Where a golden file lies."""
    return FOLDER / f"published_{name}.npz"


def names() -> list[str]:
    """Of all golden files."""
    return sorted(p.stem.removeprefix("published_") for p in FOLDER.glob("published_*.npz"))


def read(name: str) -> Golden:
    """A golden file."""
    arrays = {kind: {} for kind in KINDS}
    with np.load(path(name)) as file:
        config = json.loads(str(file["config"]))
        for key in file.files:
            kind, _, rest = key.partition("/")
            if kind in arrays:
                arrays[kind][rest] = file[key]
    return Golden(config, **arrays)


def write(name: str, golden: Golden) -> None:
    """Writes a golden file; weights and inputs keep their dtype."""
    arrays = {
        f"{kind}/{key}": array for kind in KINDS for key, array in getattr(golden, kind).items()
    }
    config = json.dumps(golden.config, sort_keys=True)
    np.savez_compressed(path(name), config=np.array(config), **arrays)


def publish(golden: Golden, folder: pathlib.Path, shards: int = 1) -> pathlib.Path:
    """Writes the folder as its authors would have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config))
    ordered = sorted(golden.tensors)
    parts = [ordered[i::shards] for i in range(shards)]
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    for file, part in zip(names, parts):
        tensors = {name: golden.tensors[name] for name in part}
        files.write(folder / file, tensors, lambda name: [golden.tensors[name]])
    if shards > 1:
        weight_map = {name: file for file, part in zip(names, parts) for name in part}
        (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def relative_error(ours: np.ndarray, theirs: np.ndarray, inputs: dict) -> float:
    """‖ours - theirs‖ / ‖theirs‖ over real positions."""
    mask = inputs.get("attention_mask")
    if mask is not None and ours.ndim == 3 and mask.shape == ours.shape[:2]:
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
