"""GGUF files (llama.cpp): metadata and tensors, read one at a time and dequantised to float32."""

import os
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights.families import llama_cpp
from vlm_jax.weights.tables import Row

# llama.cpp's architectures that transformers calls otherwise.
MODEL_TYPES = {"gemma3": "gemma3_text"}
IGNORED = llama_cpp.CARRIED


class Gguf:
    """A GGUF file; it is mapped into memory, so that only what is read is loaded.

    Attributes:
      metadata: its key-value pairs as plain data.
      shapes, dtypes: of its tensors by name; the shapes in numpy's order, the dtypes all float32.

    Raises:
      ConfigError: the package `gguf` is not installed.
      DataError: not a GGUF file, or cut short.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.metadata, self._tensors = _open(path)
        # ggml counts axes from the fastest one.
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
          KeyError: there is none of this name.
          DataError: its quantisation is not one that the package can undo.
        """
        from gguf import quants

        tensor = self._tensors[name]
        try:
            array = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise DataError(f"{self.path}: tensor {name} cannot be dequantised: {error}") from error
        return np.asarray(array, np.float32).reshape(self.shapes[name])

    @property
    def model_type(self) -> str:
        """What transformers calls its architecture."""
        architecture = self.metadata["general.architecture"]
        return MODEL_TYPES.get(architecture, architecture)

    def decoder(self) -> Decoder:
        """The preset that its metadata and tensors speak of; see `llama_cpp.read`."""
        return llama_cpp.read(self.metadata, self.shapes, self.read)

    def rows(self) -> list[Row]:
        """Where the leaves of `decoder()` are."""
        return llama_cpp.rows(self.decoder(), self.metadata["general.architecture"])


def _open(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and the package's view of each tensor by name."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs the package gguf: pip install 'vlm_jax[pretrained]'"
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    # What numpy and the package raise where bytes are missing or make no sense.
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as GGUF: {error}") from error
