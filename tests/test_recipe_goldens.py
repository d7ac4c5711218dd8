"""What every recipe makes of one sample is as recorded by tests/make_recipe_goldens.py.

That templates and resize modes are those of the published systems is compared with their processors
in tests/data; here it is seen when a recipe takes another one.
"""

import json
import pathlib

import numpy as np
import pytest
import recipes
import systems

GOLDENS = json.loads((pathlib.Path(__file__).parent / "goldens" / "recipes.json").read_text())
BY_NAME = {name: each for each in GOLDENS for name in each["recipes"]}


def test_every_recipe_is_recorded():
    assert sorted(BY_NAME) == sorted([*systems.systems(), *systems.FIRST])


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_prompt_mask_and_pixels_are_as_recorded(name):
    golden, made = BY_NAME[name], recipes.record(systems.config(name))
    for what in ("prompt", "tokens", "attention"):
        assert made[what] == golden[what]
    for ours, theirs in zip(made["pixels"], golden["pixels"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            (size, colours), (recorded_size, recorded) = map(recipes.colours, (one, other))
            assert size == recorded_size
            np.testing.assert_allclose(colours, recorded, atol=1)
