"""Contrastive losses over a mesh beside the same on one device, and beside open_clip's; and what
goes round with them for BLIP-2: the nearest of several embeddings, and hard negatives."""

import functools
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


def queries(seed: int = 0):
    """Images of five embeddings each, texts, a scale."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(COUNT, 5, 7)).astype(np.float32)
    texts = rng.normal(size=(COUNT, 7)).astype(np.float32)
    images[:, 2] += texts
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return unit(images), unit(texts), np.float32(5.7)


def missing(count: int):
    there = np.ones(COUNT, bool)
    there[np.random.default_rng(1).permutation(COUNT)[:count]] = False
    return there


def on_mesh(devices: int, run):
    mesh = meshes.make(MESHES[devices], jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec(pairs.AXES))
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, run(lambda x: jax.device_put(x, rows)))


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("absent", [0, 5])
def test_the_nearest_embedding_and_smoothing_are_those_of_one_device(devices, absent):
    images, texts, scale = queries(devices)
    there, smoothing = missing(absent), 0.1

    def whole(images, texts, scale):
        kept = np.flatnonzero(there)
        logits = scale * jnp.einsum("iqe,je->ijq", images[kept], texts[kept]).max(axis=-1)
        target = (1 - smoothing) * jnp.eye(len(kept)) + smoothing / len(kept)
        log_probs = [jax.nn.log_softmax(x, axis=1) for x in (logits, logits.T)]
        return -sum(jnp.sum(target * x, axis=1).mean() for x in log_probs) / 2

    wanted = jax.value_and_grad(whole, argnums=(0, 1, 2))(images, texts, scale)
    part = functools.partial(pairs.softmax, similar=pairs.nearest, smoothing=smoothing)

    def run(place):
        given = [place(x) for x in (images, texts, there)]
        loss = lambda i, t, s: pairs.spread(part)(i, t, given[2], s, jnp.zeros(()))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given[:2], scale)

    found = on_mesh(devices, run)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def drawn_negatives(devices: int, there, keys):
    images, texts, scale = queries()
    out = PartitionSpec(pairs.AXES)

    def one(images, texts, there, scale, key):
        return pairs.negatives(images, texts, there, scale, key)

    def run(place):
        given = [place(x) for x in (images, texts, there)]
        draw = pairs.spread(one, scalars=2, out=(out, out))
        return jax.jit(jax.vmap(lambda key: draw(*given, scale, key)))(keys)

    return on_mesh(devices, run)


def test_hard_negatives_do_not_depend_on_the_mesh_and_are_never_ones_own_or_absent():
    there, keys = missing(5), jax.random.split(jax.random.key(0), 64)
    one = drawn_negatives(1, there, keys)
    for devices in (4, 8):
        for ours, theirs in zip(drawn_negatives(devices, there, keys), one, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for found in one:
        assert (found != np.arange(COUNT)).all() and there[found].all()


def test_hard_negatives_are_drawn_by_the_softmax_of_similarities():
    images, texts, scale = queries()
    keys = jax.random.split(jax.random.key(1), 4000)
    by_text, by_image = drawn_negatives(1, np.ones(COUNT, bool), keys)
    logits = scale * np.einsum("iqe,je->ijq", images, texts).max(-1)
    for found, sides in ((by_image, logits), (by_text, logits.T)):
        shares = np.exp(sides) / np.exp(sides).sum(1, keepdims=True) + pairs.FLOOR
        np.fill_diagonal(shares, 0)
        shares /= shares.sum(1, keepdims=True)
        counts = np.stack([np.bincount(f, minlength=COUNT) for f in found.T]) / len(keys)
        # Five standard deviations of a share of 4000 draws, at most, over 576 of them.
        assert (np.abs(counts - shares) <= 5 * np.sqrt(shares * (1 - shares) / len(keys))).all()


def test_one_pair_alone_has_no_negative():
    there = np.arange(COUNT) == 3
    keys = jax.random.split(jax.random.key(0), 2)
    for found in drawn_negatives(4, there, keys):
        assert (found[:, 3] == -1).all()


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_rows_of_other_devices_are_taken_with_their_gradient(devices):
    rng = np.random.default_rng(2)
    x, pull = rng.normal(size=(2, COUNT, 3, 2)).astype(np.float32)
    index = rng.integers(-1, COUNT, COUNT)
    take = pairs.spread(pairs.taken, scalars=0, rows=2, out=PartitionSpec(pairs.AXES))

    def run(place):
        given, where = place(x), place(index)
        loss = lambda x: (take(x, where) * pull).sum()  # noqa: E731
        return take(given, where), jax.jit(jax.grad(loss))(given)

    found, gradient = on_mesh(devices, run)
    np.testing.assert_array_equal(found, np.where(index[:, None, None] < 0, 0, x[index]))
    wanted = np.zeros_like(x)
    np.add.at(wanted, index[index >= 0], pull[index >= 0])
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


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
