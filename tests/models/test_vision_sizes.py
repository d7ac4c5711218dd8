"""Published vision towers against the published numbers of their parameters."""

import dataclasses
import math

import pytest
from handmade import MODEL

from vlm_jax import config, schema
from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.presets.encoder_sizes import PUBLISHED, published


def count(encoder) -> int:
    """Parameters of a tower."""
    return sum(math.prod(leaf.shape) for leaf in params.abstract(Model(encoder)).values())


# Millions of parameters of OpenCLIP's image towers (docs/model_profile.csv of its repository). They
# have the norm after the last block, and a projection to the width of texts: without a bias in
# OpenCLIP's own, with one in timm's.
IMAGE_TOWERS = [
    ("clip-b32", 512, 0, "87.85"),
    ("clip-b16", 512, 0, "86.19"),
    ("clip-l14", 768, 0, "303.97"),
    ("clip-l14-336", 768, 0, "304.29"),
    ("openclip-b32", 512, 0, "87.85"),
    ("openclip-b16", 512, 0, "86.19"),
    ("openclip-l14", 768, 0, "303.97"),
    ("openclip-h14", 1024, 0, "632.08"),
    ("openclip-g14", 1024, 0, "1012.65"),
    ("openclip-bigg14", 1280, 0, "1844.91"),
    ("eva-clip-g14", 1024, 1, "1012.59"),
    ("eva02-clip-l14", 768, 1, "304.11"),
]


@pytest.mark.parametrize("name, width, bias, millions", IMAGE_TOWERS)
def test_image_towers_have_the_published_number_of_parameters(name, width, bias, millions):
    encoder = published(name, final_norm=True)
    projection = encoder.width * width + bias * width
    assert f"{(count(encoder) + projection) / 1e6:.2f}" == millions


# Millions, rounded as DINOv2's model card does.
ROUNDED = [
    ("dinov2-s14", 21, 1.1),
    ("dinov2-b14", 86, 1.0),
    ("dinov2-l14", 300, 5.0),
    ("dinov2-g14", 1100, 50.0),
]


@pytest.mark.parametrize("name, millions, within", ROUNDED)
def test_towers_have_about_the_published_number_of_parameters(name, millions, within):
    assert abs(count(published(name)) / 1e6 - millions) <= within


def test_eva02_e_has_the_4_4_billion_parameters_of_its_paper():
    encoder = published("eva02-clip-e14")
    assert f"{(count(encoder) + (encoder.width + 1) * 1024) / 1e9:.1f}" == "4.4"


def test_blip2s_tower_is_evas_without_its_last_block():
    block = sum(
        math.prod(leaf.shape[1:])
        for path, leaf in params.abstract(Model(published("eva-clip-g14"))).items()
        if "/stack/" in path
    )
    assert count(published("eva-clip-g14")) - count(published("blip2-g14")) == block


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_of_the_table_holds_together_and_has_logical_axes(name):
    config.check_model(Model(published(name)))
    for path, leaf in params.abstract(Model(published(name))).items():
        assert len(params.axes(path)) == len(leaf.shape), path


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"clip-b64.*clip-b32"):
        published("clip-b64")


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("clip-b32", "layer", -13),
        ("clip-b32", "layer", 0),
        ("siglip-b16", "keep_class", True),
        ("clip-b32", "unbiased", ("patches",)),
        ("clip-b32", "position_grid", (7,)),
        ("clip-b32", "position_resize", "nearest"),
        ("eva02-clip-l14", "head_dim", 66),
        ("pix2struct-base", "position_grid", (2048, 4096)),
        ("siglip2-naflex-b16", "position", "sincos2d"),
    ],
)
def test_fields_that_contradict_others_are_refused_by_name(name, field, value):
    # 66 is no multiple of 4: what is wrong is that heads of that width are to be rotated.
    named = "rotary_grid" if field == "head_dim" else field
    with pytest.raises(ConfigError, match=rf"model.encoder.{named} "):
        config.check_model(Model(published(name, **{field: value})))


def with_encoder(encoder) -> config.Config:
    """A config of a perceiver over that encoder."""
    model = dataclasses.replace(MODEL, encoder=encoder)
    return config.Config("any", model, config.Data({"emoji:caption": 1.0}))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "pix2struct" not in name])
def test_a_config_holds_any_of_them_and_is_read_back(name):
    wanted = with_encoder(published(name))
    assert config.resolve(schema.plain(wanted)) == wanted


def test_a_grid_that_the_data_cannot_make_is_refused():
    with pytest.raises(ConfigError, match=r"model.encoder.max_patches is 2048; expected 0 or 2025"):
        config.check(with_encoder(published("pix2struct-base")))
