"""A hundred steps of ours beside a plain torch loop over transformers' models, weights the same."""

import pytest
import recipe_cases


@pytest.mark.parametrize("name", recipe_cases.RECIPES)
def test_losses_and_what_every_leaf_learned_are_those_of_torch(name, tmp_path):
    wanted = recipe_cases.read(name)
    recipe_cases.compare(name, recipe_cases.ours(name, wanted.batches, tmp_path), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_cases.RECIPES)
def test_losses_and_what_every_leaf_learned_are_those_of_torch_afresh(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import recipe_theirs

    wanted = recipe_theirs.make(name, tmp_path / "theirs")
    recipe_cases.compare(name, recipe_cases.ours(name, wanted.batches, tmp_path / "ours"), wanted)
