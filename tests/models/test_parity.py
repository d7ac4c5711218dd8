"""Towers against transformers, over odd sizes: every output and every gradient."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import theirs
from cases import LARGER, assert_gradients_equal, cotangent, inputs, leaves, run, towers_leaves

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LARGER)
def test_outputs_and_gradients_equal_those_of_transformers(name):
    case = LARGER[name]
    x = inputs(case)
    wanted, weights, gradients = theirs.compare(case, theirs.make(case), x)
    compared = leaves(case, weights)
    assert compared.keys() == towers_leaves(case)

    output = jax.jit(lambda compared: run(case, compared, x))(compared)
    np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())

    weighted = lambda compared: (run(case, compared, x) * cotangent(wanted.shape)).sum()  # noqa: E731
    assert_gradients_equal(case, jax.jit(jax.grad(weighted))(compared), gradients)
