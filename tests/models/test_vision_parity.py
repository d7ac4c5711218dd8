"""Vision towers against transformers itself, over larger odd sizes."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import vision_theirs
from test_vision import check
from vision_cases import LARGER, inputs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LARGER)
def test_features_and_gradients_equal_those_of_transformers(name):
    tower = LARGER[name]
    x = inputs(tower)
    output, weights, gradients = vision_theirs.compare(tower, x)
    check(tower, weights, gradients if tower.gradients else {}, x, output)
