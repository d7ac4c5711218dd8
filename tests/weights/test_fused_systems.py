"""BLIP-2, InstructBLIP and Idefics1 whole: published configs, names and sizes, refusals."""

import dataclasses
import math

import goldens
import numpy as np
import pytest

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.presets.fusion import cross_attention
from vlm_jax.presets.qformer import BLIP2, INSTRUCTBLIP
from vlm_jax.presets.resizing import SQUASH
from vlm_jax.weights import checking, conversion, registry, tables
from vlm_jax.weights.families import blip_2, idefics, instructblip

# What sets blip2-opt-2.7b, instructblip-vicuna-7b and idefics-9b apart from transformers' defaults.
BLIP2_OPT = {
    "model_type": "blip-2",
    "image_token_index": 50_265,
    "text_config": {
        "model_type": "opt",
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10_240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
INSTRUCTBLIP_VICUNA = {
    "model_type": "instructblip",
    "qformer_config": {"vocab_size": 30_523},
    "text_config": {"model_type": "llama", "vocab_size": 32_001, "rms_norm_eps": 1e-6},
}
IDEFICS_9B = {
    "model_type": "idefics",
    "additional_vocab_size": 2,
    "cross_layer_interval": 4,
    "qk_layer_norms": True,
    "use_resampler": True,
    "perceiver_config": {"use_resampler": True, "qk_layer_norms_perceiver": True},
    "vision_config": {"model_type": "idefics", "embed_dim": 1280},
}
# transformers stores keys' biases of zeros, which EVA does not have.
EVA = published("blip2-g14", unbiased=())
SYSTEMS = {
    "blip-2": (BLIP2_OPT, Model(EVA, BLIP2, decoder("opt-2.7b", vocab=50_304))),
    "instructblip": (
        INSTRUCTBLIP_VICUNA,
        Model(EVA, INSTRUCTBLIP, decoder("llama1-7b", vocab=32_001)),
    ),
    "idefics": (
        IDEFICS_9B,
        Model(
            published("openclip-h14", keep_class=True, resize=SQUASH),
            resampler("idefics"),
            decoder("llama1-7b", added=2),
            fusion=cross_attention("idefics-9b"),
        ),
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_of_published_sizes_is_rows_of_the_tables_and_comes_back(name):
    hf, model = SYSTEMS[name]
    family = registry.family(name)
    assert family.read(hf) == model
    assert family.read(family.write(model)) == model


@pytest.mark.parametrize(
    "name, total",
    [
        # blip2-opt-2.7b, of whose tokens 32 were added for the placeholder: 3,744,679,936 before.
        ("blip-2", 3_744_679_936 + 32 * 2560),
        # As transformers' class has them: 7.91 billion.
        ("instructblip", 7_913_210_624),
        # In its safetensors, less the tower's last norm, which nothing reads, and the rotary
        # frequencies of 32 layers and 8 blocks.
        ("idefics", 8_929_682_192 - 2 * 1280 - 40 * 64),
    ],
)
def test_systems_have_the_published_number_of_parameters(name, total):
    leaves = params.abstract(SYSTEMS[name][1])
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == total


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_published_sizes_have_the_names_and_shapes_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, family = SYSTEMS[name][1], registry.family(name)
    hf = family.write(model)
    config = transformers.AutoConfig.for_model(**hf)
    with torch.device("meta"):
        theirs = getattr(transformers, family.architecture)(config)
    state = {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    found = tables.theirs_of(family.rows(model), params.abstract(model))
    norm = "model.vision_model.post_layernorm."
    carried = {norm + "weight", norm + "bias"} if name == "idefics" else set()
    assert state.keys() - found.keys() == carried
    assert {n: entry.shape for n, entry in found.items()} == {
        n: shape for n, shape in state.items() if n not in carried
    }


@pytest.mark.parametrize(
    "name, kept",
    [
        ("llava", {"encoder.layers.2.", "post_layernorm."}),
        ("idefics", {"post_layernorm."}),
        ("blip_2", set()),
    ],
)
def test_only_what_is_not_computed_with_is_carried(name, kept, tmp_path):
    source = goldens.publish(goldens.read(name), tmp_path / "source")
    stored = conversion.import_folder(source, tmp_path / "model")
    carried = set(stored.carried.shapes)
    assert {part for part in kept if any(part in n for n in carried)} == kept
    assert all(any(part in n for part in kept) for n in carried)


@pytest.mark.parametrize(
    "name, part, change, message",
    [
        ("blip-2", "encoder", {"layer": -2}, "encoder.layer .* -2; .* only say -1"),
        ("blip-2", "encoder", {"pre_norm": True}, "encoder.pre_norm .* True"),
        ("blip-2", "connector", {"vocab": 9}, "connector.vocab .* 9; .* only say 0"),
        ("instructblip", "encoder", {"final_norm": False}, "encoder.final_norm .* False"),
        ("idefics", "encoder", {"keep_class": False}, "encoder.keep_class .* False"),
        ("idefics", "connector", {"mlp_activation": "gelu"}, "connector.mlp_activation"),
    ],
)
def test_models_that_a_config_json_cannot_say_are_not_written(name, part, change, message):
    model = SYSTEMS[name][1]
    other = dataclasses.replace(getattr(model, part), **change)
    with pytest.raises(ConfigError, match=message):
        registry.family(name).write(dataclasses.replace(model, **{part: other}))


@pytest.mark.parametrize(
    "parts", [{"fusion": cross_attention("idefics-9b")}, {"extra_encoders": (EVA,)}]
)
def test_a_blip_2_with_further_parts_is_not_written(parts):
    model = dataclasses.replace(SYSTEMS["blip-2"][1], **parts)
    with pytest.raises(ConfigError, match=f"{next(iter(parts))} of a blip-2"):
        blip_2.write(model)


@pytest.mark.parametrize(
    "module, hf, change, message",
    [
        (blip_2, BLIP2_OPT, {"text_config": {"model_type": "t5"}}, "model_type 't5'"),
        (blip_2, BLIP2_OPT, {"vision_config": {"attention_dropout": 0.1}}, "attention_dropout"),
        (instructblip, INSTRUCTBLIP_VICUNA, {"qformer_config": {"hidden_act": "x"}}, "hidden_act"),
        (idefics, IDEFICS_9B, {"vision_config": {"num_channels": 1}}, "num_channels"),
        (idefics, IDEFICS_9B, {"dropout": 0.1}, "dropout"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused_by_name(module, hf, change, message):
    with pytest.raises(ConfigError, match=message):
        module.read(hf | change)


def given(name: str, **changes) -> tuple[Model, dict, dict]:
    """Model, config.json and arrays of a golden, arrays changed."""
    golden = goldens.read(name)
    model = registry.family(golden.config["model_type"]).read(golden.config)
    return model, golden.config, golden.inputs | changes


def test_without_a_placeholder_nothing_says_where_visual_tokens_stand():
    model, hf, arrays = given("blip_2")
    with pytest.raises(ConfigError, match=r"image_token_index .* is null"):
        blip_2.inputs(model, hf | {"image_token_index": None}, arrays)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qformer_input_ids": np.zeros((3, 6), int)}, "tokens 0 of qformer_input_ids"),
        ({"qformer_input_ids": np.ones((2, 6), int)}, "a row for each of 3 pictures"),
        ({"qformer_attention_mask": np.ones((3, 5), int)}, r"qformer_attention_mask \(3, 5\)"),
        ({"pixel_values": np.ones((2, 3, 12, 12))}, "a row for each of 2 pictures"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(changes, message):
    model, hf, arrays = given("instructblip", **changes)
    with pytest.raises(DataError, match=message):
        instructblip.inputs(model, hf, arrays)


def test_instructions_stand_with_their_pictures():
    model, hf, arrays = given("instructblip")
    texts = instructblip.inputs(model, hf, arrays).batch.image_texts
    wanted = arrays["qformer_input_ids"] * arrays["qformer_attention_mask"]
    np.testing.assert_array_equal(texts[0], wanted[:2])
    np.testing.assert_array_equal(texts[1], [wanted[2], np.zeros(6)])
    assert not texts[2].any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"image_attention_mask": np.ones((3, 9, 2), int)},
            "image_attention_mask shows several pictures to one token",
        ),
        ({"image_attention_mask": np.ones((3, 8, 2), int)}, r"\(3, 8, 2\).* expected \(3, 9, 2\)"),
        ({"pixel_values": np.ones((2, 2, 3, 12, 12))}, "3 rows of pictures"),
        ({"pixel_values": np.ones((3, 3, 12, 12))}, "expected 5 axes"),
    ],
)
def test_pictures_that_do_not_fit_their_mask_are_refused(changes, message):
    model, hf, arrays = given("idefics", **changes)
    with pytest.raises(DataError, match=message):
        idefics.inputs(model, hf, arrays)


def test_padding_on_either_side_shows_tokens_the_same_pictures():
    model, hf, arrays = given("idefics")
    right = dict(arrays)
    lengths = arrays["attention_mask"].sum(axis=1)
    for name in ("input_ids", "attention_mask", "image_attention_mask"):
        right[name] = np.stack(
            [np.roll(row, length, axis=0) for row, length in zip(arrays[name], lengths)]
        )
    found, again = (idefics.inputs(model, hf, given).batch for given in (arrays, right))
    np.testing.assert_array_equal(found.image_index, again.image_index)
    np.testing.assert_array_equal(found.tokens, again.tokens)
    seen = [[-1, -1, 0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0, -1, -1], [-1] * 9]
    np.testing.assert_array_equal(found.image_index, seen)


def test_text_alone_needs_no_pictures(tmp_path):
    golden = goldens.read("idefics")
    stored = conversion.import_folder(goldens.publish(golden, tmp_path / "s"), tmp_path / "model")
    alone = {name: golden.inputs[name][2:] for name in ("input_ids", "attention_mask")}
    found = checking.run(stored, alone)["logits"]
    assert goldens.relative_error(found, golden.outputs["logits"][2:], alone) <= 1e-4
