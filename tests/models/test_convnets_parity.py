"""Convolutional and windowed encoders against torch, over larger odd sizes."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import convnet_theirs
from convnet_cases import LARGER, pixels
from test_convnets import assert_equal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LARGER)
def test_outputs_and_gradients_equal_those_of_torch(name):
    case = LARGER[name]
    output, gradients, _ = convnet_theirs.compare(case, pixels(case))
    assert np.isfinite(output).all()
    assert_equal(case, output, gradients)
