"""Contrastive losses over a mesh beside the same on one device, and beside open_clip's."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.config import Parallel
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import objectives, pairs

WHOLE = {"sigmoid": objectives.sigmoid_pairs, "softmax": objectives.softmax_pairs}
MESHES = {1: Parallel(data=1), 4: Parallel(data=2, fsdp=2), 8: Parallel(data=2, fsdp=2, tensor=2)}
COUNT = 24


def drawn(seed: int = 0):
    rng = np.random.default_rng(seed)
    images, texts = rng.normal(size=(2, COUNT, 7)).astype(np.float32)
    images += texts  # some belong together
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return unit(images), unit(texts), np.float32(11.3), np.float32(-4.1)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("missing", [0, 5])
def test_value_and_gradients_are_those_of_one_device(kind, devices, missing):
    images, texts, scale, bias = drawn(devices)
    there = np.ones(COUNT, bool)
    there[np.random.default_rng(1).permutation(COUNT)[:missing]] = False

    def whole(images, texts, scale, bias):
        kept = np.flatnonzero(there)
        return WHOLE[kind](scale * images[kept] @ texts[kept].T + bias)

    wanted = jax.value_and_grad(whole, argnums=(0, 1, 2, 3))(images, texts, scale, bias)
    mesh = meshes.make(MESHES[devices], jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec(pairs.AXES))
    with jax.set_mesh(mesh):
        images, texts, there_ = (jax.device_put(x, rows) for x in (images, texts, there))
        loss = lambda i, t, s, b: pairs.spread(pairs.LOSSES[kind])(i, t, there_, s, b)  # noqa: E731
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(images, texts, scale, bias)
    # Sums of 24 terms in another order, in float32.
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_no_device_holds_the_whole_matrix():
    mesh = meshes.make(MESHES[4], jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(pairs.AXES))
    count = 512
    shapes = [
        jax.ShapeDtypeStruct((count, 8), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((count, 8), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((count,), bool, sharding=rows),
        *[jax.ShapeDtypeStruct((), jnp.float32)] * 2,
    ]
    for kind in pairs.LOSSES:
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(pairs.spread(pairs.LOSSES[kind]), argnums=(0, 1)))
            memory = step.lower(*shapes).compile().memory_analysis()
        # A device's row of blocks would be 128 x 512, the whole matrix 512 x 512.
        assert memory.temp_size_in_bytes < 6 * 4 * 128 * 128 < 4 * count * count / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_they_are_open_clips(kind):
    import torch

    package = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    # The package asks for torchvision as a whole; its losses do not.
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package, "loss.py"))
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    module = {"sigmoid": theirs.SigLipLoss, "softmax": theirs.ClipLoss}[kind]()
    given = [torch.tensor(x, requires_grad=True) for x in drawn(3)]
    wanted = module(*given)
    wanted.backward()
    mesh = meshes.make(MESHES[8], jax.devices())
    with jax.set_mesh(mesh):
        loss = lambda i, t, s, b: pairs.spread(pairs.LOSSES[kind])(i, t, np.ones(COUNT, bool), s, b)  # noqa: E731
        found, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*drawn(3))
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-5)
    for ours, leaf in zip(gradients, given, strict=False):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=1e-6)
