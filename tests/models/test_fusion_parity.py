"""Cross-attention between decoder layers against transformers and OpenFlamingo's definition."""

import pathlib

import jax
import numpy as np
import pytest
from cases import cotangent
from fusion_cases import GOLDENS, LARGER, Case, assert_close, inputs, run

from vlm_jax.models import params

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def golden(name: str) -> tuple[np.ndarray, dict, dict]:
    arrays = {"weights": {}, "gradients": {}}
    with np.load(FOLDER / f"fusion_{name}.npz") as file:
        for key in file.files:
            kind, _, path = key.partition("/")
            if path:
                arrays[kind][path] = file[key]
        return file["logits"], arrays["weights"], arrays["gradients"]


def assert_equal(case: Case, wanted: np.ndarray, weights: dict, gradients: dict) -> None:
    tokens, visual, media = inputs(case)
    leaves = case.leaves(weights)
    assert leaves.keys() == params.abstract(case.model).keys()

    def weighted(leaves, visual):
        logits = run(case, leaves, tokens, visual, media)
        return (logits * cotangent(wanted.shape)).sum(), logits

    compared = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    (ours, of_visual), logits = compared(leaves, visual)
    assert_close({"logits": logits}, {"logits": wanted})
    assert_close(ours, case.leaves(gradients))
    assert_close({"visual": of_visual}, {"visual": gradients["visual"]})
    assert not gradients["visual"][1, 1:].any()  # no token of the second row looks at them


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_and_gradients_equal_the_originals(name):
    assert_equal(GOLDENS[name], *golden(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_logits_and_gradients_equal_the_originals_over_larger_sizes(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import fusion_theirs

    assert_equal(LARGER[name], *fusion_theirs.compare(LARGER[name]))
