"""Vision towers of the field against what transformers computed (see make_vision_goldens.py)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from cases import cotangent
from vision_cases import LARGER, SMALL, images, leaves, run, shapes

from vlm_jax.errors import ConfigError
from vlm_jax.weights import tables

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
FAMILIES = {tower.family: name for name, tower in (LARGER | SMALL).items()}


def golden(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of a tower by kind and name."""
    arrays = {"weights": {}, "gradients": {}, "plain": {}}
    with np.load(FOLDER / f"vision_{name}.npz") as file:
        for key in file.files:
            kind, _, path = key.partition("/")
            arrays[kind if path else "plain"][path or key] = file[key]
    return arrays


def assert_close(ours, theirs: np.ndarray, name: str = "", floor: float = 0.0) -> None:
    """The relative error of all numbers together is at most 1e-4."""
    error = np.linalg.norm(np.asarray(ours) - theirs)
    assert error <= max(1e-4 * np.linalg.norm(theirs), floor), (name, error)


def check(tower, weights, gradients, x, wanted) -> None:
    """Output, and the gradient of every leaf where there are some."""
    ours, seen = leaves(tower, weights), images(tower, x)
    if not gradients:
        assert_close(jax.jit(lambda ours, seen: run(tower, ours, seen))(ours, seen), wanted)
        return

    def weighted(ours, seen):
        output = run(tower, ours, seen)
        return (output * cotangent(wanted.shape)).sum(), output

    found, output = jax.jit(jax.grad(weighted, has_aux=True))(ours, seen)
    assert_close(output, wanted)
    gradients = leaves(tower, gradients)
    assert gradients.keys() == found.keys()
    # Those of key biases are rounding errors of 0, for a softmax does not feel them.
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in gradients.values())
    for path, gradient in gradients.items():
        assert_close(found[path], gradient, path, floor)


@pytest.mark.parametrize("name", SMALL)
def test_features_and_gradients_equal_those_of_transformers(name):
    arrays = golden(name)
    plain = arrays["plain"]
    check(SMALL[name], arrays["weights"], arrays["gradients"], plain["inputs"], plain["output"])


@pytest.mark.parametrize("name", SMALL)
def test_tables_speak_of_every_tensor_and_give_each_back_bit_for_bit(name):
    tower, weights = SMALL[name], golden(name)["weights"]
    preset, module = tower.preset, tower.module
    rows = module.rows(preset)
    assert tables.uncovered(rows, shapes(preset), weights, module.CARRIED) == ([], [])
    back = tables.scatter(rows, leaves(tower, weights))
    for tensor, array in back.items():
        np.testing.assert_array_equal(array, weights[tensor], err_msg=tensor)
    # What is not given back is carried, and the blocks among it are those that do not run.
    numbers = {
        part for n in weights.keys() - back.keys() for part in n.split(".") if part.isdigit()
    }
    assert {int(number) for number in numbers} == set(range(preset.blocks, preset.depth))


@pytest.mark.parametrize("name", [*SMALL, "idefics3", "smolvlm"])
def test_a_config_written_from_a_preset_is_read_as_that_preset(name):
    tower = (LARGER | SMALL)[name]
    preset = tower.module.read(tower.hf)
    written = tower.module.write(preset)
    assert tower.module.read(written) == preset
    assert {key: written[key] for key in tower.hf} == tower.hf
    assert tower.module.read(tower.module.write(tower.module.read({}))) == tower.module.read({})


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_are_not_computed_are_refused_by_name(family):
    tower = (LARGER | SMALL)[FAMILIES[family]]
    name = next(iter(tower.module.FIXED)) if hasattr(tower.module, "FIXED") else "num_channels"
    with pytest.raises(ConfigError, match=name):
        tower.module.read(tower.hf | {name: 0.5})
    activation = "dense_act_fn" if family.startswith("pix2struct") else "hidden_act"
    with pytest.raises(ConfigError, match="mish"):
        tower.module.read(tower.hf | {activation: "mish"})


def test_pixels_beyond_the_last_whole_patch_do_not_count():
    preset = SMALL["siglip_resized"].module.read({"image_size": 384, "patch_size": 14})
    assert (preset.image_size, preset.grid) == (378, (27, 27))


def test_padding_and_neighbours_change_nothing():
    tower = SMALL["naflex"]
    arrays = golden("naflex")
    ours, x = leaves(tower, arrays["weights"]), arrays["plain"]["inputs"].copy()
    forward = jax.jit(lambda ours, seen: run(tower, ours, seen))
    before = forward(ours, images(tower, x))
    for i, (rows, columns) in enumerate(tower.grids):
        x[i, rows * columns :] = 1e3
    np.testing.assert_array_equal(forward(ours, images(tower, x)), before)
    alone = dataclasses.replace(tower, grids=tower.grids[1:2])
    found = jax.jit(lambda ours, seen: run(alone, ours, seen))(ours, images(alone, x[1:2]))
    np.testing.assert_allclose(found, before[6:21], atol=1e-5)


def test_an_empty_slot_is_finite_and_so_are_gradients_through_it():
    tower = SMALL["naflex"]
    empty = dataclasses.replace(tower, grids=((3, 2), (0, 0), (2, 2)))
    arrays = golden("naflex")
    ours, x = leaves(tower, arrays["weights"]), arrays["plain"]["inputs"]
    gradient = jax.grad(lambda ours: run(empty, ours, images(empty, x)).sum())
    gradients = jax.jit(gradient)(ours)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
