"""Connectors against transformers and against statements of what was published."""

import json
import math
import pathlib

import connector_statements
import jax
import numpy as np
import pytest
from cases import cotangent
from connector_cases import (
    GOLDENS,
    LIVE,
    STATED,
    Case,
    inputs,
    random_weights,
    relative_error,
    run,
)

from vlm_jax import config, schema
from vlm_jax.weights import tables

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
EVERY = GOLDENS | STATED


def golden(name: str) -> dict:
    """What transformers computed for a case: inputs, weights and gradients by name; output."""
    with np.load(FOLDER / f"connectors_{name}.npz") as file:
        shapes = json.loads(str(file["shapes"]))
        found = {kind: _named(file[kind], shapes) for kind in ("weights", "gradients")}
        fed = {key.partition("/")[2]: file[key] for key in file.files if "/" in key}
        return found | {"inputs": fed, "output": file["output"]}


def _named(flat: np.ndarray, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts)}


def check(case: Case, fed: dict, output: np.ndarray, weights: dict, gradients: dict) -> None:
    """Our output and every gradient within 1e-4 of theirs; a softmax does not feel key biases, so
    that their gradients are rounding errors of 0: hence a floor."""

    def weighted(leaves):
        found = run(case, leaves, fed)
        return (found * cotangent(output.shape)).sum(), found

    leaves = case.leaves(weights)
    assert leaves.keys() == case.shapes.keys()
    ours, found = jax.jit(jax.grad(weighted, has_aux=True))(leaves)
    assert found.shape == output.shape
    assert relative_error(found, output) < 1e-4
    theirs = case.leaves(gradients)
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in theirs.values())
    for path, gradient in theirs.items():
        distance = np.linalg.norm(np.asarray(ours[path]) - gradient)
        assert distance <= 1e-4 * np.linalg.norm(gradient) + floor, path


@pytest.mark.parametrize("name", GOLDENS)
def test_outputs_and_gradients_equal_those_of_transformers(name):
    made = golden(name)
    check(GOLDENS[name], made["inputs"], made["output"], made["weights"], made["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDENS | LIVE)
def test_outputs_and_gradients_equal_those_of_the_transformers_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import connector_theirs

    case = (GOLDENS | LIVE)[name]
    fed = inputs(case, seed=1)
    check(case, fed, *connector_theirs.compare(case, fed, cotangent))


@pytest.mark.parametrize("name", STATED)
def test_outputs_equal_the_published_definition(name):
    case = STATED[name]
    fed, theirs = inputs(case), stated_weights(case)
    statement = getattr(connector_statements, name)
    exact = {key: array.astype(np.float64) for key, array in theirs.items()}
    grids = [(rows, columns) for rows, columns, _ in case.features]
    extra = {"grids": grids} if len(grids) > 1 else {}
    wanted = statement(case.preset, exact, **fed, **extra)
    found = jax.jit(lambda leaves: run(case, leaves, fed))(case.leaves(theirs))
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < 1e-4


def stated_weights(case: Case) -> dict[str, np.ndarray]:
    """Random tensors of theirs, through our leaves: theirs have no module to be drawn in."""
    return tables.scatter(case.family.rows(case.preset), random_weights(case.shapes))


@pytest.mark.parametrize("name", EVERY)
def test_tensors_go_in_and_out_bit_for_bit_and_none_is_left(name):
    case = EVERY[name]
    theirs = golden(name)["weights"] if name in GOLDENS else stated_weights(case)
    rows = case.family.rows(case.preset)
    assert tables.uncovered(rows, case.shapes, theirs, case.family.CARRIED) == ([], [])
    back = tables.scatter(rows, case.leaves(theirs))
    assert back.keys() == theirs.keys()
    for key, array in theirs.items():
        assert back[key].shape == array.shape, key
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_written_of_a_connector_reads_back(name):
    case = EVERY[name]
    fields = case.family.write(case.preset)
    sizes = {"image_size": 4 * case.features[0][0], "patch_size": 4}
    vision = sizes | fields.get("vision_config", {})
    assert case.family.read(fields | {"vision_config": vision}) == case.preset


@pytest.mark.parametrize("name", EVERY)
def test_a_connector_makes_as_many_visual_tokens_as_its_preset_says(name):
    case = EVERY[name]
    leaves, fed = random_weights(case.shapes), inputs(case)
    made = jax.eval_shape(lambda leaves: run(case, leaves, fed), leaves)
    assert made.shape == (3, case.model.visual_tokens, case.preset.output(case.width))
    assert list(case.model.connector.problems(case.width, case.model.encoders)) == []


@pytest.mark.parametrize("name", EVERY)
def test_a_config_of_it_survives_as_plain_data(name):
    model = EVERY[name].model
    assert schema.typed(config.Model, schema.plain(model), "model") == model
