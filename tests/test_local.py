"""The `local` variants of published systems: their recipes at sizes for a CPU."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import systems
from test_runs import finish

from configs import llava15, local
from vlm_jax import config as c
from vlm_jax.data import documents, heldout, pipeline
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation
from vlm_jax.training import state as states
from vlm_jax.training import step as steps

LOCAL = systems.local()
STRUCTURES = systems.structures(LOCAL)
QUICK = ("nanovlm:222m-local",)
PROGRAMS = ("blip2:opt-2.7b-local", "idefics2:320-instruct-local", "paligemma2:3b-224-local")

# What is smaller, beside the model; everything else is the recipe's.
SMALLER = {
    "data": ("rows", "tokens", "text_tokens", "pool", "threads", "augment"),
    "train": ("steps", "warmup_steps", "lr", "log_every"),
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_recipe_is_that_of_the_published_system(name):
    small, whole = systems.config(name), systems.config(name.removesuffix("local").rstrip("-"))
    assert small.name == f"{whole.name}-local"
    for one, other in zip(c.walked(small), c.walked(whole), strict=True):
        _is_smaller(one, other)


def _is_smaller(small: c.Config, whole: c.Config) -> None:
    """Asserts that one config is the other at sizes for a CPU."""
    assert small.adaptation == whole.adaptation
    assert small.train.warmup_steps == max(
        1, round(whole.train.warmup_steps * small.train.steps / whole.train.steps)
    )
    for part, fields in SMALLER.items():
        same = {field: getattr(getattr(whole, part), field) for field in fields}
        assert dataclasses.replace(getattr(small, part), **same) == getattr(whole, part)
    augment = dataclasses.replace(small.data.augment, upscale=whole.data.augment.upscale)
    assert augment == whole.data.augment
    # Nothing but numbers, none of which is 0 where it was not.
    kept = {"dtype": "float32", "remat": False}
    assert systems.numberless(small.model) == systems.numberless(_with(whole.model, kept))


def _with(tree, fields):
    """A tree of presets, these fields of each replaced where it has them."""
    if isinstance(tree, tuple):
        return tuple(_with(each, fields) for each in tree)
    if not dataclasses.is_dataclass(tree):
        return tree
    values = {f.name: _with(getattr(tree, f.name), fields) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **{k: fields.get(k, v) for k, v in values.items()})


def test_the_longest_questions_fit_into_every_row():
    for name in STRUCTURES:
        config = systems.config(name)
        tokenizer = tokenizers.for_config(config)
        for kind in config.eval.kinds:
            for example in heldout.eval_examples(config, "validation", kind, 8):
                assert not documents.document(example, config, tokenizer).rejects, name


def losses(config: c.Config, count: int) -> list[float]:
    """Of some steps on the first batch of the stream."""
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    plan = adaptation.of(config)
    with pipeline.train_stream(config) as stream:
        batch, info = next(stream)
    assert not info.rejects
    step, batch = steps.make_step(config, plan, mesh), steps.place(batch, mesh)
    state, found = states.create(config, plan, mesh), []
    for _ in range(count):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in STRUCTURES],
)
def test_it_compiles_and_learns_a_batch(name):
    # The first step is the warm-up's, at a rate of 0: the third loss is the first that it changed.
    config = systems.config(name)
    found = losses(config, 3)
    assert np.isfinite(found).all()
    # Dropout and negatives that are drawn anew move a pair's loss by more than one update does.
    assert config.model.pair or found[-1] < found[0], found


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_whole_program_runs(name, tmp_path):
    code, output = finish(f"--config=configs/{name.replace(':', '.py:')}", f"--workdir={tmp_path}")
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(found) == list(range(1, local.STEPS + 1))
    assert all(map(math.isfinite, found.values())) and found[local.STEPS] < found[1]
    assert (tmp_path / "report.html").exists()


def test_a_recipe_in_stages_is_small_in_every_stage():
    align, tune = (llava15.get_config(words) for words in ("align", ""))
    made = local.shrink(c.in_stages("llava15", align=align, tune=tune))
    assert made.name == "llava15-local"
    for stage, words in zip(c.walked(c.resolve(made)), ("align-local", "local"), strict=True):
        alone = c.resolve(llava15.get_config(words))
        assert dataclasses.replace(stage, name=alone.name) == alone
