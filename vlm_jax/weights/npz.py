"""big_vision's npz checkpoints: parameters by flat names with "/" between, in and out bit for bit.

Layers that a file stacks on a first axis (big_vision's `scan=True`) are shown one by one, under the
names that big_vision gives them where it does not stack: one table of names serves both.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import DataError

# Where a checkpoint keeps its parameters; the first that occurs holds, else all names are theirs
# (big_vision's utils.load_params).
PREFIXES = ("params/", "opt/target/")
# Names of stacked layers, and of one of them: models/vit.py and models/ppp/gemma.py.
STACKED = (
    (r"(.*\b)encoderblock/(.*)", "encoderblock_"),
    (r"(.*\b)layers/(?!\d+/)(.*)", "layers/"),
)
# Weights do not compress much: a small file that unpacks to more than this is no checkpoint.
_RATIO, _SMALL = 20, 64 << 20
# What the libraries raise where bytes are missing or make no sense, or are encrypted.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
BFLOAT16 = np.dtype(jnp.bfloat16)


class Form(NamedTuple):
    """What a file's names do not say once they are shown as ours: how to write it again.

    Attributes:
      prefix: before the names of all parameters.
      stacked: whether layers are stacked, by what stands before their name ("img/Transformer/").
    """

    prefix: str = "params/"
    stacked: frozenset[str] = frozenset()


PLAIN = Form()


class _Place(NamedTuple):
    """Where a tensor is: a member of the zip, or one layer of it."""

    member: str
    layer: int | None


class Npz:
    """A checkpoint; its arrays are read one at a time and never unpickled.

    Attributes:
      shapes, dtypes: of its parameters by name; bfloat16, which numpy writes as two bytes without
        a type, is known as such.
      form: how to write the file again.
      left: names of what is no parameter (an optimizer's state).

    Raises:
      DataError: not an npz file, cut short, or it holds objects or unpacks to too much.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            _check_sizes(self._zip, os.path.getsize(path))
            headers = {
                info.filename.removesuffix(".npy"): _header(self._zip, info)
                for info in self._zip.infolist()
            }
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except _UNREADABLE as error:
            raise DataError(f"{path} cannot be read as npz: {error}") from error
        prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in headers)), "")
        self.left = sorted(name for name in headers if not name.startswith(prefix))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, _Place] = {}
        self._last: tuple[str, np.ndarray] | None = None
        stacked = set()
        for member, (shape, dtype) in headers.items():
            if not member.startswith(prefix):
                continue
            name = member.removeprefix(prefix)
            place = _stack(name)
            if place is None or not shape or not shape[0]:
                self._show(name, _Place(member, None), shape, dtype)
                continue
            stacked.add(place[0])
            for layer in range(shape[0]):
                one = _layer_name(*place, layer)
                self._show(one, _Place(member, layer), shape[1:], dtype)
        self.form = Form(prefix, frozenset(stacked))

    def read(self, name: str) -> np.ndarray:
        """A parameter, or the layer of a stacked one.

        Raises:
          KeyError: there is none of this name.
          DataError: its bytes are damaged.
        """
        member, layer = self._places[name]
        if self._last is None or self._last[0] != member:  # the layers of a stack come in turn
            try:
                with self._zip.open(member + ".npy") as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
            except _UNREADABLE as error:
                raise DataError(f"{self.path}: {member} cannot be read: {error}") from error
            self._last = member, array.view(_typed(array.dtype))
        array = self._last[1]
        return array if layer is None else array[layer]

    def _show(self, name: str, place: _Place, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if name in self.shapes:
            raise DataError(f"{self.path} holds {name} twice")
        self.shapes[name], self.dtypes[name], self._places[name] = shape, dtype, place


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], form: Form = PLAIN) -> None:
    """Writes parameters as `Npz` shows them: `write(path, all that npz reads, npz.form)`.

    Raises:
      DataError: a layer of a stack is missing.
    """
    arrays: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        found = _layer(name, form.stacked)
        if found is None:
            arrays[form.prefix + name] = array
        else:
            stacks.setdefault(form.prefix + found[0], {})[found[1]] = array
    for name, layers in stacks.items():
        if sorted(layers) != list(range(len(layers))):
            raise DataError(f"cannot write {name}: its layers are {sorted(layers)}")
        arrays[name] = np.stack([layers[i] for i in range(len(layers))])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            array = np.ascontiguousarray(array).reshape(np.shape(array))
            array = array.view("V2") if array.dtype == BFLOAT16 else array
            with archive.open(name + ".npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _typed(dtype: np.dtype) -> np.dtype:
    return BFLOAT16 if dtype == np.dtype("V2") else dtype


def _stack(name: str) -> tuple[str, str, str] | None:
    """What stands before and after the layers' name, and how one of them is called."""
    for pattern, one in STACKED:
        found = re.fullmatch(pattern, name)
        if found:
            return found[1], one, found[2]
    return None


def _layer_name(before: str, one: str, after: str, layer: int) -> str:
    return f"{before}{one}{layer}/{after}"


def _layer(name: str, stacked: Iterable[str]) -> tuple[str, int] | None:
    """The stacked name of a layer's parameter, and which layer; None where it stands alone."""
    for _, one in STACKED:
        found = re.fullmatch(rf"(.*\b|){one}(\d+)/(.*)", name)
        if found and found[1] in stacked:
            return f"{found[1]}{one.rstrip('_/')}/{found[3]}", int(found[2])
    return None


def _check_sizes(archive: zipfile.ZipFile, length: int) -> None:
    """Refuses what unpacks to far more than a checkpoint of its size can hold."""
    infos = archive.infolist()
    if len({info.filename for info in infos}) != len(infos):
        raise DataError("two members of the zip have one name")
    packed, unpacked = (sum(getattr(i, k) for i in infos) for k in ("compress_size", "file_size"))
    if packed > length or unpacked > max(_SMALL, _RATIO * length):
        raise DataError(
            f"{length} bytes that unpack to {unpacked}: this is no checkpoint but a zip bomb"
        )


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a member, which must be as long as they say."""
    if not info.filename.endswith(".npy"):
        raise DataError(f"member {info.filename} is no array")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"member {info.filename} has npy version {version}, not 1.0 or 2.0")
        read = (np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0)
        shape, _, dtype = read[version[0] - 1](file)
        start = file.tell()
    if dtype.hasobject or dtype.names or (dtype.kind == "V" and dtype != np.dtype("V2")):
        raise DataError(f"{info.filename} holds {dtype}, not numbers: refused")
    if info.file_size != start + int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise DataError(f"{info.filename} is not as long as its shape {shape} says")
    return shape, _typed(dtype)
