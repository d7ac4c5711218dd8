"""A model as a folder of ours: what `convert import` writes and training starts from.

config.json               the model's presets, its family, and the published config.json
parameters.safetensors    our leaves by path, in the dtype they were published in
carried.safetensors       tensors that the model does not compute with, by their names
source/                   the published tokenizer and processor files
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.errors import DataError
from vlm_jax.weights import files

FORMAT = "vlm_jax model 1"
PIECE_BYTES = 1 << 26  # read at once
PARAMETERS, CARRIED, SOURCE = "parameters.safetensors", "carried.safetensors", "source"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model's folder, or what training made of it.

    Attributes:
      path: the folder.
      model: its presets.
      family: model_type of the folders it is exported to.
      published: the config.json it came with.
      trained: leaves that stand for the folder's, by path; None = the folder's.
    """

    path: Path
    model: configs.Model
    family: str
    published: Mapping[str, Any]
    trained: Mapping[str, Any] | None = None

    @property
    def parameters(self) -> files.Safetensors | files.Memory:
        """Our leaves by path."""
        if self.trained is not None:
            return files.Memory(self.trained)
        return files.Safetensors([self.path / PARAMETERS])

    @property
    def carried(self) -> files.Safetensors:
        """Carried tensors by their published names."""
        path = self.path / CARRIED
        return files.Safetensors([path] if path.exists() else [])


def is_model(path: Path) -> bool:
    """Whether a folder is one of these."""
    try:
        return json.loads((path / "config.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_model(path: Path) -> Stored:
    """The model in a folder.

    Raises:
      DataError: it holds none, or a damaged one.
    """
    if not is_model(path):
        raise DataError(f"{path} is no model's folder: expected what `convert import` writes")
    config = files.read_json(path / "config.json")
    model = schema.typed(configs.Model, config["model"], "model")
    return Stored(path, model, config["family"], config["published"])


def write_config(stored: Stored) -> None:
    """Writes config.json: last, so that a folder with one is whole."""
    config = {
        "format": FORMAT,
        "family": stored.family,
        "model": schema.plain(stored.model),
        "published": dict(stored.published),
    }
    (stored.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(
    stored: Stored,
    shardings: Mapping[str, jax.sharding.Sharding],
    dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Leaves on their devices; each device's part is read from the file on its own.

    Args:
      stored: the folder.
      shardings: of the leaves wanted, by path.
      dtypes: by path; others keep the file's.

    Raises:
      DataError: the folder lacks a leaf.
    """
    source, found = stored.parameters, {}
    for path, sharding in shardings.items():
        if path not in source.shapes:
            raise DataError(f"{stored.path} has no parameter {path}")
        found[path] = _placed(source, path, sharding, (dtypes or {}).get(path))
    return found


def _placed(source: files.Safetensors | files.Memory, path: str, sharding, dtype) -> Array:
    shape = source.shapes[path]
    dtype = source.dtypes[path] if dtype is None else np.dtype(dtype)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not index:
            return source.read(path).astype(dtype)
        bounds = [i.indices(n)[:2] for i, n in zip(index, shape, strict=True)]
        out = np.empty([end - start for start, end in bounds], dtype)
        # A few rows at a time: beside the part itself only these are in memory.
        rows = max(1, PIECE_BYTES // max(1, out[:1].nbytes))
        for start in range(0, len(out), rows):
            here = slice(start, min(start + rows, len(out)))
            first = bounds[0][0]
            rest = [slice(*bound) for bound in bounds[1:]]
            out[here] = source.read(path, (slice(first + here.start, first + here.stop), *rest))
        return out

    return jax.make_array_from_callback(shape, sharding, part)
