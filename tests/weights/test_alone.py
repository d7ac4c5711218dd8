"""Encoders alone, and pairs of an image and a text tower: sizes, config.json, refusals, losses."""

import dataclasses
import json
import math

import goldens
import numpy as np
import pytest

from vlm_jax.config import Model, check_model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.presets import text
from vlm_jax.presets.encoder_sizes import published
from vlm_jax.schema import plain, typed
from vlm_jax.training import objectives
from vlm_jax.weights import checking, conversion, registry, tables

# Parameters of transformers' classes of these published configs: CLIPModel, SiglipModel and
# Siglip2Model made without memory.
COUNTS = {
    "clip-b32": 151_277_313,
    "clip-l14": 427_616_513,
    "openclip-h14": 986_109_441,
    "siglip-b16": 203_155_970,
    "siglip-so400m14-378": 877_960_498,
    "siglip2-naflex-b16": 375_234_050,
}
FAMILY = {"clip": "clip", "openclip": "clip", "siglip": "siglip", "siglip2": "siglip2"}
# What the published config.json files say, as far as it is not the default.
CLIP_L14 = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
SIGLIP_SO400M = {
    "model_type": "siglip",
    "text_config": _SO400M,
    "vision_config": _SO400M | {"image_size": 384, "patch_size": 14},
}
PAIRS = ("clip", "clip_legacy", "siglip", "siglip2")


def pair(name: str) -> Model:
    """A published image tower with its text tower."""
    tower = text.PUBLISHED[name]
    if not tower.project_images:
        return Model(published(name, pool="map"), text=tower)
    return Model(published(name, pool="class", final_norm=True), text=tower)


def family(name: str) -> registry.Family:
    """Of a published pair."""
    return registry.family(FAMILY[name.partition("-")[0]])


@pytest.mark.parametrize("name", COUNTS)
def test_pairs_have_the_published_number_of_parameters(name):
    flat = params.abstract(pair(name))
    assert sum(math.prod(leaf.shape) for leaf in flat.values()) == COUNTS[name]
    assert all(len(params.axes(path)) == len(leaf.shape) for path, leaf in flat.items())


@pytest.mark.parametrize("name", text.PUBLISHED)
def test_a_pair_is_read_back_from_the_config_json_it_is_written_to(name):
    model, known = pair(name), family(name)
    check_model(model)
    assert known.read(known.write(model)) == model
    assert typed(Model, plain(model), "model") == model


def test_published_configs_are_rows_of_the_tables():
    assert registry.family("clip").read(CLIP_L14) == pair("clip-l14")
    assert registry.family("siglip").read(SIGLIP_SO400M) == pair("siglip-so400m14-378")


def test_an_old_config_of_clip_goes_by_its_second_copy_and_takes_the_largest_id_for_the_end():
    old = CLIP_L14["text_config"] | {"eos_token_id": 2}
    model = registry.family("clip").read(CLIP_L14 | {"text_config_dict": old, "text_config": {}})
    assert model == dataclasses.replace(
        pair("clip-l14"), text=dataclasses.replace(pair("clip-l14").text, pool="largest", end=2)
    )


def test_another_copy_of_a_part_of_clip_wins_even_where_it_says_nothing():
    empty = {"text_config_dict": {}, "text_config": {"hidden_size": 32}}
    assert registry.family("clip").read(empty) == registry.family("clip").read({})


def test_global_layers_that_a_sam_does_not_have_are_passed_over():
    few = {"num_hidden_layers": 3}  # the default's are 2, 5, 8 and 11
    assert registry.family("sam").read({"vision_config": few}).encoder.global_layers == (2,)


@pytest.mark.parametrize("width", [6, 14, 20, 1536])
@pytest.mark.parametrize("gated", [True, False])
def test_the_ratio_of_every_dinov2_is_written_as_a_whole_number_that_reads_back(width, gated):
    known = registry.family("dinov2")
    for ratio in (1, 2, 4):
        said = {"hidden_size": width, "num_attention_heads": 2, "use_swiglu_ffn": gated}
        model = known.read(said | {"mlp_ratio": ratio})
        written = known.write(model)
        assert known.read(written) == model and type(written["mlp_ratio"]) is int


ALONE = (
    "blip_2_vision",
    "clip_vision",
    "clip_vision_resized",
    "convnext",
    "convnextv2",
    "dinov2",
    "dinov2_with_registers",
    "idefics2_vision",
    "pix2struct_vision",
    "sam_vision",
    "siglip2_vision",
    "siglip_vision",
    "siglip_vision_headless",
)


@pytest.mark.parametrize("name", [*PAIRS, *ALONE])
def test_rows_cover_every_leaf_and_tensor_and_give_each_back_bit_for_bit(name):
    golden = goldens.read(name)
    known = registry.family(golden.config["model_type"])
    model = known.read(golden.config)
    canonical = conversion._canonical(golden.tensors, known.renames(model))
    tensors = {ours: golden.tensors[theirs] for ours, theirs in canonical.items()}
    shapes = {path: leaf.shape for path, leaf in params.abstract(model).items()}
    rows, carried = known.rows(model), known.carried(model)
    assert tables.uncovered(rows, shapes, tensors, carried) == ([], [])
    back = tables.scatter(rows, tables.gather(rows, shapes, tensors))
    for tensor, array in back.items():
        np.testing.assert_array_equal(array, tensors[tensor], err_msg=tensor)
    if name in PAIRS:  # all of a pair is computed
        assert back.keys() == tensors.keys()


def test_pixels_beyond_the_last_whole_patch_are_dropped_and_their_number_is_given_back(tmp_path):
    golden = goldens.read("clip_vision")
    source = goldens.publish(
        golden._replace(config=golden.config | {"image_size": 13}), tmp_path / "source"
    )
    stored = conversion.import_folder(source, tmp_path / "model")
    pixels = golden.inputs["pixel_values"]
    wider = np.pad(pixels, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=9.0)
    found = checking.run(stored, {"pixel_values": wider})["last_hidden_state"]
    wanted = golden.outputs["last_hidden_state"]
    assert goldens.relative_error(found, wanted, {}) <= 1e-4
    conversion.export_folder(stored, tmp_path / "exported")
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["image_size"] == 13 and stored.model.encoder.image_size == 12


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("clip", {"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id"),
        ("clip", {"text_config": {"hidden_act": "mish"}}, "mish"),
        ("siglip", {"vision_config": {"vision_use_head": False}}, "vision_use_head"),
        ("siglip2", {"text_config": {"attention_dropout": 0.1}}, "attention_dropout"),
        ("dinov2", {"layerscale_value": 0.0}, "layerscale_value of config.json is 0.0"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(name, config, message):
    with pytest.raises(ConfigError, match=message):
        registry.family(name).read(config)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Model(published("clip-b32"), text=text.PUBLISHED["clip-b32"]), "image_pool"),
        (Model(published("clip-b32"), text=text.PUBLISHED["siglip-b16"]), "image_pool"),
        (Model(published("siglip-l16-256", pool="map"), text=text.PUBLISHED["siglip-b16"]), "out"),
        (Model(text=text.PUBLISHED["siglip-b16"]), "encoder"),
        (Model(published("siglip-b16", pool="class")), "pool"),
    ],
)
def test_pairs_that_contradict_themselves_are_refused_by_name(model, named):
    with pytest.raises(ConfigError, match=named):
        check_model(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", {"input_ids": np.zeros((3, 10), int)}, "attention_mask has shape"),
        (
            "clip",
            {"input_ids": np.zeros((3, 10), int), "attention_mask": np.ones((3, 10))},
            "10 long; the model takes 9",
        ),
        ("clip", {"pixel_values": np.zeros((2, 3, 16, 12))}, "takes .12, 12"),
        ("clip", {"spatial_shapes": np.zeros((2, 2))}, "spatial_shapes are not taken"),
        ("siglip2", {"pixel_attention_mask": np.ones((3, 5))}, "mask of pictures"),
        ("clip", {"input_ids": np.full((3, 7), 23)}, "input_ids reach 23; the model has 23"),
        (
            "siglip2_vision",
            {"spatial_shapes": np.full((3, 2), 5)},
            "spatial_shapes are .*most the 17",
        ),
        ("siglip2_vision", {"spatial_shapes": np.zeros((3, 2), int)}, "spatial_shapes are"),
        ("pix2struct_vision", {"attention_mask": np.ones((3, 17))}, "row or column 0"),
        (
            "pix2struct_vision",
            {"flattened_patches": np.full((3, 17, 50), 9.0)},
            "9 to 9; expected .* to 8",
        ),
        ("idefics2_vision", {"patch_attention_mask": np.ones((3, 2, 2))}, "patch_attention_mask"),
        # transformers takes a place for the row of the mask that it is in, or for none.
        (
            "idefics2_vision",
            {"patch_attention_mask": np.tile(np.arange(7) != 1, (3, 5, 1))},
            "holes",
        ),
        ("sam_vision", {"pixel_values": np.zeros((2, 3, 16, 20))}, "takes .20, 20"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(name, change, message, tmp_path):
    golden = goldens.read(name)
    source = goldens.publish(golden, tmp_path / "source")
    stored = conversion.import_folder(source, tmp_path / "model")
    with pytest.raises((ConfigError, DataError), match=message):
        checking.run(stored, golden.inputs | change)


def test_losses_of_pairs_are_those_of_their_papers():
    x = np.random.default_rng(0).normal(size=(5, 5)) * 3
    share = lambda axis: np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)  # noqa: E731
    wanted = -np.mean([np.log(np.diag(share(axis))).mean() for axis in (0, 1)])
    np.testing.assert_allclose(objectives.softmax_pairs(x.astype(np.float32)), wanted, rtol=1e-5)
    signs = np.where(np.eye(5, dtype=bool), 1, -1)
    wanted = np.log1p(np.exp(-signs * x)).sum() / 5
    np.testing.assert_allclose(objectives.sigmoid_pairs(x.astype(np.float32)), wanted, rtol=1e-5)
