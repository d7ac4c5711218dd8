"""Batches onto the devices of the current mesh (`jax.set_mesh`), and results back to every host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array

from vlm_jax.parallel import sharding


def place(batch: Any) -> Any:
    """A host batch, the same on every process, its rows spread over the mesh if there is one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return batch

    def put(x: np.ndarray) -> Array:
        logical = ("batch", *(None,) * (x.ndim - 1))
        return jax.device_put(x, NamedSharding(mesh, sharding.spec(mesh, x.shape, logical)))

    return jax.tree.map(put, batch)


def fetch(x: Array) -> np.ndarray:
    """The whole array on this host."""
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
