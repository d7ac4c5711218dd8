"""Sizes against published parameter counts, and parameters as flat dicts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import MODEL, model, weights

from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets import decoders, encoders
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import vit

LINEAR = Connector("linear")


def count(model: Model, tower: str) -> int:
    """Parameters of one tower."""
    return sum(
        math.prod(leaf.shape)
        for path, leaf in params.abstract(model).items()
        if path.startswith(tower + "/")
    )


# Millions of parameters without a head, at the decimals that are published: Zhai et al. 2022
# ("Scaling vision transformers", table 2) and Alabdulmohsin et al. 2023 for the optimised shapes,
# counted at the patch and image size that they trained at.
TRUNKS = [
    ("Ti/16", 224, "5.52"),
    ("S/16", 224, "21.66"),
    ("M/16", 224, "38.32"),
    ("B/16", 224, "85.80"),
    ("L/14", 224, "303.2"),
    ("So400m/14", 224, "412.4"),
    ("H/14", 224, "630.8"),
    ("g/14", 224, "1011.2"),
    ("g-opt/16", 256, "1134.8"),
    ("G/14", 224, "1842.8"),
    ("G-opt/16", 256, "1663.6"),
    ("e/14", 224, "3805.4"),
]

# With the attention-pooling head: OpenCLIP's counts of SigLIP's image towers.
POOLED = [
    ("B/16", 224, "92.88"),
    ("L/16", 256, "315.96"),
    ("So400m/14", 224, "427.68"),
    ("So400m/14", 378, "428.23"),
    ("g-opt/16", 256, "1163.2"),
]


@pytest.mark.parametrize("pool, rows", [("none", TRUNKS), ("map", POOLED)])
def test_encoders_have_the_published_number_of_parameters(pool, rows):
    for name, size, millions in rows:
        encoder = vit(name, image_size=size, pool=pool)
        found = count(Model(encoder, LINEAR, decoder("1m")), "encoder") / 1e6
        decimals = len(millions.partition(".")[2])
        assert f"{found:.{decimals}f}" == millions, (name, size)


def test_every_row_of_the_encoder_table_has_a_published_count():
    assert {name.partition("/")[0] for name, _, _ in TRUNKS} == encoders.SIZES.keys() - {"mu"}


# Totals of the checkpoints, as their safetensors hold them.
@pytest.mark.parametrize(
    "name, total",
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama1-7b", 6_738_415_616),
        ("llama1-13b", 13_015_864_320),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("gemma-2b", 2_506_172_416),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma3-1b", 999_885_952),
        # 4,300,079,472 less its vision tower (416,866,032) and projector (2,950,272)
        ("gemma3-4b", 3_880_263_168),
        ("opt-2.7b", 2_651_596_800),
        ("opt-6.7b", 6_658_473_984),
        ("mpt-7b", 6_649_286_656),
        ("redpajama-3b", 2_775_864_320),
    ],
)
def test_decoders_have_the_published_number_of_parameters(name, total):
    assert count(Model(vit("mu/16"), LINEAR, decoder(name)), "decoder") == total


@pytest.mark.parametrize(
    "model",
    [
        *(Model(vit(f"{size}/16", pool="map"), LINEAR, decoder("1m")) for size in encoders.SIZES),
        *(Model(vit("mu/16"), LINEAR, decoder(name)) for name in decoders.SIZES),
        Model(vit("mu/16", position="sincos2d"), Connector("mlp", layers=3), decoder("1m")),
        Model(vit("mu/16"), Connector("perceiver", width=96), decoder("1m")),
        model(stem="conv"),
    ],
)
def test_every_parameter_of_every_preset_has_logical_axes_of_its_rank(model):
    for path, leaf in params.abstract(model).items():
        axes = params.axes(path)
        assert len(axes) == len(leaf.shape), path
        assert (axes[0] == "layers") == ("/stack/blocks/" in path), path
        assert leaf.dtype == jnp.float32, path


def test_a_parameter_without_logical_axes_is_an_error_that_names_it():
    with pytest.raises(KeyError, match="encoder/unheard_of"):
        params.axes("encoder/unheard_of")


def test_init_makes_what_abstract_says():
    made = jax.eval_shape(lambda key: params.init(MODEL, key), jax.random.key(0))
    assert made == params.abstract(MODEL)


def test_no_two_random_leaves_or_layers_start_alike():
    seen = {}
    for path, leaf in params.init(MODEL, jax.random.key(0)).items():
        layers = leaf if "/stack/blocks/" in path else leaf[None]
        for layer in np.asarray(layers):
            if np.ptp(layer) > 0:
                start = tuple((layer.ravel() / np.abs(layer).max())[:4])
                assert start not in seen, (path, seen[start])
                seen[start] = path
    assert len(seen) > 20


def test_building_over_flat_leaves_gives_them_back():
    flat = weights(MODEL)
    leaves = jax.tree.leaves(params.build(MODEL, flat))
    assert len(leaves) == len(flat)
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in flat.values()}
    again = params.build(MODEL, {path: flat[path] for path in sorted(flat, reverse=True)})
    np.testing.assert_array_equal(again.encoder.positions[...], flat["encoder/positions"])
    np.testing.assert_array_equal(
        again.decoder.stack.blocks.mlp.down.kernel[...],
        flat["decoder/stack/blocks/mlp/down/kernel"],
    )


def test_missing_and_extra_leaves_are_named():
    flat = weights(MODEL)
    del flat["decoder/norm/scale"]
    flat["decoder/surplus"] = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"missing.*decoder/norm/scale.*extra.*decoder/surplus"):
        params.build(MODEL, flat)


def test_a_leaf_of_another_shape_is_refused_with_both_shapes():
    flat = weights(MODEL)
    flat["encoder/positions"] = flat["encoder/positions"][:1]  # would broadcast silently
    with pytest.raises(ValueError, match=r"encoder/positions.*\(1, 12\).*\(4, 12\)"):
        params.build(MODEL, flat)
