"""Vision towers against transformers itself, over larger odd sizes."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
import vision_theirs
from test_vision import check
from transformers.models.idefics2.modeling_idefics2 import (
    Idefics2VisionConfig,
    Idefics2VisionEmbeddings,
)
from vision_cases import LARGER, inputs

from vlm_jax.models import grids

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LARGER)
def test_features_and_gradients_equal_those_of_transformers(name):
    tower = LARGER[name]
    x = inputs(tower)
    output, weights, gradients = vision_theirs.compare(tower, x)
    check(tower, weights, gradients if tower.gradients else {}, x, output)


@pytest.mark.parametrize("size", [2, 7, 16, 26, 32, 70])
def test_every_patch_of_any_grid_begins_in_the_part_that_idefics2_says(size):
    """70, 26 and 32 are the tables of Idefics2, Idefics3 and SmolVLM."""
    config = Idefics2VisionConfig(
        hidden_size=1, patch_size=1, image_size=size, num_attention_heads=1
    )
    theirs = Idefics2VisionEmbeddings(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
        theirs.position_embedding.weight.copy_(torch.arange(size**2)[:, None].float())
    counts, places = np.arange(1, size + 1)[:, None], np.tile(np.arange(size), (size, 1))
    found = np.asarray(grids.bucket(places, counts, size))
    for count in range(1, size + 1):
        pixels, mask = torch.zeros(1, 3, count, 1), torch.ones(1, count, 1, dtype=torch.bool)
        with torch.no_grad():
            wanted = theirs(pixels, mask)[0, :, 0].numpy() // size
        np.testing.assert_array_equal(found[count - 1, :count], wanted, err_msg=str(count))
