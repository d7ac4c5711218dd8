"""Tables of names of systems with cross-attention: whole, invertible, of the published sizes."""

import dataclasses
import math

import numpy as np
import pytest

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.presets.decoders import Decoder, decoder
from vlm_jax.presets.fusion import CrossAttention, cross_attention
from vlm_jax.weights import tables
from vlm_jax.weights.families import idefics_text, open_flamingo

# idefics-9b's config.json, as far as the language model goes.
IDEFICS_9B = {
    "model_type": "idefics",
    "additional_vocab_size": 2,
    "alpha_initializer": "zeros",
    "alpha_type": "float",
    "cross_layer_interval": 4,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "qk_layer_norms": True,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32_000,
    "vision_config": {"embed_dim": 1280},
}
SIZES = 14, 3, 3, 4
PAIRS = [
    (decoder("llama1-7b", added=2), cross_attention("idefics-9b")),
    (
        Decoder(19, 12, 4, *SIZES, norm_eps=1e-2, rope_theta=50.0, activation="gelu", tied=True),
        CrossAttention(*SIZES, norm_eps=1e-2, activation="gelu", every=2, width=7, gate="vector"),
    ),
    (
        Decoder(19, 12, 4, *SIZES, norm_eps=1e-6, added=3),
        CrossAttention(*SIZES, every=1, width=7, qk_norm=True),
    ),
]


def shapes(decoder: Decoder, fusion: CrossAttention) -> dict[str, tuple[int, ...]]:
    """Of our leaves, by their paths below the decoder."""
    leaves = params.abstract(Model(decoder=decoder, fusion=fusion))
    return {path.removeprefix("decoder/"): leaf.shape for path, leaf in leaves.items()}


def test_the_published_config_is_a_row_of_the_tables():
    assert idefics_text.read(IDEFICS_9B) == PAIRS[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_config_json_comes_back(pair):
    assert idefics_text.read(idefics_text.write(*pair)) == pair


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross_layer_interval": 5}, "cross_layer_interval .* 5; expected a divisor of 32"),
        ({"hidden_act": "quick_gelu"}, "hidden_act .* 'quick_gelu'; expected one of silu"),
        ({"alpha_type": "matrix"}, "alpha_type .* 'matrix'; expected one of float, vector"),
        ({"dropout": 0.1}, "dropout .* 0.1; expected 0"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling .* expected none"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type .* 'yarn'"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        idefics_text.read(IDEFICS_9B | change)


@pytest.mark.parametrize(
    "fields, message",
    [({"qkv_bias": True}, "qkv_bias .* True"), ({"norm": "layer"}, "norm .* 'layer'")],
)
def test_presets_that_no_idefics_has_are_not_written(fields, message):
    language, fusion = PAIRS[1]
    with pytest.raises(ConfigError, match=message):
        idefics_text.write(dataclasses.replace(language, **fields), fusion)


@pytest.mark.parametrize("pair", PAIRS[1:])
def test_idefics_weights_go_out_as_they_came_in(pair):
    assert_inverse(idefics_text.rows(*pair), shapes(*pair))


@pytest.mark.parametrize("start, every", [(0, 1), (1, 2)])
def test_open_flamingo_weights_go_out_as_they_came_in(start, every):
    language = Decoder(19, 12, 4, 48, 3, 3, 4)
    fusion = dataclasses.replace(
        cross_attention("open-flamingo-9b"), mlp=48, width=7, start=start, every=every
    )
    cross = {p: shape for p, shape in shapes(language, fusion).items() if p.startswith("cross/")}
    rows = open_flamingo.rows(fusion, open_flamingo.LAYERS["gpt_neox"])
    assert_inverse(rows, cross)
    names = {name for row in rows for name in row.names(len(fusion.places(4)))}
    assert f"lang_encoder.gpt_neox.layers.{start + every}.gated_cross_attn_layer.ff_gate" in names


def assert_inverse(rows: list, shapes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    leaves = {p: rng.normal(size=shape).astype(np.float32) for p, shape in shapes.items()}
    theirs = tables.scatter(rows, leaves)
    assert tables.uncovered(rows, shapes, theirs) == ([], [])
    again = tables.gather(rows, shapes, theirs)
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf)
    back = tables.scatter(rows, again)
    assert all(np.array_equal(back[name], array) for name, array in theirs.items())


def test_idefics_9b_has_the_published_number_of_parameters():
    ours = sum(math.prod(shape) for shape in shapes(*PAIRS[0]).values())
    # 8,929,682,192 in its safetensors, less the vision tower, the resampler, and the rotary
    # frequencies that they hold for 32 layers and 8 blocks.
    assert ours == 8_929_682_192 - 630_766_080 - 125_961_984 - 40 * 64


@pytest.mark.slow
def test_idefics_9b_has_the_names_and_sizes_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    perceiver = {
        "use_resampler": True,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "qk_layer_norms_perceiver": True,
    }
    config = transformers.IdeficsConfig(
        **idefics_text.write(*PAIRS[0]), use_resampler=True, perceiver_config=perceiver
    )
    with torch.device("meta"):
        state = transformers.IdeficsForVisionText2Text(config).state_dict()
    rows, found = idefics_text.rows(*PAIRS[0]), shapes(*PAIRS[0])
    others = (r"model\.(vision_model|perceiver_resampler)\..*",)
    assert tables.uncovered(rows, found, state, idefics_text.CARRIED + others) == ([], [])
    sizes = {name: math.prod(tensor.shape) for name, tensor in state.items()}
    for row in rows:
        shape = found[row.ours]
        for name in row.names(tables.layers_of(row.ours, shape)):
            layer = shape[1:] if "{}" in row.theirs else shape
            assert sizes[name] == math.prod(layer), name
    count = lambda part: sum(size for name, size in sizes.items() if part in name)  # noqa: E731
    assert (count(".vision_model."), count(".perceiver_resampler.")) == (630_766_080, 125_961_984)
