"""Adapters: what stands beside the kernel of a linear layer and trains in its place.

Beside ".../query/kernel" stand the leaves ".../query/lora_a" and so on, so that a flat dict of
parameters says by itself which layers are adapted. With LoRA and DoRA the product with A and B is
added to the layer's own (Hu et al. 2022), never to its kernel: then the input can be dropped from,
and no gradient as large as the kernel is ever made. A bottleneck (Houlsby et al. 2019) follows the
layer: two matrices with an activation between them, and a residual around them. Below a stack all
leaves have the layers as first axis. D and F are what goes into the layer and comes out, heads and
all; R is the rank.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.models.layers import ACTIVATIONS, Linear, drop

KERNEL = "kernel"
A, B, SCALE, MAGNITUDE = "lora_a", "lora_b", "lora_scale", "magnitude"
LORA = (A, B, SCALE, MAGNITUDE)
DOWN, DOWN_BIAS, UP, UP_BIAS = (f"bottleneck_{x}" for x in ("down", "down_bias", "up", "up_bias"))
BOTTLENECK = (DOWN, DOWN_BIAS, UP, UP_BIAS)
LEAVES = LORA + BOTTLENECK
NEAR_ZERO = (
    1e-3  # deviation that Houlsby's matrices start from, so that they change next to nothing
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """An adapter of one kernel.

    Attributes:
      rank: R.
      scale: factor of the product with A and B.
      magnitude: whether columns are rescaled to a learned length (DoRA).
      bottleneck: whether it follows the layer instead, R wide.
    """

    rank: int
    scale: float
    magnitude: bool = False
    bottleneck: bool = False


def beside(kernel: str, leaf: str) -> str:
    """Path of a leaf beside the kernel at a path."""
    return f"{kernel.removesuffix(KERNEL)}{leaf}"


def is_leaf(path: str) -> bool:
    """Whether the parameter at `path` is an adapter's."""
    return path.rpartition("/")[2] in LEAVES


def kernels(flat: Iterable[str], leaf: str = A) -> list[str]:
    """Paths of the kernels that have LoRA or DoRA, or with `leaf=DOWN` a bottleneck."""
    return [path.removesuffix(leaf) + KERNEL for path in flat if path.endswith(f"/{leaf}")]


def shapes(
    spec: Spec, kernel: jax.ShapeDtypeStruct, axes: int, stacked: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of an adapter by name.

    Args:
      spec: the adapter.
      kernel: of the layer, with the layers' axis where it is stacked.
      axes: how many of the kernel's axes go in.
      stacked: whether its first axis is that of layers.
    """
    lead, rest = kernel.shape[:stacked], kernel.shape[stacked:]
    fan_in, fan_out = math.prod(rest[:axes]), math.prod(rest[axes:])
    if spec.bottleneck:
        matrices = (fan_out, spec.rank), (spec.rank,), (spec.rank, fan_out), (fan_out,)
        found = dict(zip(BOTTLENECK, matrices, strict=True))
    else:
        found = {A: (fan_in, spec.rank), B: (spec.rank, fan_out), SCALE: ()}
        found |= {MAGNITUDE: (fan_out,)} if spec.magnitude else {}
    return {
        name: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32) for name, shape in found.items()
    }


def init(
    spec: Spec, leaves: Mapping[str, jax.ShapeDtypeStruct], kernel: Float[Array, "..."], key: Array
) -> dict[str, Array]:
    """An adapter that changes nothing yet, or next to nothing, drawn as its authors do.

    As in `peft`, A is uniform within one over the root of D (torch's Kaiming with a = sqrt 5), B is
    0, and the magnitudes are the lengths of the kernel's columns.
    """
    if spec.bottleneck:
        keys = jax.random.split(key)
        found = {name: jnp.zeros(leaf.shape) for name, leaf in leaves.items()}
        for name, own in zip((DOWN, UP), keys):
            noise = jax.random.truncated_normal(own, -2, 2, leaves[name].shape)
            found[name] = NEAR_ZERO * noise
        return found
    bound = 1 / math.sqrt(leaves[A].shape[-2])
    found = {
        A: jax.random.uniform(key, leaves[A].shape, minval=-bound, maxval=bound),
        B: jnp.zeros(leaves[B].shape),
        SCALE: jnp.full(leaves[SCALE].shape, spec.scale),
    }
    if spec.magnitude:
        found[MAGNITUDE] = _lengths(_matrix(kernel, leaves[A].shape))
    return found


def keyed(key: Array, path: str) -> Array:
    """A key of its own for every path, whatever others there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def merged(flat: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters without adapters: each kernel does what both did, in the kernel's dtype.

    Raises:
      ConfigError: there is a bottleneck, which no kernel can do the work of.
    """
    if kernels(flat, DOWN):
        raise ConfigError(
            f"{kernels(flat, DOWN)[0]} is followed by a bottleneck adapter, which cannot be merged "
            "into it: expected LoRA or DoRA, to be exported"
        )
    found = {path: leaf for path, leaf in flat.items() if not is_leaf(path)}
    for path in kernels(flat):
        found[path] = _merged(flat[path], {name: flat.get(beside(path, name)) for name in LORA})
    return found


def _merged(kernel: Array, leaves: Mapping[str, Array | None]) -> Array:
    whole = _matrix(kernel, leaves[A].shape) + _update(leaves[A], leaves[B], leaves[SCALE])
    if leaves[MAGNITUDE] is not None:
        whole = whole * (leaves[MAGNITUDE] / _lengths(whole))[..., None, :]
    return whole.reshape(kernel.shape).astype(kernel.dtype)


def _matrix(kernel: Array, a: tuple[int, ...]) -> Float[Array, "... D F"]:
    """The kernel in float32 as a matrix, or one per layer, given the shape of its A."""
    return kernel.astype(jnp.float32).reshape(*a[:-1], -1)


def _update(a: Array, b: Array, scale: Array) -> Float[Array, "... D F"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.asarray(scale)[..., None, None] * jnp.matmul(a, b)


def _lengths(matrix: Float[Array, "... D F"]) -> Float[Array, "... F"]:
    """Of a matrix's columns: what all inputs give to one output."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-2))


class Lora(nnx.Module):
    """An adapter inside its layer.

    Args:
      leaves: by name, as `shapes` says.
      rate: of the dropout on what goes in.
      key: dropout's, one per layer of a stack; None = evaluation.
    """

    def __init__(self, leaves: Mapping[str, Array], rate: float = 0.0, key: Array | None = None):
        self.a, self.b, self.scale = (nnx.Param(leaves[name]) for name in (A, B, SCALE))
        self.magnitude = nnx.Param(leaves[MAGNITUDE]) if MAGNITUDE in leaves else None
        dropped = key is not None and rate > 0
        self.key = nnx.Variable(key) if dropped else None
        self.rate = rate

    def __call__(
        self, x: Float[Array, "n D"], kernel: Float[Array, "..."], y: Float[Array, "n F"]
    ) -> Float[Array, "n F"]:
        """What the adapted layer makes of x, given what its kernel alone makes of it, `y`."""
        dropped = x if self.key is None else drop(x, self.rate, self.key[...])
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        inner = jnp.matmul(jnp.matmul(dropped, a), b, preferred_element_type=y.dtype)
        added = self.scale[...].astype(y.dtype) * inner
        if self.magnitude is None:
            return y + added
        # The layer's own part reads what was dropped from as well; `y` itself stays (peft).
        matrix = kernel.reshape(x.shape[-1], -1)
        own = y if self.key is None else jnp.matmul(dropped, matrix.astype(x.dtype)).astype(y.dtype)
        factor = (self.magnitude[...] / self._lengths(matrix)).astype(y.dtype)
        return y + (factor - 1) * own + factor * added

    def _lengths(self, kernel: Float[Array, "D F"]) -> Float[Array, " F"]:
        """Of the adapted columns, as constants: DoRA's section 4.3 (Liu et al. 2024)."""
        leaves = (jax.lax.stop_gradient(leaf[...]) for leaf in (self.a, self.b, self.scale))
        return _lengths(jax.lax.stop_gradient(kernel).astype(jnp.float32) + _update(*leaves))


class Bottleneck(nnx.Module):
    """A bottleneck behind its layer, of the leaves by name."""

    def __init__(self, leaves: Mapping[str, Array]):
        self.down, self.down_bias, self.up, self.up_bias = (
            nnx.Param(leaves[name]) for name in BOTTLENECK
        )

    def __call__(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """What follows from the layer's whole result, whose last axes are F numbers."""
        down, down_bias, up, up_bias = (
            leaf[...].astype(y.dtype) for leaf in (self.down, self.down_bias, self.up, self.up_bias)
        )
        flat = y.reshape(-1, len(down))
        inner = ACTIVATIONS["gelu"](flat @ down + down_bias)
        return y + (inner @ up + up_bias).reshape(y.shape)


def attach(
    module: nnx.Module,
    flat: Mapping[str, Array],
    rates: Mapping[str, float] | None = None,
    key: Array | None = None,
) -> None:
    """Puts adapters into the layers of a module.

    A layer that is run twice in one step drops the same numbers both times.

    Args:
      module: has the layers at their paths.
      flat: leaves by path; others than adapters' are passed over.
      rates: of the dropout, by path of the kernel.
      key: dropout's; None = evaluation.

    Raises:
      ValueError: there is no linear layer at a path, or its kernel has another size.
    """
    for path in kernels(flat):
        leaves = {name: flat[p] for name in LORA if (p := beside(path, name)) in flat}
        layer = _layer(module, path)
        whole, (*lead, fan_in, _), fan_out = layer.kernel.size, leaves[A].shape, leaves[B].shape[-1]
        if whole != math.prod(lead) * fan_in * fan_out:
            raise ValueError(
                f"the adapter at {path} is of {fan_in} by {fan_out} numbers; the kernel has the "
                f"shape {layer.kernel.shape}"
            )
        own = None if key is None else keyed(key, path)
        if own is not None and lead:
            own = jax.random.split(own, lead[0])
        layer.adapter = nnx.data(Lora(leaves, (rates or {}).get(path, 0.0), own))
    for path in kernels(flat, DOWN):
        layer = _layer(module, path)
        layer.after = nnx.data(Bottleneck({name: flat[beside(path, name)] for name in BOTTLENECK}))


def _layer(module: nnx.Module, kernel: str) -> Linear:
    for name in kernel.split("/")[:-1]:
        module = module[int(name)] if name.isdigit() else getattr(module, name, None)
    if not isinstance(module, Linear):
        raise ValueError(f"there is no linear layer at {kernel}, which an adapter is for")
    return module
