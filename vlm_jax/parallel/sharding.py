"""Which logical axis of an array lies on which axes of the mesh: one table, one translator."""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Logical axis -> mesh axes. Rows lie over `data` and `fsdp`. Parameters are spread over `fsdp` by
# the model's width and gathered layer by layer; heads, feed-forward width and vocabulary are split
# over `tensor` as in Megatron-LM (Shoeybi et al. 2019). Layers are scanned, so never split.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "quantised": ("fsdp", "tensor"),  # blocks of a kernel in few bits
    "layers": (),
}


def spec(
    mesh: Mesh | AbstractMesh, shape: tuple[int, ...], logical: tuple[str | None, ...]
) -> PartitionSpec:
    """Where an array of `shape` lies, given the logical name of each of its axes (None = whole).

    Mesh axes that do not divide a dimension are dropped, the last first: that dimension is then
    split less, or not at all.

    Raises:
      ValueError: the axes do not fit the shape, a name is not in RULES, or two of them would lie on
        one mesh axis.
    """
    if len(logical) != len(shape):
        raise ValueError(f"logical axes {logical} do not fit an array of shape {shape}")
    unknown = [name for name in logical if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}: expected some of {', '.join(RULES)}")
    wanted = [RULES[name] if name else () for name in logical]
    used = [axis for axes in wanted for axis in axes]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
        raise ValueError(f"logical axes {logical} use the mesh axes {sorted(twice)} twice")
    return PartitionSpec(
        *(_divisors(mesh, size, axes) for size, axes in zip(shape, wanted, strict=True))
    )


def _divisors(
    mesh: Mesh | AbstractMesh, size: int, axes: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The longest head of `axes` whose sizes together divide `size`."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


def named(
    mesh: Mesh,
    flat: Mapping[str, jax.ShapeDtypeStruct],
    axes: Callable[[str], tuple[str | None, ...]],
) -> dict[str, NamedSharding]:
    """Shardings of parameters by path; `axes` names the logical axes of a path."""
    return {
        path: NamedSharding(mesh, spec(mesh, leaf.shape, axes(path))) for path, leaf in flat.items()
    }


def batch(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, *logical: str | None) -> Array:
    """`x`, laid out by its logical axes on the mesh of `jax.set_mesh`; the identity without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, logical))
