"""Convolutional and windowed encoders against what torch computed (see make_convnet_goldens.py)."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convnet_cases import GOLDENS, Case, cotangent, leaves, pixels, run, shapes, weights

from vlm_jax import config, schema
from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import convnet, params, sam
from vlm_jax.presets import convnets
from vlm_jax.presets import sam as sams
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.weights import tables
from vlm_jax.weights.families import convnext, efficientnet_lite, sam_vision_model

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"


def golden(name: str) -> tuple[Case, np.ndarray, dict[str, np.ndarray], list[str]]:
    """A case, their output, gradients by name and all names."""
    with np.load(FOLDER / f"convnets_{name}.npz") as file:
        arrays = dict(file)
    gradients = {
        name.removeprefix("gradients/"): array
        for name, array in arrays.items()
        if name.startswith("gradients/")
    }
    return GOLDENS[name], arrays["output"], gradients, arrays["names"].tolist()


def relative(ours, theirs, floor: float = 0.0) -> float:
    """Relative error; where theirs is smaller than `floor`, relative to that."""
    error = np.linalg.norm(np.asarray(ours) - theirs)
    return error / max(np.linalg.norm(theirs), floor)


def assert_equal(case: Case, output: np.ndarray, gradients: dict[str, np.ndarray]) -> None:
    """Our output and every gradient within 1e-4 of theirs."""
    x, compared = pixels(case), weights(case)

    def weighted(compared):
        found = run(case, compared, x)
        return (found * cotangent(output.shape)).sum(), found

    ours, found = jax.jit(jax.grad(weighted, has_aux=True))(compared)
    assert relative(found, output) < 1e-4
    rows = [row for row in case.family.rows(case.preset) if row.ours in compared]
    # Statistics of batch norms have no gradient in either.
    statistics = {path for path in compared if path.endswith(("/mean", "/variance"))}
    assert not any(np.any(ours[path]) for path in statistics)
    theirs = tables.gather(
        [row for row in rows if row.ours not in statistics], shapes(case.preset), gradients
    )
    assert theirs.keys() == compared.keys() - statistics
    # A softmax does not feel its key bias, whose gradients are rounding errors of 0.
    floor = 1e-3 * max(np.linalg.norm(gradient) for gradient in theirs.values())
    for path, gradient in theirs.items():
        assert relative(ours[path], gradient, floor) < 1e-4, path


@pytest.mark.parametrize("name", GOLDENS)
def test_outputs_and_gradients_equal_those_of_torch(name):
    case, output, gradients, _ = golden(name)
    assert_equal(case, output, gradients)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_table_covers_all_leaves_and_all_tensors_and_is_its_own_inverse(name):
    case, _, _, names = golden(name)
    rows, compared = case.family.rows(case.preset), weights(case)
    assert tables.uncovered(rows, shapes(case.preset), names, case.family.CARRIED) == ([], [])
    named = tables.scatter(rows, compared)
    assert named.keys() <= set(names)
    again = leaves(case, named)
    assert again.keys() == compared.keys()
    for path, leaf in compared.items():
        np.testing.assert_array_equal(again[path], leaf)


def test_only_what_is_not_computed_is_carried():
    # With every stage tapped and a head, nothing of their trunks is left to carry.
    for name in ("convnextv2", "efficientnet_head", "sam"):
        case, _, _, names = golden(name)
        left = tables.uncovered(case.family.rows(case.preset), shapes(case.preset), names)[1]
        assert [name for name in left if not name.endswith("num_batches_tracked")] == []


def test_stages_after_the_last_tap_have_no_parameters_and_are_carried():
    case, _, _, names = golden("convnext_taps")
    early = dataclasses.replace(case.preset, taps=(0,), resize_to=None)
    found = shapes(early)
    assert not [path for path in found if path.startswith(("stages/1", "stages/2"))]
    _, left = tables.uncovered(convnext.rows(early), found, names)
    assert [n for n in left if n.startswith("convnext.encoder.stages.2")]
    assert tables.uncovered(convnext.rows(early), found, names, convnext.CARRIED) == ([], [])


def test_timms_names_hold_the_same_leaves():
    case = GOLDENS["convnextv2"]
    compared = weights(case)
    rows = convnext.rows_timm(case.preset)
    named = tables.scatter(rows, compared)
    # Names and shapes as timm 1.0 has them.
    wanted = {
        "stem.0.weight": (4, 3, 4, 4),
        "stem.1.bias": (4,),
        "stages.0.blocks.0.conv_dw.weight": (4, 1, 7, 7),
        "stages.1.downsample.0.weight": (4,),
        "stages.1.downsample.1.weight": (6, 4, 2, 2),
        "stages.1.blocks.1.mlp.fc1.weight": (24, 6),
        "stages.1.blocks.1.mlp.fc2.bias": (6,),
        "stages.1.blocks.1.mlp.grn.weight": (24,),
        "stages.1.blocks.0.norm.weight": (6,),
        "head.norm.weight": (6,),
        "head.fc.weight": (7, 6),
    }
    assert {name: named[name].shape for name in wanted} == wanted
    again = tables.gather(rows, shapes(case.preset), named)
    assert again.keys() == compared.keys()
    for path, leaf in compared.items():
        np.testing.assert_array_equal(again[path], leaf)


# Configs speak of sizes, not of our choice of features, number format and normalisation.
@pytest.mark.parametrize(
    "family, preset",
    [
        (convnext, dataclasses.replace(GOLDENS["convnext_taps"].preset, taps=(-1,))),
        (convnext, dataclasses.replace(GOLDENS["convnext_pooled"].preset, drop_path=0.25)),
        (convnext, GOLDENS["convnextv2"].preset),
        (convnext, convnets.convnext("large", final_norm_eps=1e-12)),
        (efficientnet_lite, convnets.efficientnet("lite0", classes=1000)),
        (sam_vision_model, GOLDENS["sam"].preset),
        (sam_vision_model, GOLDENS["sam_plain"].preset),
        *((sam_vision_model, sams.sam(size)) for size in sams.SIZES),
    ],
)
def test_reading_a_written_config_gives_the_preset(family, preset):
    ours = {"resize_to", "pool", "dtype", "remat"}
    ours |= {"classes"} if family is convnext else set()
    kept = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset) if f.name in ours}
    found = family.read(family.write(preset))
    assert dataclasses.replace(found, **kept) == preset


@pytest.mark.parametrize(
    "family, setting",
    [
        (convnext, {"model_type": "convnext", "num_channels": 4}),
        (convnext, {"model_type": "convnext", "hidden_act": "mish"}),
        (convnext, {"model_type": "resnet"}),
        (sam_vision_model, {"attention_dropout": 0.1}),
        (sam_vision_model, {"image_size": [1024, 512]}),
        (efficientnet_lite, {"architecture": "efficientnet_b0"}),
    ],
)
def test_settings_that_we_lack_are_refused_by_name(family, setting):
    with pytest.raises(ConfigError, match=list(setting)[-1]):
        family.read(setting)


def test_the_vision_config_of_a_whole_sam_is_read():
    written = sam_vision_model.write(sams.sam("L"))
    assert sam_vision_model.read({"model_type": "sam", "vision_config": written}) == sams.sam("L")
    # transformers' defaults are those of SAM-B.
    assert sam_vision_model.read({"model_type": "sam_vision_model"}) == sams.sam("B")


def count(preset) -> int:
    """Parameters as torch counts them, without the statistics of batch norms."""
    found = params.abstract(Model(preset))
    for path, leaf in found.items():
        axes = params.axes(path)
        assert len(axes) == len(leaf.shape), path
        assert (axes[0] == "layers") == ("/stack/blocks/" in path), path
    return sum(
        math.prod(leaf.shape)
        for path, leaf in found.items()
        if not path.endswith(("/mean", "/variance"))
    )


# Millions with the classifier of 1,000 classes: Liu et al. 2022 (table 1), Woo et al. 2023 (table
# of variants).
CONVNEXT = {
    "tiny": "28.6",
    "small": "50.2",
    "base": "88.6",
    "large": "197.8",
    "xlarge": "350.2",
    "v2-atto": "3.7",
    "v2-femto": "5.2",
    "v2-pico": "9.1",
    "v2-nano": "15.6",
    "v2-tiny": "28.6",
    "v2-base": "88.7",
    "v2-large": "198.0",
    "v2-huge": "660.3",
}


def test_convnexts_have_the_published_number_of_parameters():
    assert CONVNEXT.keys() == convnets.CONVNEXT.keys() - {"xxlarge"}
    for name, millions in CONVNEXT.items():
        assert f"{count(convnets.convnext(name, classes=1000)) / 1e6:.1f}" == millions, name


def test_openclips_convnexts_have_the_published_number_of_parameters():
    # Its table of image towers counts what projects the pooled feature to the text's width: one
    # matrix in xxlarge, two layers in large_d.
    pooled = count(convnets.convnext("xxlarge", pool="mean"))
    assert f"{(pooled + 3072 * 1024) / 1e6:.2f}" == "846.54"
    pooled = count(convnets.convnext("large", pool="mean", image_size=320))
    assert f"{(pooled + 1536 * 1536 + 1536 + 1536 * 768) / 1e6:.2f}" == "199.77"


def test_sams_and_efficientnet_have_the_published_number_of_parameters():
    assert count(convnets.efficientnet("lite0", classes=1000)) == 4_652_008
    # What the checkpoints hold less prompt encoder and mask decoder.
    for name, millions in {"B": "89.7", "L": "308.3", "H": "637.0"}.items():
        assert f"{count(sams.sam(name)) / 1e6:.1f}" == millions


@pytest.mark.parametrize("length, kernel, stride", [(7, 3, 2), (8, 5, 2), (5, 7, 1), (2, 5, 3)])
def test_shifted_sums_are_depthwise_convolutions(length, kernel, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, length, length + 3, 6)).astype(np.float32)
    filters = rng.normal(size=(kernel, kernel, 1, 6)).astype(np.float32)
    x, filters = jnp.asarray(x), jnp.asarray(filters)
    wanted = convnet.convolution(x, filters, stride)
    found = convnet.shifted_sum(x, filters, stride)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_are_run_in_the_shortest_pattern_that_repeats():
    assert sam.period(sams.sam("H").layers) == (4, ("local",) * 7 + ("global",))
    assert sam.period(("global", "local", "local")) == (1, ("global", "local", "local"))
    assert sam.period(("local",) * 5) == (5, ("local",))


def features(preset) -> tuple[int, ...]:
    """Shape of an image's features, without computing them."""
    images = Images(np.ones((1, 1, 2), np.int32), pixels=jnp.zeros((1, 1, *preset.size, 3)))
    model = Model(preset)
    see = lambda flat, images: params.build(model, flat).encoder(images).x  # noqa: E731
    return jax.eval_shape(see, params.abstract(model), images).shape[1:]


@pytest.mark.parametrize(
    "preset, shape",
    [
        # Cambrian-1: all stages of ConvNeXt-XXL to 96 x 96, 384 + 768 + 1536 + 3072 channels.
        (
            convnets.convnext("xxlarge", image_size=1024, taps=(0, 1, 2, 3), resize_to=96),
            (9216, 5760),
        ),
        (convnets.convnext("large", image_size=320, pool="mean"), (1, 1536)),
        (convnets.efficientnet("lite0"), (49, 320)),
        (convnets.efficientnet("lite0", taps=(4,)), (196, 112)),
        (convnets.efficientnet("lite0", pool="mean"), (1, 1280)),
        (sams.sam("L"), (4096, 256)),
        (sams.sam("B", image_size=(512, 768), trained_size=1024), (1536, 256)),
    ],
)
def test_presets_give_the_features_that_they_say(preset, shape):
    assert preset.features == shape
    assert features(preset) == shape


@pytest.mark.parametrize(
    "preset, field",
    [
        (convnets.convnext("tiny", taps=(4,)), "taps"),
        (convnets.convnext("tiny", taps=(0, 1)), "resize_to"),
        (convnets.convnext("tiny", image_size=16), "image_size"),
        (convnets.convnext("tiny", taps=(0,), pool="mean"), "pool"),
        (convnets.convnext("tiny", head=10), "head"),
        (convnets.efficientnet("lite0", layer_scale=1e-6), "layer_scale"),
        (sams.sam("B", image_size=1000), "image_size"),
        (sams.sam("B", trained_size=1000), "trained_size"),
        (dataclasses.replace(sams.sam("B"), heads=7), "width"),
        (dataclasses.replace(sams.sam("B"), depth=11), "global_layers"),
    ],
)
def test_presets_that_contradict_themselves_are_refused(preset, field):
    with pytest.raises(ConfigError, match=rf"model\.encoder\.{field} "):
        config.check_model(Model(preset))


def test_a_config_holds_any_encoder_and_a_model_several():
    tower = GOLDENS["sam"].preset
    extra = GOLDENS["convnext_taps"].preset
    model = Model(tower, Connector("linear"), decoder("1m", dtype="float32"), (extra,))
    config.check_model(model)
    plain = schema.plain(config.Config("test", model, config.Data({"emoji:caption": 1.0})))
    assert config.resolve(plain).model == model

    x = jnp.ones((2, 3, *tower.size, 3)), jnp.ones((2, 3, *extra.size, 3))
    images = tuple(Images(np.ones((2, 3, 2), np.int32), pixels=pixels) for pixels in x)
    see = lambda flat: params.build(model, flat).visual(images)  # noqa: E731
    visual = jax.eval_shape(see, params.abstract(model))
    assert visual.shape == (2, 3, 49, model.decoder.width)


@pytest.mark.parametrize("name", ["convnext_pooled", "efficientnet_head", "sam_resized"])
def test_bfloat16_changes_little(name):
    case = GOLDENS[name]
    compared, x = weights(case), pixels(case)
    wanted = golden(name)[1]
    half = Case(dataclasses.replace(case.preset, dtype="bfloat16"), case.family)
    found = jax.jit(lambda compared: run(half, compared, x))(compared)
    # Eight bits of mantissa through a few layers of random weights.
    assert relative(found.astype(jnp.float32), wanted) < 0.05


def test_dropped_paths_need_a_key():
    case = GOLDENS["convnext_pooled"]
    preset = dataclasses.replace(case.preset, drop_path=0.5)
    x = np.repeat(pixels(case)[:1], 8, axis=0)
    images = Images(np.ones((1, 8, 2), np.int32), pixels=x[None])

    @jax.jit
    def see(compared, key):
        flat = {f"encoder/{path}": leaf for path, leaf in compared.items()}
        return params.build(Model(preset), flat).encoder(images, key).x

    np.testing.assert_allclose(
        see(weights(case), None)[0],
        golden("convnext_pooled")[1][0],
        rtol=1e-4,
        atol=1e-6,  # a millionth of the largest: one feature is nearly zero
    )
    dropped = np.asarray(see(weights(case), jax.random.key(0)))
    # Of the three blocks the first is never dropped, the others by chances of 1/4 and 1/2.
    assert 2 <= len({row.tobytes() for row in dropped.round(4)}) <= 4
