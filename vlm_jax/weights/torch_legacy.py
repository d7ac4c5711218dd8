"""Torch's own files (.pth, .pt, .bin) of plain tensors, without torch and without unpickling.

Such a file is a pickle, which is a program. Here its opcodes are read as data: a small stack
machine knows dictionaries, strings, numbers and how torch describes a tensor. Whatever else a
pickle names is refused by its name; nothing is imported or called. Both containers are read: the
old one, five pickles and then the numbers (torch/serialization.py, _legacy_save), and the zip of
torch 1.6 and later.
"""

import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import DataError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
# The zip's pickle holds names and shapes only: a hundred bytes or two for each tensor.
_LONGEST_PICKLE = 64 << 20


class _Global(NamedTuple):
    """A name that a pickle speaks of; only a name."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """Where the numbers of a tensor are, counted in numbers of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """A file of `torch.save(state_dict, path)`; tensors are read one at a time.

    Attributes:
      shapes, dtypes: of its tensors by name.

    Raises:
      DataError: cut short, not such a file, or it names something else than tensors.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            opened = _zipped(path, self._map) if self._map[:2] == b"PK" else _legacy(self._map)
            self._tensors, self._starts = opened
            for name, tensor in self._tensors.items():
                _check(name, tensor, self._starts, len(self._map))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        # What the standard library raises where bytes are missing or make no sense.
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(f"{path} cannot be read as a torch file: {error}") from error
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.storage.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, copied out of the file.

        Raises:
          KeyError: there is none of this name.
        """
        storage, offset, shape, strides = self._tensors[name]
        flat = np.frombuffer(self._map, storage.dtype, storage.size, self._starts[storage.key])
        strides = tuple(storage.dtype.itemsize * stride for stride in strides)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides).copy()


def _legacy(file: mmap.mmap) -> tuple[dict[str, _Tensor], dict[str, int]]:
    """The tensors of the old container, and where each storage's numbers start."""
    if interpret(file) != _MAGIC or interpret(file) != _PROTOCOL:
        raise DataError("this is no torch file: its first numbers are others")
    if interpret(file).get("little_endian") is not True:
        raise DataError("written on a big-endian machine: not supported")
    tensors = _only_tensors(interpret(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    starts = {}
    for key in interpret(file):
        (size,) = struct.unpack("<q", file.read(8))
        if key not in storages or size != storages[key].size:
            raise DataError(f"storage {key!r} is not as long as its tensors say")
        starts[key] = file.tell()
        file.seek(size * storages[key].dtype.itemsize, os.SEEK_CUR)
    return tensors, starts


def _zipped(path, file: mmap.mmap) -> tuple[dict[str, _Tensor], dict[str, int]]:
    """The same of the zip: NAME/data.pkl, and NAME/data/KEY for every storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        mains = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(mains) != 1 or members[mains[0]].file_size > _LONGEST_PICKLE:
            raise DataError("expected one data.pkl of names and shapes in the zip")
        root = mains[0].removesuffix("data.pkl")
        if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
            raise DataError("written on a big-endian machine: not supported")
        tensors = _only_tensors(interpret(archive.read(mains[0])))
    starts = {}
    for storage in {tensor.storage.key: tensor.storage for tensor in tensors.values()}.values():
        member = members[f"{root}data/{storage.key}"]
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.file_size != storage.size * storage.dtype.itemsize:
            raise DataError(f"storage {storage.key!r} is not as long as its tensors say")
        # The lengths of name and extra field stand in the member's own header (APPNOTE 4.3.7).
        lengths = struct.unpack_from("<HH", file, member.header_offset + 26)
        starts[storage.key] = member.header_offset + 30 + sum(lengths)
    return tensors, starts


def _only_tensors(found: Any) -> dict[str, _Tensor]:
    if not isinstance(found, dict):
        raise DataError(f"holds a {type(found).__name__}, not a dictionary of tensors by name")
    storages: dict[str, _Storage] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise DataError(f"{name!r} holds a {type(value).__name__}, not a tensor")
        if storages.setdefault(value.storage.key, value.storage) != value.storage:
            raise DataError(f"describes storage {value.storage.key!r} in two ways")
    return found


def _check(name: str, tensor: _Tensor, starts: dict[str, int], length: int) -> None:
    """Refuses a tensor that does not lie within its storage, or that within the file."""
    storage, offset, shape, strides = tensor
    count = math.prod(shape)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    outside = count > 0 and offset + last >= storage.size
    # Numbers that stand for several (stride 0) could be made as many as one likes.
    if outside or count > storage.size or min(offset, *shape, *strides, 0) < 0:
        raise DataError(f"tensor {name} does not lie within its storage of {storage.size} numbers")
    if starts[storage.key] + storage.size * storage.dtype.itemsize > length:
        raise DataError(f"tensor {name} lies beyond the end of the file: it is cut short")


def _storage(kind, storage, key, device, size, view=None) -> _Storage:
    """The persistent id of a storage."""
    name = storage.name if isinstance(storage, _Global) else type(storage).__name__
    whole = isinstance(key, str) and isinstance(size, int) and size >= 0 and view is None
    if kind != "storage" or name not in _STORAGES or not whole:
        raise DataError(f"refers to {kind!r} of {name}: refused, only tensors are read")
    return _Storage(key, _STORAGES[name], size)


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
    """The arguments of torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
        raise DataError("describes a tensor by other things than a storage and whole numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# What a pickle may call, and what is made here instead.
_BUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}


class _Machine:
    """The stack machine of a pickle, for the opcodes that build plain data (see pickletools)."""

    mark = object()

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        self.push(self.memo[number])

    def named(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in _BUILDERS and name not in _STORAGES:
            raise DataError(f"names {name}: refused, only tensors are read")
        self.push(_Global(name))

    def marked(self) -> list[Any]:
        """What stands above the last mark; both go."""
        at = max(i for i, value in enumerate(self.stack) if value is self.mark)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def last(self, count: int) -> list[Any]:
        """The last values of the stack, which go."""
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def set(self, pairs: list[Any]) -> None:
        self._top(dict).update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def build(self) -> None:
        """Drops the attributes of a dictionary: a state_dict keeps versions of modules there."""
        self.stack.pop()
        self._top(dict)

    def reduce(self) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, _Global) or function.name not in _BUILDERS:
            raise DataError("calls what is not a builder of tensors: refused")
        self.push(_BUILDERS[function.name](*arguments))

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise DataError(f"changes a {type(self.stack[-1]).__name__}: refused")
        return self.stack[-1]


_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    "MARK": lambda m, _: m.push(m.mark),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": lambda m, _: m.named(" ".join(m.last(2))),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.push(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.last(3))),
    "SETITEM": lambda m, _: m.set(m.last(2)),
    "SETITEMS": lambda m, _: m.set(m.marked()),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.push(_storage(*m.stack.pop())),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
            *("BINUNICODE", "SHORT_BINUNICODE"),
        ),
        _Machine.push,
    ),
}


def interpret(source: mmap.mmap | bytes) -> Any:
    """The plain data that one pickle describes; a mapped file is left after its end.

    Raises:
      DataError: it uses an opcode or a name that plain tensors need not.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(source):
        if opcode.name == "STOP":
            break
        if opcode.name not in _OPCODES:
            raise DataError(f"uses the pickle opcode {opcode.name}: refused, only tensors are read")
        _OPCODES[opcode.name](machine, argument)
    return machine.stack.pop()
