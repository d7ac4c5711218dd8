"""Meshes: the config's axes fill the devices, or the refusal says why not."""

import jax
import pytest

from vlm_jax.config import Parallel
from vlm_jax.errors import ConfigError
from vlm_jax.parallel import mesh

DEVICES = 8


@pytest.fixture
def devices():
    if len(jax.devices()) < DEVICES:
        pytest.skip("needs 8 simulated devices")
    return jax.devices()[:DEVICES]


@pytest.mark.parametrize(
    ("parallel", "shape"),
    [
        (Parallel(), (8, 1, 1)),
        (Parallel(data=1, fsdp=-1), (1, 8, 1)),
        (Parallel(data=-1, tensor=2), (4, 1, 2)),
        (Parallel(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(devices, parallel, shape):
    made = mesh.make(parallel, devices)
    assert tuple(made.shape.values()) == shape
    assert made.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(data=-1, tensor=3),
        Parallel(data=4),
        Parallel(data=16),
        Parallel(data=-1, fsdp=-1),
        Parallel(data=0),
        Parallel(data=-2),
    ],
)
def test_axes_that_do_not_fill_the_devices_are_refused(devices, parallel):
    with pytest.raises(ConfigError, match=r"config\.parallel is data="):
        mesh.make(parallel, devices)


def test_the_refusal_names_both_counts(devices):
    with pytest.raises(ConfigError, match="takes 4 devices, but there are 8"):
        mesh.make(Parallel(data=4), devices)
