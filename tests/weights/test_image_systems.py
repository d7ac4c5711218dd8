"""Systems with tiles, prefixes and pictures of their own sizes: configs, sizes, where tokens stand.

What they compute is compared with transformers in test_goldens.py and test_parity.py.
"""

import dataclasses
import math
import re
import types

import goldens
import numpy as np
import pytest

from vlm_jax.config import check_model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.presets import anyres
from vlm_jax.weights import inputs, registry, tables
from vlm_jax.weights.families import idefics2, idefics3, llava, llava_next, paligemma

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
# Fields of published config.json files that decide shapes, and how many parameters they have.
PUBLISHED = {
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        {
            "model_type": "llava_next",
            "vision_config": CLIP,
            "text_config": {
                "model_type": "mistral",
                "intermediate_size": 14_336,
                "num_key_value_heads": 8,
                "rope_theta": 1e6,
                "sliding_window": None,
                "vocab_size": 32_064,
            },
        },
        7.57e9,
    ),
    "google/paligemma-3b-pt-224": (
        {
            "model_type": "paligemma",
            "image_token_index": 257_152,
            "projection_dim": 2048,
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 16_384,
                "model_type": "gemma",
                "num_attention_heads": 8,
                "num_hidden_layers": 18,
                "num_key_value_heads": 1,
                "vocab_size": 257_216,
            },
            "vision_config": SO400M | {"image_size": 224, "vision_use_head": False},
        },
        2.92e9,
    ),
    "google/paligemma2-3b-pt-448": (
        {
            "model_type": "paligemma",
            "projection_dim": 2304,
            "text_config": {
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "model_type": "gemma2",
                "num_attention_heads": 8,
                "num_hidden_layers": 26,
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "vocab_size": 257_216,
            },
            "vision_config": SO400M | {"image_size": 448, "vision_use_head": False},
        },
        3.03e9,
    ),
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": SO400M | {"image_size": 896, "vision_use_head": False},
        },
        4.30e9,
    ),
    "HuggingFaceM4/idefics2-8b": (
        {
            "model_type": "idefics2",
            "perceiver_config": {"model_type": "idefics2"},
            "text_config": {"model_type": "mistral", "rms_norm_eps": 1e-5, "vocab_size": 32_003},
            "vision_config": SO400M | {"image_size": 980, "model_type": "idefics2"},
        },
        8.40e9,
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": (
        {
            "model_type": "idefics3",
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "model_type": "llama",
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 8,
                "rope_theta": 500_000.0,
                "vocab_size": 128_259,
            },
            "vision_config": SO400M | {"image_size": 364, "model_type": "idefics3"},
        },
        8.46e9,
    ),
    "HuggingFaceTB/SmolVLM-Instruct": (
        {
            "model_type": "idefics3",
            "scale_factor": 3,
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "model_type": "llama",
                "num_attention_heads": 32,
                "num_hidden_layers": 24,
                "num_key_value_heads": 32,
                "vocab_size": 49_155,
            },
            "vision_config": SO400M | {"image_size": 384, "model_type": "idefics3"},
        },
        2.25e9,
    ),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": (
        {
            "model_type": "smolvlm",
            "scale_factor": 4,
            "text_config": {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "model_type": "llama",
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                "vocab_size": 49_280,
            },
            "vision_config": {
                "hidden_size": 768,
                "image_size": 512,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "num_hidden_layers": 12,
                "patch_size": 16,
            },
        },
        256e6,
    ),
}
GOLDENS = (
    "llava_next", "paligemma", "paligemma2", "gemma3", "idefics2", "idefics3", "smolvlm",
)  # fmt: skip


def system(hf: dict):
    """The family and the model of a config.json."""
    known = registry.family(hf["model_type"])
    return known, known.read(hf)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_as_many_parameters_and_a_row_for_each(name):
    hf, published = PUBLISHED[name]
    known, model = system(hf)
    check_model(model)
    assert known.read(known.write(model)) == model
    leaves = params.abstract(model)
    assert {row.ours for row in known.rows(model)} >= leaves.keys()
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    # Of CLIP's 24 blocks the last is carried, and its last norm.
    carried = 12_596_224 + 2 * 1024 if hf["model_type"] == "llava_next" else 0
    digits = 10 ** (math.floor(math.log10(published)) - 2)
    assert abs(count + carried - published) <= 0.5001 * digits, f"{count + carried:,}"


@pytest.mark.parametrize("name", GOLDENS)
def test_tensors_come_back_bit_for_bit(name):
    golden = goldens.read(name)
    known, model = system(golden.config)
    tensors = dict(golden.tensors)
    for pattern, replacement in known.renames(model):
        tensors = {re.sub(pattern, replacement, name): x for name, x in tensors.items()}
    shapes = {path: leaf.shape for path, leaf in params.abstract(model).items()}
    rows = known.rows(model)
    assert tables.uncovered(rows, shapes, tensors, known.carried(model)) == ([], [])
    again = tables.scatter(rows, tables.gather(rows, shapes, tensors))
    for found, tensor in again.items():
        np.testing.assert_array_equal(tensor, tensors[found])


@pytest.mark.parametrize("name", GOLDENS)
def test_no_position_looks_up_a_visual_token_of_an_empty_slot_or_of_padding(name):
    golden = goldens.read(name)
    known, model = system(golden.config)
    model = known.fitted(model, golden.inputs)
    batch = known.inputs(model, golden.config, golden.inputs).batch
    assert batch.images.grids.shape[1] > 1
    empty = (batch.images.grids == 0).all(axis=-1)
    assert empty.any()
    row, at = np.nonzero(batch.visual_index >= 0)
    assert not empty[row, batch.visual_index[row, at] // model.visual_tokens].any()
    # The row of text alone looks up none.
    assert (batch.visual_index[2] == -1).all() and (batch.visual_index[:2] >= 0).any(axis=1).all()


def test_tiles_put_together_give_the_picture_without_its_padding():
    """A picture whose features are numbered as it is read, cut into tiles by hand."""
    rows, columns, down, across = 3, 2, 2, 3
    whole = np.arange(down * rows * across * columns).reshape(down * rows, across * columns)
    tiles = [np.full((rows, columns), -9)]
    for i in range(down):
        for j in range(across):
            tiles.append(whole[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns])
    # Each tile's features, then its newline.
    visual = np.concatenate([[*tile.ravel(), -1] for tile in tiles])
    order = anyres.visual_tokens((2, 6), (down, across), (rows, columns))
    found = visual[order]
    assert found[: rows * columns].tolist() == [-9] * (rows * columns)
    # Of six rows a picture three times as wide as high fills the middle two.
    lines = found[rows * columns :].reshape(2, -1)
    np.testing.assert_array_equal(lines[:, :-1], whole[2:4])
    assert (lines[:, -1] == -1).all()


@pytest.mark.slow
def test_any_size_stands_as_transformers_packs_it():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.models.llava_next.modeling_llava_next
    side, grid, rng = 336, 24, np.random.default_rng(0)
    pinpoints = [list(size) for size in llava_next.RESOLUTIONS]
    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(image_size=side, patch_size=14),
        image_grid_pinpoints=pinpoints,
    )
    for size in rng.integers(1, 1500, (300, 2)).tolist():
        tiles = anyres.tiling(size, pinpoints, side)
        assert theirs.get_anyres_image_grid_shape(size, pinpoints, side) == tiles
        count = 1 + math.prod(tiles)
        assert theirs.image_size_to_num_patches(size, pinpoints, side) == count
        visual = torch.arange(count * (grid**2 + 1)).reshape(count, -1)
        packed, _ = transformers.LlavaNextModel.pack_image_features(
            types.SimpleNamespace(config=config),
            [visual[:, :-1, None]],
            [size],
            "default",
            visual[0, -1:],
        )
        order = anyres.visual_tokens(size, tiles, (grid, grid))
        np.testing.assert_array_equal(packed[0][:, 0].numpy(), order)


def changed(name: str, **fields) -> dict:
    """A published config.json with other fields."""
    return PUBLISHED[name][0] | fields


NEXT, PALI, IDEFICS2 = (
    "llava-hf/llava-v1.6-mistral-7b-hf",
    "google/paligemma-3b-pt-224",
    "HuggingFaceM4/idefics2-8b",
)


@pytest.mark.parametrize(
    ("family", "hf", "message"),
    [
        (llava, changed(NEXT, vision_config={"model_type": "siglip_vision_model"}), "'default'"),
        (llava_next, changed(NEXT, vision_feature_select_strategy="full"), "class token"),
        (llava_next, changed(NEXT, vision_feature_layer=[-2, None]), "vision_feature_layer"),
        (paligemma, changed(PALI, vision_config=CLIP), "model_type is 'clip_vision_model'"),
        (paligemma, changed(PALI, projection_dim=7), "projection_dim is 7"),
        (idefics2, changed(IDEFICS2, text_config={"model_type": "t5"}), "'t5'"),
        (
            idefics2,
            changed(IDEFICS2, perceiver_config={"attention_dropout": 0.1}),
            "attention_dropout is 0.1",
        ),
    ],
)
def test_what_no_preset_says_is_refused_by_name(family, hf, message):
    with pytest.raises(ConfigError, match=message):
        family.read(hf)


def test_one_field_for_both_decoder_and_connector_cannot_say_two_things():
    model = idefics2.read(PUBLISHED[IDEFICS2][0])
    decoder = dataclasses.replace(model.decoder, mlp=7)
    with pytest.raises(ConfigError, match="intermediate_size of the decoder is 7"):
        idefics2.write(dataclasses.replace(model, decoder=decoder))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava_next", {"image_sizes": np.ones((2, 2), int)}, "2 image_sizes"),
        ("llava_next", {"pixel_values": np.ones((3, 2, 3, 6, 6))}, "has 2 tiles; expected"),
        ("llava_next", {"image_sizes": np.full((3, 2), 6)}, "placeholders"),
        ("paligemma", {"token_type_ids": np.ones((1, 2), int)}, "token_type_ids have shape"),
        ("idefics2", {"pixel_attention_mask": np.ones((3, 2, 4, 4))}, "pixel_attention_mask has"),
        ("idefics2", {"pixel_attention_mask": np.zeros((3, 2, 13, 8))}, "leaves no patch"),
        ("idefics2", {"pixel_values": np.ones((3, 2, 3, 1, 8))}, "smaller than a patch"),
        ("idefics3", {"pixel_values": np.ones((3, 2, 3, 12, 6))}, "takes squares"),
        ("smolvlm", {"pixel_values": np.ones((3, 2, 3, 8, 8))}, "placeholders"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, changes, message):
    golden = goldens.read(name)
    known, model = system(golden.config)
    arrays = golden.inputs | changes
    with pytest.raises(DataError, match=message):
        known.inputs(known.fitted(model, arrays), golden.config, arrays)


def test_a_grid_that_the_connector_cannot_shuffle_is_refused():
    golden = goldens.read("idefics3")
    _, model = system(golden.config)
    with pytest.raises(ConfigError, match="factor"):
        idefics3.fitted(model, {"pixel_values": np.ones((1, 1, 3, 8, 8))})


def test_placeholders_of_a_row_are_those_of_whole_pictures():
    golden = goldens.read("paligemma")
    known, model = system(golden.config)
    ids = golden.inputs["input_ids"].copy()
    token = golden.config["image_token_index"]
    first, second = (np.flatnonzero(row == token)[0] for row in ids[:2])
    # As many in all, but a picture would be cut between two rows.
    ids[0, first], ids[1, second - 1] = 5, token
    with pytest.raises(DataError, match="placeholders"):
        known.inputs(model, golden.config, golden.inputs | {"input_ids": ids})


def test_a_patch_at_the_edge_counts_as_the_system_says():
    _, model = system(goldens.read("idefics2").config)
    mask = np.zeros((1, 1, 8, 8))
    mask[:, :, :5, :6] = 1
    arrays = {"pixel_values": np.ones((1, 1, 3, 8, 8)), "pixel_attention_mask": mask}
    encoder = idefics2.fitted(model, arrays).encoder
    found = {whole: inputs.padded_pictures(encoder, arrays, whole) for whole in (True, False)}
    assert found[True].grids.tolist() == [[[2, 3]]]
    assert found[False].grids.tolist() == [[[3, 3]]]


@pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])
@pytest.mark.parametrize(("said", "eps"), [(None, 1e-5), ({}, 1e-6)])
def test_a_text_config_that_is_left_out_is_not_an_empty_one(name, said, eps):
    model = registry.family(name).read({"model_type": name, "text_config": said})
    assert model.decoder.norm_eps == eps


def test_a_paligemma_whose_parts_are_left_out():
    model = paligemma.read({"model_type": "paligemma"})
    assert (model.decoder.width, model.decoder.kv_heads, model.decoder.vocab) == (2048, 1, 257_152)
    assert (model.encoder.width, model.encoder.depth, model.encoder.mlp) == (1152, 27, 4096)


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "idefics2", "idefics3"])
def test_only_paligemma_caps_logits(name):
    text = {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}
    small = {"image_size": 32, "patch_size": 2, "hidden_size": 48, "num_attention_heads": 4}
    config = {"text_config": text, "vision_config": small, "vision_feature_layer": -1}
    assert registry.family(name).read(config).decoder.logit_cap == 0


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "blip_2"])
def test_the_newer_name_of_the_placeholder_wins(name):
    golden = goldens.read(name)
    token = golden.config["image_token_index"]
    config = golden.config | {"image_token_index": 7, "image_token_id": token}
    known = registry.family(config["model_type"])
    prompts = known.inputs(known.read(config), config, golden.inputs)
    assert ((prompts.batch.visual_index >= 0) == (prompts.batch.tokens == token)).all()


@pytest.mark.parametrize("layers", [[], "last", [1.5], [-9, -1]])
def test_feature_layers_that_are_none(layers):
    config = {"vision_feature_layer": layers, "vision_config": CLIP | {"num_hidden_layers": 3}}
    with pytest.raises(ConfigError, match=r"vision_feature_layer|taps"):
        check_model(llava.read(config))
