"""safetensors files and the folders that hold them, one tensor in memory at a time.

Files are opened anew for every tensor: what a mapping has touched counts as the process's memory
for as long as the mapping stands.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from vlm_jax.errors import DataError, StorageError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
# What may hold code: never opened.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5 * 10**9  # transformers' default


class Tensor(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """Published tensors by name, whatever the format of the file."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""


class Safetensors:
    """The tensors of some safetensors files.

    Raises:
      DataError: a file is missing, damaged or holds a dtype that is not known; names it.
    """

    def __init__(self, paths: Iterable[Path]):
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            for name, tensor in _header(path).items():
                if name in self.tensors:
                    raise DataError(f"{path}: tensor {name} is also in {self.tensors[name].path}")
                self.tensors[name] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A tensor, or the part of it that `index` names."""
        path = self.tensors[name].path
        with _opened(path) as file:
            if index is ...:
                return file.get_tensor(name)
            return file.get_slice(name)[index]


class Memory:
    """Leaves in memory, read as those of a file are."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves
        self.shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        self.dtypes = {name: np.dtype(leaf.dtype) for name, leaf in leaves.items()}

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """See `Safetensors.read`."""
        return np.asarray(self._leaves[name][index])


class Folder(Safetensors):
    """A published folder: config.json and safetensors, in one file or several with an index.

    Attributes:
      config: what config.json holds.

    Raises:
      DataError: what belongs to it is missing, damaged, or would have to be executed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _config(path)
        super().__init__(_parts(path))
        if (path / INDEX).exists():
            self._check_index()

    def _check_index(self) -> None:
        for name, file in _weight_map(self.path).items():
            if name not in self.tensors:
                raise DataError(f"{self.path / INDEX}: {file} should hold {name}, but does not")


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, "np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole safetensors file: {error}") from error


def _header(path: Path) -> dict[str, Tensor]:
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            piece = file.get_slice(name)
            code = piece.get_dtype()
            if code not in DTYPES:
                raise DataError(f"{path}: tensor {name} is {code}; expected {', '.join(DTYPES)}")
            found[name] = Tensor(path, tuple(piece.get_shape()), DTYPES[code])
    return found


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise DataError(f"{path} has no config.json: expected a folder as transformers writes it")
    config = read_json(file)
    if "auto_map" in json.dumps(config):
        raise DataError(
            f"{file} has auto_map: the model is defined by code of its own, which is never run"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      DataError: it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def _parts(path: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (path / INDEX).exists():
        files = sorted(set(_weight_map(path).values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise DataError(f"{path / INDEX} names {file!r}; expected a file beside it")
            if not (path / file).is_file():
                raise DataError(f"{path / file} is missing, but {INDEX} names it")
        return [path / file for file in files]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickles = [found.name for pattern in PICKLES for found in sorted(path.glob(pattern))]
    if pickles:
        raise DataError(
            f"{path} has {pickles[0]} but no model.safetensors: pickled weights may hold code and "
            "are never opened; save them as safetensors first"
        )
    raise DataError(f"{path} has neither model.safetensors nor {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise DataError(f"{path / INDEX} has no weight_map from names to files")
    return weight_map


def write(
    path: Path,
    tensors: Mapping[str, Any],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file piece by piece; it appears when it is whole.

    Args:
      path: the file.
      tensors: shape and dtype by name, in the order written.
      pieces: the bytes of a tensor as arrays one after the other.
      metadata: words for the header.

    Raises:
      StorageError: it could not be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        code = CODES[np.dtype(tensor.dtype)]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in tensors:
                for piece in pieces(name):
                    file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            if file.tell() != 8 + len(text) + end:
                raise StorageError(f"{path}: {file.tell()} bytes came for {8 + len(text) + end}")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def write_shards(
    target: Path,
    tensors: Mapping[str, Any],
    pieces: Callable[[str], Iterable[np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder's tensors into one file, or into several with an index where they are large.

    Args:
      target: the folder; weights that lie there already are replaced.
      tensors, pieces: as for `write`.
      shard_bytes: largest size of a file, but for a single larger tensor.

    Raises:
      StorageError: it could not be written.
    """
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    if len(shards) == 1:
        write(target / "model.safetensors", shards[0], pieces, {"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(target / file, shard, pieces, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
