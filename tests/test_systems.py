"""The configs of published systems: they hold together, and have the published sizes."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest
import systems
from jax import ShapeDtypeStruct

from configs import common
from vlm_jax import config as c
from vlm_jax.data import pipeline
from vlm_jax.models import params
from vlm_jax.training import adaptation, initial, objectives, schedules, stages

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "configs.json"
SYSTEMS = systems.systems()
# Systems that differ in more than numbers.
STRUCTURES = systems.structures(SYSTEMS)

# Encoder, connector, decoder and what is carried, counted in transformers' classes on the meta
# device; test_systems_parity.py counts again.
COUNTED = {
    "llava15:7b": (290_909_184, 20_979_712, 6_738_939_904, 12_598_272),
    "llava15:13b": (290_909_184, 31_467_520, 13_016_519_680, 12_598_272),
    "llava_next:vicuna-7b": (290_909_184, 20_983_808, 6_738_939_904, 12_598_272),
    "llava_next:vicuna-13b": (290_909_184, 31_472_640, 13_016_519_680, 12_598_272),
    "llava_next:mistral-7b": (290_909_184, 20_983_808, 7_242_256_384, 12_598_272),
    "blip2:opt-2.7b": (985_897_344, 107_130_880, 2_651_596_800, 54_912),
    "blip2:opt-6.7b": (985_897_344, 108_312_064, 6_658_473_984, 54_912),
    "instructblip:7b": (985_897_344, 188_834_560, 6_738_423_808, 54_912),
    "instructblip:13b": (985_897_344, 189_622_016, 13_015_874_560, 54_912),
    "idefics:9b": (630_763_520, 125_961_984, 8_172_951_568, 2560),
    "idefics2:64": (417_792_240, 743_219_200, 7_241_756_672, 0),
    "idefics3:8b": (412_926_192, 18_874_368, 8_030_285_824, 0),
    "smolvlm:256m": (86_433_024, 7_077_888, 162_974_016, 0),
    "smolvlm:500m": (86_433_024, 11_796_480, 409_252_800, 0),
    "smolvlm:2.2b": (412_987_248, 21_233_664, 1_812_051_968, 0),
    "paligemma:224": (412_442_352, 2_361_344, 2_508_662_784, 0),
    "paligemma:448": (413_327_088, 2_361_344, 2_508_662_784, 0),
    "paligemma:896": (416_866_032, 2_361_344, 2_508_662_784, 0),
    "paligemma2:3b-224": (412_442_352, 2_656_512, 2_617_143_552, 0),
    "paligemma2:10b-448": (413_327_088, 4_132_352, 9_246_064_128, 0),
}

# Billions of parameters as published, carried ones included.
PUBLISHED = {
    # model pages of the published folders (llava-hf, Salesforce, HuggingFaceM4, HuggingFaceTB,
    # google)
    "llava15:7b": "7.06",
    "llava15:13b": "13.35",
    "llava_next:mistral-7b": "7.57",
    "blip2:opt-2.7b": "3.74",
    "blip2:opt-6.7b": "7.75",
    "idefics:9b": "8.93",
    "idefics2:64": "8.4",
    "idefics3:8b": "8.46",
    "smolvlm:256m": "0.256",
    "smolvlm:2.2b": "2.25",
    "paligemma:224": "2.92",
    # README of v0.1
    "nanovlm:222m": "0.222",
}
# Millions of trainable parameters: the table of BLIP-2's paper on visual question answering.
TRAINABLE = {"blip2:opt-2.7b": 107, "blip2:opt-6.7b": 108}


@pytest.mark.parametrize("file", sorted({name.partition(":")[0] for name in SYSTEMS}))
def test_every_variant_resolves_trains_what_it_says_and_is_built(file):
    """On abstract shapes; `pytest -s` shows the parts in millions of parameters."""
    for name in SYSTEMS:
        if name.partition(":")[0] == file:
            config = systems.config(name)
            plan = adaptation.of(config)
            schedules.make(config.train)
            parts = systems.counts(config.model) | {"total": 0}
            parts["total"] = sum(parts.values())
            assert parts.keys() - {"samplers"} == {"encoder", "connector", "decoder", "total"}
            shown = "".join(f"{part:>11}{size / 1e6:10.1f}" for part, size in parts.items())
            print(f"{name:24}{shown}{len(plan.lr):>6} leaves train")


STAGED = [name for name in SYSTEMS if name.endswith("stages")]


@pytest.mark.parametrize("name", STAGED)
def test_stages_are_the_variants_of_their_file_and_each_starts_from_the_last(name, tmp_path):
    """But for their names, where they start, and the baseline, which is the last one's."""
    config, file = systems.config(name), name.partition(":")[0]
    every = [*SYSTEMS, *systems.FIRST]
    alone = [systems.config(other) for other in every if other.partition(":")[0] == file]
    bare = lambda x: dataclasses.replace(  # noqa: E731
        x, name="", eval=dataclasses.replace(x.eval, text_only_steps=0)
    )
    known = [bare(other) for other in alone if not other.stages]
    stages_ = c.walked(config)
    assert all(bare(stage) in known for stage in stages_)
    assert len({repr(stage) for stage in map(bare, stages_)}) == len(stages_) > 1
    assert bare(dataclasses.replace(config, stages=())) == bare(stages_[-1])
    left = None
    for run in stages.of(config, tmp_path):
        planned = {} if left is None else {run.config.init[0].folder: left}
        found = initial.shapes(run.config, planned)
        flat = params.abstract(run.config.model)
        # Of the last stage's leaves it takes all that it has itself.
        assert left is None or {p: f.shape for p, f in found.items()} == {
            p: f.shape for p, f in flat.items() if p in left.shapes
        }
        left = initial.Source(run.config.model, flat, dict)


@pytest.mark.parametrize("name", COUNTED)
def test_parts_have_the_parameters_that_transformers_has(name):
    encoder, connector, decoder, _ = COUNTED[name]
    expected = {"encoder": encoder, "connector": connector, "decoder": decoder}
    assert systems.counts(systems.config(name).model) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_has_the_published_size(name):
    total = sum(systems.counts(systems.config(name).model).values())
    total += COUNTED.get(name, (0, 0, 0, 0))[3]
    decimals = len(PUBLISHED[name].partition(".")[2])
    assert f"{total / 1e9:.{decimals}f}" == PUBLISHED[name]


@pytest.mark.parametrize("name", TRAINABLE)
def test_blip2_trains_what_its_paper_says(name):
    config = systems.config(name)
    flat = params.abstract(config.model)
    plan = adaptation.plan(flat, config.adaptation)
    assert round(sum(flat[path].size for path in plan.lr) / 1e6) == TRAINABLE[name]


def test_minigpt4_trains_one_linear_layer():
    config = systems.config("minigpt4:13b")
    plan = adaptation.of(config)
    assert set(plan.lr) == {"connector/project/kernel", "connector/project/bias"}


def test_llava_lora_trains_two_matrices_beside_every_linear_layer_of_the_blocks():
    """Rank 128 beside four squares of width 4096 and three of 4096 by 11008 in 32 layers."""
    plan = adaptation.of(systems.config("llava15:7b-lora"))
    lora = sum(plan.shapes[path].size for path in plan.lr if path.startswith("decoder/"))
    assert lora == 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert {path for path in plan.lr if "lora" not in path} == {
        f"connector/layers/{i}/{leaf}" for i in range(2) for leaf in ("kernel", "bias")
    }


def test_cambrians_aggregator_learns_at_a_tenth_in_the_first_stage():
    """vision_sampler and vision_query of the authors' names (cambrian_trainer.py)."""
    plan = adaptation.of(systems.config("cambrian:8b-align"))
    slow = {path for path, rate in plan.lr.items() if rate == 0.1}
    assert slow == {
        path for path in plan.lr if re.match(r"samplers|connector/(sampler|query)", path)
    }
    assert {path.split("/")[1] for path in plan.lr.keys() - slow} == {"aux", "layers", "newline"}


def batch_of(config):
    """One row as the pipeline makes it, abstract."""
    one = dataclasses.replace(config.data, rows=1, pool=2, threads=0)
    with pipeline.train_stream(dataclasses.replace(config, data=one)) as stream:
        batch, _ = next(stream)
    assert (batch.loss_weights > 0).any()
    assert (batch.visual_index >= 0).any() == config.model.visual_in_sequence
    assert len(batch.extra_images) == len(config.model.extra_encoders)
    return jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), batch)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in STRUCTURES)) for name in SYSTEMS],
)
def test_the_loss_of_a_batch_fits_together_at_full_size(name):
    config = systems.config(name)

    def loss(flat, batch):
        return objectives.losses(params.build(config.model, flat), batch, config)[0]

    shape = jax.eval_shape(loss, params.abstract(config.model), batch_of(config))
    assert shape.shape == () and shape.dtype == "float32"


def test_configs_are_as_recorded():
    """tests/make_config_goldens.py records them anew; new fields with defaults change nothing."""
    recorded, found = json.loads(GOLDEN.read_text()), systems.golden()
    assert json.loads(json.dumps(found["configs"])) == recorded["configs"]
    assert found["local"] == recorded["local"]
    for kind, fields in recorded["defaults"].items():
        known = found["defaults"][kind]
        assert {field: known.get(field) for field in fields} == fields, kind


def test_variants_leave_out_what_is_first_and_refuse_unknown_words():
    choices = ("7b", "13b"), ("", "align")
    assert common.words("llava15", "", *choices) == ("7b", "")
    assert common.words("llava15", "align", *choices) == ("7b", "align")
    assert common.words("llava15", "13b-align", *choices) == ("13b", "align")
    with pytest.raises(ValueError, match="no variant '70b'; it has: 7b, 7b-align, 13b, 13b-align"):
        common.words("llava15", "70b", *choices)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_linear_layer_can_have_an_adapter(name):
    """At full size, on abstract shapes: the loss's gradient for DoRA with dropout everywhere."""
    config = systems.config(name)
    rules = (c.Rule(".*", "dora", rank=4, alpha=8.0, dropout=0.1), c.Rule(".*", "frozen"))
    config = dataclasses.replace(config, adaptation=rules)
    plan = adaptation.of(config)
    assert len(plan.adapters) == len(params.linears(config.model))
    trainable, frozen = plan.split(plan.shapes)

    def loss(trainable, frozen, batch, key):
        vlm = params.build(config.model, {**frozen, **trainable}, plan.dropout, key)
        return objectives.losses(vlm, batch, config, key)[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    gradient = jax.eval_shape(jax.grad(loss), trainable, frozen, batch_of(config), key)
    assert {p: g.shape for p, g in gradient.items()} == {p: t.shape for p, t in trainable.items()}
