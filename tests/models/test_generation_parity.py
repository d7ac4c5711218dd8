"""Generation against transformers, over larger decoders and other prompts."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import their_generations
import theirs
from generations import LARGE, OPTIONS, ended, ours, prompts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", LARGE)
def test_replies_equal_those_of_transformers(family):
    case = LARGE[family]
    module = theirs.make(case, seed=1)
    seed, ends, found = their_generations.answers(case, module, first=100)
    weights = theirs.weights(case, module)
    for name in (
        "greedy",
        "greedy, ends",
        "beams",
        "beams, penalty -1, ends",
        "beams, early, ends",
    ):
        stops = ends.tolist() if ended(name) else []
        made = ours(case, weights, prompts(case, seed), OPTIONS[name], stops)
        np.testing.assert_array_equal(made, found[name], err_msg=name)
