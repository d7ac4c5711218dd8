"""Small towers against what transformers computed for them (see make_goldens.py)."""

import pathlib

import jax
import numpy as np
import pytest
from cases import GOLDENS, Case, assert_gradients_equal, cotangent, leaves, run, towers_leaves

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def golden(name: str) -> tuple[Case, dict[str, dict[str, np.ndarray]]]:
    """A case, and its arrays by kind and name."""
    arrays = {"weights": {}, "gradients": {}, "plain": {}}
    with np.load(FOLDER / f"models_{name}.npz") as file:
        for key in file.files:
            kind, _, path = key.rpartition("/")
            arrays[kind or "plain"][path] = file[key]
    return GOLDENS[name], arrays


@pytest.mark.parametrize("name", GOLDENS)
def test_every_leaf_of_the_tower_has_a_weight_of_transformers(name):
    case, arrays = golden(name)
    assert leaves(case, arrays["weights"]).keys() == towers_leaves(case)


@pytest.mark.parametrize("name", GOLDENS)
def test_outputs_and_gradients_equal_those_of_transformers(name):
    case, arrays = golden(name)
    x, wanted = arrays["plain"]["inputs"], arrays["plain"]["output"]

    def weighted(compared):
        output = run(case, compared, x)
        return (output * cotangent(wanted.shape)).sum(), output

    compared = leaves(case, arrays["weights"])
    gradients, output = jax.jit(jax.grad(weighted, has_aux=True))(compared)
    np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert_gradients_equal(case, gradients, arrays["gradients"])
