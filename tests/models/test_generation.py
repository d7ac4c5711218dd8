"""Generation against what transformers gave (see make_generation_goldens.py), and its draws."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import FILTERS, OPTIONS, SMALL, ended, logits, ours, prompts, text_batch
from handmade import MODEL, weights

from vlm_jax.models import params, sampling
from vlm_jax.presets.generation import Generation

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
# Every option with one family (with windows too in the long tier), the usual ones with each.
USUAL = ("greedy, ends", "beams, ends")
COMPARED = [("llama_untied", name) for name in OPTIONS]
COMPARED += [(family, name) for family in SMALL if family != "llama_untied" for name in USUAL]
COMPARED += [
    pytest.param("gemma2", name, marks=pytest.mark.slow) for name in OPTIONS if name not in USUAL
]


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "generation.npz") as file:
        return dict(file)


@functools.cache
def their_weights(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"models_{family}.npz") as file:
        return {
            key.removeprefix("weights/"): file[key]
            for key in file.files
            if key.startswith("weights/")
        }


@pytest.mark.parametrize(("family", "name"), COMPARED)
def test_replies_to_unequal_prompts_equal_those_of_transformers(family, name):
    case, found = SMALL[family], goldens()
    asked = prompts(case, int(found[f"{family}/seed"]))
    ends = found[f"{family}/ends"].tolist() if ended(name) else []
    made = ours(case, their_weights(family), asked, OPTIONS[name], ends)
    np.testing.assert_array_equal(made, found[f"{family}/{name}"])


@pytest.mark.parametrize("name", FILTERS)
def test_filtered_distributions_equal_those_of_transformers(name):
    wanted = goldens()[f"filters/{name}"]
    filtered = np.asarray(sampling.filtered(jnp.asarray(logits()), FILTERS[name]))
    np.testing.assert_array_equal(np.isneginf(filtered), np.isneginf(wanted))
    probabilities = np.asarray(jax.nn.softmax(filtered)), np.asarray(jax.nn.softmax(wanted))
    np.testing.assert_allclose(*probabilities, rtol=1e-5, atol=1e-8)


DRAWS = Generation(2, temperature=1.5, top_k=12, top_p=0.9)


@functools.cache
def drawn(rows: int, first: int = 0) -> np.ndarray:
    """Two tokens for each of so many equal prompts, whose keys are numbered from `first`."""
    flat = weights(MODEL, seed=4)
    batch = text_batch([np.array([3, 14, 15])] * (rows - 1))

    @jax.jit
    def run(flat, batch, numbers):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), numbers)
        return sampling.generate(params.build(MODEL, flat), batch, None, DRAWS, (), keys)

    return np.asarray(run(flat, batch, first + np.arange(rows)))[:-1]


def probabilities(prompt: list[int]) -> np.ndarray:
    vlm = params.build(MODEL, weights(MODEL, seed=4))
    hidden = vlm.hidden(text_batch([np.array(prompt)]), None)[:1, -1]
    scores = np.asarray(vlm.unembed(hidden)[0], np.float64) / DRAWS.temperature
    order = np.argsort(-scores)[: DRAWS.top_k]
    p = np.exp(scores[order] - scores.max())
    p /= p.sum()
    kept = np.cumsum(p) - p < DRAWS.top_p  # the fewest that have so much together
    wanted = np.zeros(len(scores))
    wanted[order[kept]] = p[kept] / p[kept].sum()
    return wanted


def assert_follows(tokens: np.ndarray, wanted: np.ndarray) -> None:
    """Pearson's test: its statistic has mean k and variance 2 k for k degrees of freedom."""
    counts = np.bincount(tokens, minlength=len(wanted))
    assert not counts[wanted == 0].any()
    expected = len(tokens) * wanted[wanted > 0]
    freedom = len(expected) - 1
    assert freedom >= 3 and expected.min() > 5
    statistic = ((counts[wanted > 0] - expected) ** 2 / expected).sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_draws_follow_the_filtered_distribution():
    tokens = drawn(4001)
    wanted = probabilities([3, 14, 15])
    assert_follows(tokens[:, 0], wanted)
    first = int(wanted.argmax())
    assert_follows(tokens[tokens[:, 0] == first, 1], probabilities([3, 14, 15, first]))


def test_draws_of_a_row_depend_on_its_key_alone():
    np.testing.assert_array_equal(drawn(4, first=70), drawn(4001)[70:73])


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 1.0, "beams": 2}),
        ("temperature", {"top_k": 3}),
        ("top_k", {"temperature": 1.0, "top_k": -3}),
        ("top_p", {"temperature": 1.0, "top_p": 0.0}),
        ("beams", {"beams": 0}),
        ("stop", {"stop": "."}),
        ("stop", {"stop": ("",)}),
    ],
)
def test_options_that_contradict_each_other_are_named(field, fields):
    assert [name for name, _ in Generation(**fields).problems()] == [field]


def test_defaults_and_all_that_is_compared_are_without_problems():
    for options in (Generation(), DRAWS, *OPTIONS.values(), *FILTERS.values()):
        assert not list(options.problems())
        assert dataclasses.replace(options) == options
