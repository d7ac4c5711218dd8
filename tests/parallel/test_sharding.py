"""The translator from logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.config import Parallel
from vlm_jax.parallel import mesh as meshes
from vlm_jax.parallel import sharding


@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 simulated devices")
    return meshes.make(Parallel(data=2, fsdp=2, tensor=2), jax.devices()[:8])


@pytest.mark.parametrize(
    ("shape", "logical", "expected"),
    [
        ((12, 8), ("embed", "mlp"), P(("fsdp",), ("tensor",))),
        ((3, 12, 8), ("layers", "embed", "mlp"), P(None, ("fsdp",), ("tensor",))),
        ((7, 8), ("embed", "mlp"), P(None, ("tensor",))),
        ((8, 5), ("batch", None), P(("data", "fsdp"), None)),
        ((2, 5), ("batch", None), P(("data",), None)),
        ((3, 5), ("batch", None), P(None, None)),
        ((), (), P()),
    ],
)
def test_axes_follow_the_table_where_they_divide(mesh, shape, logical, expected):
    assert sharding.spec(mesh, shape, logical) == expected


@pytest.mark.parametrize("logical", [("heads", "mlp"), ("embed", "batch")])
def test_one_mesh_axis_is_never_used_twice(mesh, logical):
    with pytest.raises(ValueError, match="twice"):
        sharding.spec(mesh, (8, 8), logical)


def test_unknown_names_and_wrong_ranks_are_refused(mesh):
    with pytest.raises(ValueError, match=r"unknown logical axes \['mpl'\]"):
        sharding.spec(mesh, (8,), ("mpl",))
    with pytest.raises(ValueError, match="do not fit an array of shape"):
        sharding.spec(mesh, (8, 8), ("mlp",))


def test_parameters_are_spread_as_their_axes_say(mesh):
    flat = {"a/kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    (placed,) = sharding.named(mesh, flat, lambda path: ("embed", "mlp")).values()
    assert placed.shard_shape((4, 6)) == (2, 3)
    assert sharding.batch(mesh).shard_shape((8, 5)) == (2, 5)


def test_constrain_changes_the_layout_and_never_the_values(mesh):
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    outside = sharding.constrain(x, "batch", "mlp")
    assert outside is x
    with jax.set_mesh(mesh):
        inside = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(x)
    assert inside.sharding.shard_shape(inside.shape) == (2, 2)
    np.testing.assert_array_equal(inside, x)
