"""Kernels held in few bits: what stands in a frozen kernel's place (QLoRA, Dettmers et al. 2023).

Beside ".../query/" stand `kernel_codes` and `kernel_scales` instead of `kernel`, so that a flat
dict says by itself which layers are held so. A layer's kernel is cut into blocks of 64 numbers in
the order of PyTorch's weights, all inputs of the first output first, as bitsandbytes does; the last
block is filled up with zeros. A block has a scale in float32, for "nf4" its largest absolute value.
Codes are those of Qwix: of "nf4" a number of 0 to 15 which names a level, two in a byte, the first
in its upper half; of "int8" the rounded number. So a weight takes 4.5 or 8.5 bits.

Floats are made where a layer computes, and made again for its backward pass, so that no more than
one layer's kernel is there as floats at any time. D and F are what goes into the layer and comes
out, heads and all.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.parallel.sharding import constrain

KERNEL, CODES, SCALES = "kernel", "kernel_codes", "kernel_scales"
LEAVES = (CODES, SCALES)
BLOCK = 64  # bitsandbytes' default, and the paper's


class Kind(NamedTuple):
    """A way of holding a kernel.

    Attributes:
      qtype: Qwix's name of the numbers.
      stored: dtype of a leaf of codes; no two kinds share one.
      per_byte: codes in a byte.
    """

    qtype: Any
    stored: Any
    per_byte: int


KINDS = {"nf4": Kind("nf4", jnp.uint8, 2), "int8": Kind(jnp.int8, jnp.int8, 1)}


def is_leaf(path: str) -> bool:
    """Whether the parameter at `path` is part of a kernel held in few bits."""
    return path.rpartition("/")[2] in LEAVES


def beside(kernel: str, leaf: str) -> str:
    """Path of a leaf in place of the kernel at a path."""
    return f"{kernel.removesuffix(KERNEL)}{leaf}"


def kernels(flat: Iterable[str]) -> list[str]:
    """Paths of the kernels that are held in few bits."""
    return [path.removesuffix(CODES) + KERNEL for path in flat if path.endswith(f"/{CODES}")]


def shapes(
    kind: str, kernel: jax.ShapeDtypeStruct, stacked: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that stand for a kernel, by name.

    Args:
      kind: a key of KINDS.
      kernel: of the layer, with the layers' axis where it is stacked.
      stacked: whether its first axis is that of layers.
    """
    lead = kernel.shape[:stacked]
    blocks = math.ceil(math.prod(kernel.shape[stacked:]) / BLOCK)
    _, stored, per_byte = KINDS[kind]
    return {
        CODES: jax.ShapeDtypeStruct((*lead, blocks, BLOCK // per_byte), stored),
        SCALES: jax.ShapeDtypeStruct((*lead, blocks), jnp.float32),
    }


def hold(kind: str, kernel: Float[Array, "..."], axes: int, stacked: bool) -> dict[str, Array]:
    """A kernel's codes and scales.

    Args:
      kind: a key of KINDS.
      kernel: as in `shapes`.
      axes: how many of the kernel's axes go in.
      stacked: as in `shapes`.
    """
    one = functools.partial(_hold, kind, axes=axes)
    # One layer after the other: to find the nearest level, Qwix compares with all sixteen.
    codes, scales = jax.lax.map(one, kernel) if stacked else one(kernel)
    return {CODES: codes, SCALES: scales}


def _hold(kind: str, kernel: Float[Array, "..."], axes: int):
    qtype, stored, per_byte = KINDS[kind]
    flat = _matrix(kernel.astype(jnp.float32), axes).T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    held = _qwix().quantize(blocks, qtype, channelwise_axes=(0,))
    codes = held.qvalue
    if per_byte == 2:
        codes = codes.astype(stored)
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
    return codes, held.scale[:, 0]


def _matrix(kernel: Array, axes: int) -> Float[Array, "D F"]:
    return kernel.reshape(math.prod(kernel.shape[:axes]), -1)


def floats(
    codes: Int[Array, "n w"], scales: Float[Array, " n"], shape: tuple[int, ...], axes: int
) -> Float[Array, "..."]:
    """The kernel of one layer in float32.

    Args:
      codes, scales: its leaves.
      shape: the kernel's.
      axes: how many of the kernel's axes go in.
    """
    qtype, _, per_byte = next(kind for kind in KINDS.values() if kind.stored == codes.dtype)
    if per_byte == 2:
        codes = jnp.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1).astype(jnp.uint4)
    qwix = _qwix()
    blocks = qwix.dequantize(qwix.QArray(codes, scales[:, None], None, qtype))
    inputs, outputs = math.prod(shape[:axes]), math.prod(shape[axes:])
    return blocks.reshape(-1)[: inputs * outputs].reshape(outputs, inputs).T.reshape(shape)


def restored(
    flat: Mapping[str, Array], shapes: Mapping[str, Any], axes: Mapping[str, int]
) -> dict[str, Array]:
    """The parameters with all kernels in float32.

    Args:
      flat: by path.
      shapes: of all kernels by path, or what has a `shape`.
      axes: how many of each kernel's axes go in.
    """
    found = {path: leaf for path, leaf in flat.items() if not is_leaf(path)}
    for path in kernels(flat):
        codes, scales = (jnp.asarray(flat[beside(path, name)]) for name in LEAVES)
        stacked = codes.ndim > 2
        shape = shapes[path].shape[stacked:]
        make = functools.partial(floats, shape=shape, axes=axes[path])
        found[path] = jax.vmap(make)(codes, scales) if stacked else make(codes, scales)
    return found


class Quantised(nnx.Module):
    """A linear layer's kernel in few bits, or those of a stack.

    Args:
      codes, scales: as `shapes` says.
      shape: of the kernel, without the layers' axis.
      axes: how many of its axes go in.
    """

    def __init__(self, codes: Array, scales: Array, shape: tuple[int, ...], axes: int):
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)
        self.shape, self.axes = shape, axes

    @property
    def size(self) -> int:
        """Numbers of the kernel, or of those of a stack."""
        return math.prod((*self.codes.shape[:-2], *self.shape))

    def __getitem__(self, _) -> Float[Array, "..."]:
        """The kernel of this layer in float32, as that of a parameter."""
        return floats(self.codes[...], self.scales[...], self.shape, self.axes)

    def product(self, x: Float[Array, "n D"], dtype=None) -> Float[Array, "n F"]:
        """What the layer makes of x without its bias."""
        # Gathered as codes, where they are spread over devices.
        codes = constrain(self.codes[...], None, None)
        scales = constrain(self.scales[...], None)
        return _product((self.shape, self.axes, x.dtype, dtype), x, codes, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: tuple, x: Float[Array, "n D"], codes, scales) -> Float[Array, "n F"]:
    return _times(static, codes, scales)(x)


def _times(static: tuple, codes, scales):
    """The linear map of x."""
    shape, axes, computed, dtype = static
    matrix = _matrix(floats(codes, scales, shape, axes), axes).astype(computed)
    return lambda x: jnp.matmul(x, matrix, preferred_element_type=dtype)


def _forward(static: tuple, x, codes, scales):
    # Nothing of the kernel's size is kept: a scan would keep it of every layer.
    return _times(static, codes, scales)(x), (codes, scales)


def _backward(static: tuple, kept, gradient):
    shape, axes, computed, _ = static
    x = jax.ShapeDtypeStruct((len(gradient), math.prod(shape[:axes])), computed)
    return *jax.linear_transpose(_times(static, *kept), x)(gradient), None, None


_product.defvjp(_forward, _backward)


def _qwix():
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            "kernels in nf4 or int8 need the package qwix: pip install 'vlm_jax[quantised]'"
        ) from error
    return qwix
