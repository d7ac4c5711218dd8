"""The device mesh: three named axes, one code path from one device to many."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from vlm_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make(parallel, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them) with the axes data, fsdp and tensor.

    Axes are `Auto`: shardings are stated for parameters, batches and some activations, and the
    compiler propagates the rest.

    Args:
      parallel: a `config.Parallel`; only its three sizes are read.
      devices: what to build the mesh from.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(parallel, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _sizes(parallel, count: int) -> tuple[int, ...]:
    """Devices per axis, with -1 filled in."""
    sizes = tuple(getattr(parallel, axis) for axis in AXES)
    stated = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(
            f"config.parallel is {stated}; expected sizes of at least 1 and at most one -1, which "
            "means all that are left"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        raise ConfigError(
            f"config.parallel is {stated}, which takes {'a multiple of ' * (-1 in sizes)}{fixed} "
            f"devices, but there are {count}; change config.parallel or run on another number"
        )
    return tuple(count // fixed if size == -1 else size for size in sizes)
