"""Kernels in few bits: NF4 and int8 as others write them down, and layers over them."""

import functools

import jax
import jax.numpy as jnp
import nf4_statements
import numpy as np
import pytest
from flax import nnx

from vlm_jax.models import params, quantised
from vlm_jax.models.layers import Linear, Stack

# Kernels with the axes that go in; blocks end within rows and are filled up where they do not fit.
KERNELS = [((64, 6), 1, False), ((13, 3, 7), 1, False), ((3, 7, 13), 2, False)]
KERNELS += [((2, 128, 4), 1, True), ((2, 3, 7, 13), 2, True)]


def kernel(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(kernel: np.ndarray, axes: int, stacked: bool) -> list[np.ndarray]:
    """Of each layer as PyTorch has them: [outputs, inputs]."""
    layers = kernel if stacked else kernel[None]
    return [layer.reshape(np.prod(layer.shape[:axes]), -1).T for layer in layers]


def restored(leaves, shape, axes, stacked):
    flat = {f"layer/{name}": leaf for name, leaf in leaves.items()}
    shapes = {"layer/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    found = quantised.restored(flat, shapes, {"layer/kernel": axes})["layer/kernel"]
    return weights(np.asarray(found), axes, stacked)


@pytest.mark.parametrize(("shape", "axes", "stacked"), KERNELS)
def test_nf4_is_that_of_the_paper(shape, axes, stacked):
    made = kernel(shape)
    leaves = quantised.hold("nf4", jnp.asarray(made), axes, stacked)
    wanted = quantised.shapes("nf4", jax.ShapeDtypeStruct(shape, jnp.float32), stacked)
    assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == {
        n: (x.shape, x.dtype) for n, x in wanted.items()
    }
    codes = np.asarray(leaves[quantised.CODES]).reshape(2 if stacked else 1, -1, 32)
    scales = np.asarray(leaves[quantised.SCALES]).reshape(len(codes), -1)
    theirs = weights(made, axes, stacked)
    for i, weight in enumerate(theirs):
        levels, largest = nf4_statements.codes(weight)
        np.testing.assert_array_equal(codes[i], levels[:, ::2] * 16 + levels[:, 1::2])
        np.testing.assert_array_equal(scales[i], largest)
    for ours, weight in zip(restored(leaves, shape, axes, stacked), theirs, strict=True):
        np.testing.assert_array_equal(ours, nf4_statements.held(weight))


@pytest.mark.parametrize(("shape", "axes", "stacked"), KERNELS)
def test_int8_errs_half_a_step_at_most(shape, axes, stacked):
    leaves = quantised.hold("int8", jnp.asarray(kernel(shape)), axes, stacked)
    scales = np.asarray(leaves[quantised.SCALES]).reshape(2 if stacked else 1, -1)
    theirs = weights(kernel(shape), axes, stacked)
    for i, ours in enumerate(restored(leaves, shape, axes, stacked)):
        size = theirs[i].size
        largest = np.pad(np.abs(theirs[i]).reshape(-1), (0, -size % 64)).reshape(-1, 64).max(1)
        np.testing.assert_allclose(scales[i], largest / 127.5, rtol=1e-6)
        errors = np.abs(ours - theirs[i]).reshape(-1)
        assert (errors <= 0.5001 * np.repeat(scales[i], 64)[:size]).all() and errors.max() > 0


def test_weights_take_four_and_a_half_or_eight_and_a_half_bits():
    made = jnp.asarray(kernel((2, 128, 4, 16)))
    for kind, bits in ("nf4", 4.5), ("int8", 8.5):
        leaves = quantised.hold(kind, made, 1, True)
        assert 8 * sum(np.asarray(leaf).nbytes for leaf in leaves.values()) == bits * made.size


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axes", "stacked"), KERNELS[:3])
def test_bytes_are_those_of_bitsandbytes(shape, axes, stacked):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes.functional")
    (weight,) = weights(kernel(shape), axes, stacked)
    codes, state = theirs.quantize_4bit(
        torch.from_numpy(weight.copy()), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    ours = quantised.hold("nf4", jnp.asarray(kernel(shape)), axes, stacked)
    codes = codes.numpy().reshape(-1)
    np.testing.assert_array_equal(
        np.asarray(ours[quantised.CODES]).reshape(-1)[: codes.size], codes
    )
    np.testing.assert_array_equal(ours[quantised.SCALES], state.absmax.numpy())


def layer(kind: str, dtype=None):
    """A layer from [4, 8] to [3, 5], and the same with its kernel in few bits."""
    plain = Linear((4, 8), (3, 5), bias=True, rngs=nnx.Rngs(0))
    plain.kernel[...] = jnp.asarray(kernel((4, 8, 3, 5)))
    held = Linear((4, 8), (3, 5), bias=True, rngs=nnx.Rngs(0))
    leaves = quantised.hold(kind, plain.kernel[...], 2, False)
    held.kernel = quantised.Quantised(*leaves.values(), (4, 8, 3, 5), 2)
    plain.kernel[...] = held.kernel[...]
    return plain, held


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize(("dtype", "asked"), [("float32", None), ("bfloat16", jnp.float32)])
def test_products_and_gradients_are_those_of_the_restored_kernel(kind, dtype, asked):
    x = jnp.asarray(kernel((2, 6, 4, 8), 1)).astype(dtype)

    def loss(layer, x):
        return jnp.sum(jnp.square(layer(x, asked).astype(jnp.float32)))

    found = [jax.value_and_grad(functools.partial(loss, each))(x) for each in layer(kind)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][1].dtype == dtype


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_keeps_no_kernel_as_floats_for_the_backward_pass(remat):
    """Of 10 layers, which are not unrolled; what is kept is what comes out of `jax.vjp`."""
    make = lambda rngs: Linear((32,), (32,), bias=False, rngs=rngs)  # noqa: E731
    stack = Stack(make, 10, remat=remat, rngs=nnx.Rngs(0))

    def kept(stack) -> set[tuple]:
        def run(x):
            return stack(lambda block, x, _, key: (jnp.tanh(block(x)), None), x)[0]

        _, backward = jax.vjp(run, jnp.ones((2, 32)))
        leaves = jax.tree.leaves(backward)
        return {leaf.shape for leaf in leaves if leaf.dtype == jnp.float32}

    assert (10, 32, 32) in kept(stack)
    leaves = quantised.hold("nf4", stack.blocks.kernel[...], 1, True)
    stack.blocks.kernel = quantised.Quantised(*leaves.values(), (32, 32), 1)
    assert max(np.prod(shape, dtype=int) for shape in kept(stack)) < 10 * 32 * 32


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(quantised.ConfigError, match=r"vlm_jax\[quantised\]"):
        quantised.hold("nf4", jnp.zeros((8, 8)), 1, False)


def test_leaves_lie_over_both_axes_of_parameters():
    path = "decoder/stack/blocks/attention/query/"
    assert params.axes(path + quantised.CODES) == ("layers", "quantised", None)
    assert params.axes("connector/embed/kernel_scales") == ("quantised",)
