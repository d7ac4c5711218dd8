"""Tables of names: which of their tensors holds which of our leaves, and in what layout.

A family's table is a list of rows. The same rows turn their tensors into our leaves and back, bit
for bit, and tell which tensors are missing or left over.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.errors import DataError


class Row(NamedTuple):
    """One of our leaves, or one per layer of it, and where it comes from.

    Attributes:
      ours: path of our leaf; below `stack/blocks/` it has the layers as first axis.
      theirs: name of their tensor, `{}` where the number of the layer stands.
      layout: a key of LAYOUTS.
      part: (i, n) where theirs holds n of ours one after the other on its first axis, and ours is
        the i-th; `heads` where they alternate per head.
      heads: how many heads such parts alternate over; 0 = whole parts one after the other.
      first: number of their layer that is the first of our stack.
      every: how many of their layers lie between two of ours.
      numbers: of their layers, where no even step gives them.
    """

    ours: str
    theirs: str
    layout: str = "same"
    part: tuple[int, int] = (0, 1)
    heads: int = 0
    first: int = 0
    every: int = 1
    numbers: tuple[int, ...] = ()

    def names(self, layers: int) -> list[str]:
        """Names of their tensors, one per layer of a stacked leaf."""
        if "{}" not in self.theirs:
            return [self.theirs]
        if self.numbers:
            return [self.theirs.format(number) for number in self.numbers]
        return [self.theirs.format(self.first + i * self.every) for i in range(layers)]


class Layout(NamedTuple):
    """How one of their tensors becomes (a layer of) one of our leaves, and back.

    Attributes:
      ours: their array, our shape -> our array.
      theirs: our array -> their array.
    """

    ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _square(array: np.ndarray) -> np.ndarray:
    """Flattened patches [p * p * 3, D] as a convolution's kernel [D, 3, p, p]."""
    side = round((len(array) // 3) ** 0.5)
    return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _halves(array: np.ndarray) -> np.ndarray:
    """Per head [H, K, ...], rotary pairs that stand side by side moved K / 2 apart."""
    heads, size, *rest = array.shape
    return array.reshape(heads, size // 2, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def _pairs(array: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`."""
    heads, size, *rest = array.shape
    return array.reshape(heads, 2, size // 2, *rest).swapaxes(1, 2).reshape(array.shape)


# Torch stores the matrix of a linear layer as [out, in] and a convolution's kernel as
# [out, in, height, width].
LAYOUTS = {
    # As it is, but for the shape: vectors, embedding tables.
    "same": Layout(lambda x, shape: x.reshape(shape), lambda x: x),
    # The first of our axes is what goes in: [D, H, K].
    "linear": Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T),
    # The last of our axes is what comes out: [H, K, D].
    "linear_out": Layout(
        lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
    ),
    # [heads, K] as one vector.
    "flat": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    # A convolution over patches that do not overlap, ours as a matrix over flattened patches.
    "patch": Layout(lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape), _square),
    # A convolution, ours as [height, width, in, out].
    "conv": Layout(
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape), lambda x: x.transpose(3, 2, 0, 1)
    ),
    # A convolution of one pixel, ours as a matrix [in, out].
    "pointwise": Layout(
        lambda x, shape: x[:, :, 0, 0].T.reshape(shape), lambda x: x.T[:, :, None, None]
    ),
    "channels": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(1, 1, 1, -1)),
    # One row less: [1, 1, D] for [D].
    "token": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(1, 1, -1)),
    # One axis more in front: learned queries [1, Q, D].
    "first": Layout(lambda x, shape: x.reshape(shape), lambda x: x[None]),
    "row": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(1, -1)),
    "number": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(1)),
    # "linear" and "flat" of queries and keys whose rotary pairs stand side by side (llama.cpp).
    "linear_pairs": Layout(
        lambda x, shape: _halves(x.reshape(*shape[1:], -1)).transpose(2, 0, 1),
        lambda x: _pairs(x.transpose(1, 2, 0)).reshape(-1, x.shape[0]),
    ),
    "flat_pairs": Layout(
        lambda x, shape: _halves(x.reshape(shape)), lambda x: _pairs(x).reshape(-1)
    ),
    # Scales with their one added, ours without (llama.cpp's Gemmas); exact but for scales below
    # a half that are no sum of one and a float32.
    "plus_one": Layout(lambda x, shape: x.reshape(shape) - 1, lambda x: x + 1),
    # big_vision's: patches with their channels last; queries, keys and values with the heads in
    # front, alone or as parts of one array.
    "patch_last": Layout(
        lambda x, shape: x.reshape(shape), lambda x: _square(x).transpose(2, 3, 1, 0)
    ),
    "heads_first": Layout(
        lambda x, shape: x.swapaxes(0, 1).reshape(shape), lambda x: x.swapaxes(0, 1)
    ),
    "heads_first_part": Layout(
        lambda x, shape: x[0].swapaxes(0, 1).reshape(shape), lambda x: x.swapaxes(0, 1)[None]
    ),
}


def linear(ours: str, theirs: str, bias: bool = True, **fields) -> list[Row]:
    """Rows of a linear layer; queries, keys and values have heads, which their bias flattens."""
    layout = "linear_out" if ours.endswith("/out") else "linear"
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", layout, **fields)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias", "flat", **fields)] if bias else [])


def norm(ours: str, theirs: str, bias: bool = True, **fields) -> list[Row]:
    """Rows of a norm's scale and, as a rule, bias."""
    rows = [Row(f"{ours}/scale", f"{theirs}.weight", **fields)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias", **fields)] if bias else [])


def placed(rows: Iterable[Row], ours: str = "", theirs: str = "") -> list[Row]:
    """The rows of a part inside a whole: both names get a prefix."""
    return [row._replace(ours=ours + row.ours, theirs=theirs + row.theirs) for row in rows]


def layers_of(path: str, shape: tuple[int, ...]) -> int:
    """How many of their tensors a leaf of ours stacks."""
    return shape[0] if "/stack/blocks/" in f"/{path}" else 1


def to_ours(row: Row, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One of their tensors as (a layer of) our leaf; a view where numpy can.

    Args:
      row: where it goes.
      array: their tensor.
      shape: ours, without the layers' axis.

    Raises:
      DataError: the tensor has another size than the leaf.
    """
    part, parts = row.part
    if array.size != parts * int(np.prod(shape)):
        raise DataError(
            f"tensor {row.theirs} has shape {array.shape}; the model's {row.ours} needs "
            f"{parts} x {shape}"
        )
    if parts > 1:
        groups = row.heads or 1
        array = array.reshape(groups, parts, -1, *array.shape[1:])[:, part]
        array = array.reshape(-1, *array.shape[2:])
    return LAYOUTS[row.layout].ours(array, shape)


def to_theirs(rows: list[Row], arrays: list[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`, from all rows that share one of their tensors, in order of part."""
    arrays = [LAYOUTS[row.layout].theirs(a) for row, a in zip(rows, arrays, strict=True)]
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0])
    groups = rows[0].heads or 1
    grouped = [array.reshape(groups, -1, *array.shape[1:]) for array in arrays]
    stacked = np.stack(grouped, axis=1)
    return stacked.reshape(-1, *arrays[0].shape[1:])


class Theirs(NamedTuple):
    """A tensor of theirs: its shape, and which layer of which rows of ours it holds."""

    shape: tuple[int, ...]
    parts: list[tuple[Row, int | None]]


def theirs_of(rows: Iterable[Row], leaves: Mapping[str, Any]) -> dict[str, Theirs]:
    """Their tensors by name, in the order of the table."""
    found: dict[str, Theirs] = {}
    for row in rows:
        if row.ours not in leaves:
            continue
        shape, stacked = leaves[row.ours].shape, "{}" in row.theirs
        one = jax.ShapeDtypeStruct(shape[1:] if stacked else shape, np.float32)
        out = jax.eval_shape(LAYOUTS[row.layout].theirs, one).shape
        out = (out[0] * row.part[1], *out[1:]) if row.part[1] > 1 else out
        for layer, name in enumerate(row.names(layers_of(row.ours, shape))):
            entry = found.setdefault(name, Theirs(out, []))
            entry.parts.append((row, layer if stacked else None))
    for entry in found.values():
        entry.parts.sort(key=lambda part: part[0].part)
    return found


def gather(
    rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our leaves from their tensors, all in memory (for whole files see `weights.folder`).

    Args:
      rows: the table.
      shapes: of our leaves, the layers' axis included; rows of other leaves are passed over.
      tensors: theirs by name.

    Raises:
      DataError: a tensor is missing or of another size.
    """
    found = {}
    for row in rows:
        if row.ours not in shapes:
            continue
        shape, stacked = shapes[row.ours], "{}" in row.theirs
        names = row.names(layers_of(row.ours, shape))
        missing = [name for name in names if name not in tensors]
        if missing:
            raise DataError(f"tensor {missing[0]} is missing; the model's {row.ours} needs it")
        one = shape[1:] if stacked else shape
        layers = [to_ours(row, np.asarray(tensors[name]), one) for name in names]
        found[row.ours] = np.stack(layers) if stacked else layers[0]
    return found


def scatter(rows: Iterable[Row], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors from our leaves: the inverse of `gather`, bit for bit."""
    pieces: dict[str, list[tuple[Row, np.ndarray]]] = {}
    for row in rows:
        if row.ours not in leaves:
            continue
        leaf = np.asarray(leaves[row.ours])
        stacked = "{}" in row.theirs
        for i, name in enumerate(row.names(len(leaf) if stacked else 1)):
            pieces.setdefault(name, []).append((row, leaf[i] if stacked else leaf))
    found = {}
    for name, entries in pieces.items():
        entries.sort(key=lambda entry: entry[0].part)
        table_rows, arrays = zip(*entries, strict=True)
        found[name] = to_theirs(list(table_rows), list(arrays))
    return found


def uncovered(
    rows: Iterable[Row],
    shapes: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    carried: Iterable[str] = (),
) -> tuple[list[str], list[str]]:
    """Our leaves without a row, and their tensors that neither a row nor `carried` speaks of."""
    rows = [row for row in rows if row.ours in shapes]
    covered = {n for row in rows for n in row.names(layers_of(row.ours, shapes[row.ours]))}
    left = [
        name
        for name in names
        if name not in covered and not any(re.fullmatch(pattern, name) for pattern in carried)
    ]
    return sorted(shapes.keys() - {row.ours for row in rows}), sorted(left)
