"""Adapters: what stands beside the kernel of a linear layer and trains in its place.

Beside ".../query/kernel" stand the leaves ".../query/lora_a" and so on, so that a flat dict of
parameters says by itself which layers are adapted. With LoRA and DoRA the product with A and B is
added to the layer's own (Hu et al. 2022), never to its kernel: then the input can be dropped from,
and no gradient as large as the kernel is ever made. A bottleneck (Houlsby et al. 2019) follows the
layer: two matrices with an activation between them, and a residual around them. A prefix (Li and
Liang 2021) stands beside the kernel of an attention's keys, see `prefixes`. Below a stack all
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
from vlm_jax.models import prefixes, quantised
from vlm_jax.models.layers import ACTIVATIONS, Attention, Linear, drop, product
from vlm_jax.models.quantised import KERNEL, beside

A, B, SCALE, MAGNITUDE = "lora_a", "lora_b", "lora_scale", "magnitude"
LORA = (A, B, SCALE, MAGNITUDE)
DOWN, DOWN_BIAS, UP, UP_BIAS = (f"bottleneck_{x}" for x in ("down", "down_bias", "up", "up_bias"))
BOTTLENECK = (DOWN, DOWN_BIAS, UP, UP_BIAS)
BIASES = (DOWN_BIAS, UP_BIAS, *prefixes.BIASES)
PREFIX = (prefixes.KEYS, prefixes.EMBEDDING)  # one of them, if there is a prefix
LEAVES = LORA + BOTTLENECK + prefixes.LEAVES
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
      prefix: whether it is R keys and values before those of an attention, whose kernel of keys
        this is.
      hidden: width of the network that makes a prefix; 0 = its keys and values are the leaves.
    """

    rank: int
    scale: float
    magnitude: bool = False
    bottleneck: bool = False
    prefix: bool = False
    hidden: int = 0


def is_leaf(path: str) -> bool:
    """Whether the parameter at `path` is an adapter's."""
    return path.rpartition("/")[2] in LEAVES


def kernels(flat: Iterable[str], leaf: str = A) -> list[str]:
    """Paths of the kernels that have a leaf beside them: with `DOWN` a bottleneck and so on."""
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
    rest = kernel.shape[stacked:]
    fan_in, fan_out = math.prod(rest[:axes]), math.prod(rest[axes:])
    if spec.prefix:
        found = prefixes.shapes(spec.rank, spec.hidden, rest[axes:])
    elif spec.bottleneck:
        matrices = (fan_out, spec.rank), (spec.rank,), (spec.rank, fan_out), (fan_out,)
        found = dict(zip(BOTTLENECK, matrices, strict=True))
    else:
        found = {A: (fan_in, spec.rank), B: (spec.rank, fan_out), SCALE: ()}
        found |= {MAGNITUDE: (fan_out,)} if spec.magnitude else {}
    lead = {name: () if name in prefixes.SHARED else kernel.shape[:stacked] for name in found}
    return {
        name: jax.ShapeDtypeStruct((*lead[name], *shape), jnp.float32)
        for name, shape in found.items()
    }


def init(
    spec: Spec, leaves: Mapping[str, jax.ShapeDtypeStruct], kernel: Float[Array, "..."], key: Array
) -> dict[str, Array]:
    """An adapter that changes nothing yet, or next to nothing, drawn as its authors do.

    As in `peft`, A is uniform within one over the root of D (torch's Kaiming with a = sqrt 5), B is
    0, and the magnitudes are the lengths of the kernel's columns. Prefixes are drawn as there, from
    a normal distribution of deviation 1, which does change what the model says; the network that
    makes them as torch draws linear layers.
    """
    if spec.prefix:
        return prefixes.drawn(leaves, key)
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


def keys_values(flat: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Keys and values of each prefix, by path of the kernel that it stands beside."""
    found = {}
    for path in (path for first in PREFIX for path in kernels(flat, first)):
        own = {name: flat[p] for name in prefixes.LEAVES if (p := beside(path, name)) in flat}
        found[path] = prefixes.keys_values(own)
    return found


def keyed(key: Array, path: str) -> Array:
    """A key of its own for every path, whatever others there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def merged(flat: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters without adapters: each kernel does what both did, in the kernel's dtype.

    Raises:
      ConfigError: there is a bottleneck or a prefix, which no kernel can do the work of.
    """
    for leaf, kind in (DOWN, "a bottleneck"), *((name, "a prefix") for name in PREFIX):
        if kernels(flat, leaf):
            raise ConfigError(
                f"{kernels(flat, leaf)[0]} has {kind} adapter, which cannot be merged into it: "
                "expected LoRA or DoRA, to be exported"
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
        self, x: Float[Array, "n D"], kernel, y: Float[Array, "n F"]
    ) -> Float[Array, "n F"]:
        """What the adapted layer makes of x, given what its kernel alone makes of it, `y`.

        The kernel is what `layers.product` takes.
        """
        dropped = x if self.key is None else drop(x, self.rate, self.key[...])
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        inner = jnp.matmul(jnp.matmul(dropped, a), b, preferred_element_type=y.dtype)
        added = self.scale[...].astype(y.dtype) * inner
        if self.magnitude is None:
            return y + added
        # The layer's own part reads what was dropped from as well; `y` itself stays (peft).
        own = y if self.key is None else product(dropped, kernel).astype(y.dtype)
        lengths = self._lengths(kernel[...].reshape(x.shape[-1], -1))
        factor = (self.magnitude[...] / lengths).astype(y.dtype)
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
      ValueError: there is no linear layer or attention at a path, or its kernel has another size.
    """
    for path in kernels(flat):
        leaves = {name: flat[p] for name in LORA if (p := beside(path, name)) in flat}
        layer = _layer(module, path)
        (*lead, fan_in, _), fan_out = leaves[A].shape, leaves[B].shape[-1]
        if layer.kernel.size != math.prod(lead) * fan_in * fan_out:
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
    for path, own in keys_values(flat).items():
        attention = _module(module, path.split("/")[:-2])
        if not isinstance(attention, Attention):
            raise ValueError(f"there is no attention around {path}, which a prefix is for")
        attention.prefix = nnx.data(prefixes.Prefix(*own))


def attach_quantised(
    module: nnx.Module, flat: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Puts kernels that are held in few bits into the layers of a module.

    Args:
      module: has the layers at their paths.
      flat: leaves by path; others than those of such kernels are passed over.
      shapes: of the kernels, by path.
    """
    for path in quantised.kernels(flat):
        codes, scales = (flat[beside(path, name)] for name in quantised.LEAVES)
        layer, lead = _layer(module, path), codes.ndim - 2
        layer.kernel = quantised.Quantised(codes, scales, shapes[path][lead:], layer.axes)


def _layer(module: nnx.Module, kernel: str) -> Linear:
    found = _module(module, kernel.split("/")[:-1])
    if not isinstance(found, Linear):
        raise ValueError(f"there is no linear layer at {kernel}, which an adapter is for")
    return found


def _module(module: nnx.Module, names: list[str]) -> nnx.Module | None:
    for name in names:
        module = module[int(name)] if name.isdigit() else getattr(module, name, None)
    return module
