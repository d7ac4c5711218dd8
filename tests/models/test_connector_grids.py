"""What becomes of features before they are projected, and what presets refuse."""

import dataclasses
import math
import re

import connector_statements as stated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connector_cases import STATED, Case, encoder, inputs, random_weights, relative_error, run

from vlm_jax import config
from vlm_jax.batch import Images
from vlm_jax.errors import ConfigError
from vlm_jax.models import joining, params
from vlm_jax.models.layers import Features
from vlm_jax.presets import connectors, mapping, qformer, sva
from vlm_jax.presets.connectors import Connector, resampler
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.mapping import Mapping
from vlm_jax.presets.qformer import QFormer
from vlm_jax.presets.sva import Sva


def passed(connector: Connector, *features, width: int = 0) -> tuple[np.ndarray, list]:
    """Visual tokens of a connector without parameters, and the grids of features that it saw."""
    case = Case(None, connector, features, width or connector.out)
    assert list(connector.problems(case.width, case.model.encoders)) == []
    assert case.shapes == {}
    fed = inputs(case)
    maps = [fed[f"x{i}"].reshape(3, r, c, e) for i, (r, c, e) in enumerate(features)]
    found = np.asarray(run(case, {}, fed))
    assert found.shape == (3, case.model.visual_tokens, case.width)
    return found, maps


def test_without_a_projection_features_are_visual_tokens():
    found, (x,) = passed(Connector("none", out=5), (2, 3, 5))
    np.testing.assert_array_equal(found, x.reshape(3, 6, 5))


def test_shuffling_gathers_squares_row_by_row_into_channels():
    found, (x,) = passed(Connector("none", pool="shuffle", factor=2, out=20), (4, 6, 5))
    for token, (r, c) in enumerate((r, c) for r in range(2) for c in range(3)):
        square = [x[:, 2 * r + dr, 2 * c + dc] for dr in (0, 1) for dc in (0, 1)]
        np.testing.assert_array_equal(found[:, token], np.concatenate(square, axis=-1))


def test_adjacent_features_stand_side_by_side_in_channels():
    found, (x,) = passed(Connector("none", pool="adjacent", factor=4, out=20), (2, 6, 5))
    flat = x.reshape(3, 12, 5)
    for token in range(3):
        np.testing.assert_array_equal(
            found[:, token], flat[:, 4 * token : 4 * token + 4].reshape(3, 20)
        )


def test_averages_are_over_bins_that_overlap_where_sides_do_not_divide():
    found, (x,) = passed(Connector("none", pool="average", grid=(2, 3), out=4), (5, 7, 4))
    rows, columns = [(0, 3), (2, 5)], [(0, 3), (2, 5), (4, 7)]
    for token, ((r0, r1), (c0, c1)) in enumerate((r, c) for r in rows for c in columns):
        wanted = x[:, r0:r1, c0:c1].mean((1, 2))
        np.testing.assert_allclose(found[:, token], wanted, atol=1e-6)


@pytest.mark.parametrize("grid, side", [((3, 5), 4), ((7, 6), 3), ((2, 2), 9), ((1, 3), 2)])
def test_features_are_resized_between_their_nearest_neighbours(grid, side):
    found, (x,) = passed(Connector("none", resize=(side, side), out=3), (*grid, 3))
    wanted = stated.resized(x.astype(np.float64), grid, side).reshape(3, -1, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("found, places", [(27, 24), (7, 12), (5, 5), (9, 2), (1, 3)])
def test_resizing_and_averaging_are_those_of_torch(found, places):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, found)).astype(np.float32))
    line = torch.nn.functional.interpolate(x, size=places, mode="linear", align_corners=False)
    mean = torch.nn.functional.adaptive_avg_pool1d(x, places)
    for weights, wanted in ((joining.bilinear, line), (joining.averaging, mean)):
        ours = x.numpy() @ weights(places, found).T
        assert relative_error(ours, wanted.numpy()) < 1e-5


def test_several_encoders_stand_side_by_side_on_the_first_ones_grid():
    found, (x, y) = passed(Connector("none", out=8), (3, 4, 5), (2, 2, 3))
    columns = stated._between
    for r in range(3):
        for c in range(4):
            (y0, y1, dy), (x0, x1, dx) = columns(r, 2, 3), columns(c, 2, 4)
            top = (1 - dx) * y[:, y0, x0] + dx * y[:, y0, x1]
            bottom = (1 - dx) * y[:, y1, x0] + dx * y[:, y1, x1]
            wanted = np.concatenate([x[:, r, c], (1 - dy) * top + dy * bottom], axis=-1)
            np.testing.assert_allclose(found[:, 4 * r + c], wanted, atol=1e-6)


def test_prismatics_fused_projector_has_three_layers_over_both_encoders():
    connector = Connector("mlp", layers=3, hidden=(9, 6), resize=(3, 3))
    case = Case(None, connector, ((2, 4, 5), (3, 3, 2)), 4)
    shapes = {p: s for p, s in case.shapes.items() if p.endswith("kernel")}
    assert shapes == {
        "layers/0/kernel": (7, 9),
        "layers/1/kernel": (9, 6),
        "layers/2/kernel": (6, 4),
    }
    leaves, fed = random_weights(case.shapes), inputs(case)
    x = stated.resized(fed["x0"].astype(np.float64), (2, 4), 3).reshape(3, 9, 5)
    x = np.concatenate([x, fed["x1"]], axis=-1)
    for i in range(3):
        x = stated.gelu(x) if i else x
        x = x @ leaves[f"layers/{i}/kernel"] + leaves[f"layers/{i}/bias"]
    assert relative_error(run(case, leaves, fed), x) < 1e-5


def test_a_flat_connector_is_one_matrix_over_all_features_of_an_image():
    case = Case(None, Connector("flat", queries=3), ((2, 3, 5),), 4)
    leaves, fed = random_weights(case.shapes), inputs(case)
    matrix = leaves["flat/kernel"].reshape(6 * 5, 3 * 4)
    wanted = (fed["x0"].reshape(3, -1) @ matrix).reshape(3, 3, 4) + leaves["flat/bias"]
    assert relative_error(run(case, leaves, fed), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "mlp", "flat"])
def test_out_scale_makes_the_last_initial_weights_smaller_and_no_others(kind):
    def drawn(**scale):
        model = Case(None, Connector(kind, queries=3, **scale), ((2, 3, 5),), 4).model
        return {p: leaf for p, leaf in params.init(model, jax.random.key(3)).items() if p[0] == "c"}

    last = {"linear": "layers/0", "mlp": "layers/1", "flat": "flat"}[kind]
    whole, small = drawn(), drawn(out_scale=0.25)
    for path, leaf in whole.items():
        factor = 0.25 if path == f"connector/{last}/kernel" else 1.0
        np.testing.assert_array_equal(small[path], factor * leaf)


@pytest.mark.parametrize("newline, places", [("row", (3, 7)), ("token", (6,))])
def test_newlines_stand_behind_rows_or_behind_all(newline, places):
    case = Case(None, Connector("none", newline=newline, out=5), ((2, 3, 5),), 5)
    leaves, fed = random_weights(case.shapes), inputs(case)
    found = np.asarray(run(case, leaves, fed))
    assert found.shape[1] == case.model.visual_tokens == 6 + len(places)
    for place in places:
        np.testing.assert_array_equal(found[:, place], np.tile(leaves["newline"], (3, 1)))
    np.testing.assert_array_equal(np.delete(found, places, axis=1), fed["x0"])


KINDS = {
    "mlp": Case(None, Connector("mlp", input_norm="layer", newline="row"), ((2, 3, 6),), 8),
    "flat": Case(None, Connector("flat", queries=3), ((2, 3, 6),), 8),
    "resampler": Case(None, resampler("idefics2", width=8, embed_hidden=9), ((2, 3, 6),), 8),
    "qformer": Case(None, QFormer(3, 12, 2, 8, 3, vocab=9, positions=5), ((2, 3, 6),), 8, texts=4),
    "mapping": Case(None, Mapping("transformer", layers=2, heads=2), ((1, 1, 6),), 8),
    "sva": Case(None, Sva((2, 4), 2, 16, 2, heads=4), ((2, 2, 6), (4, 4, 5)), 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_connectors_compute_in_bfloat16_where_they_are_told_to(name):
    case = KINDS[name]
    fed, weights = inputs(case), random_weights(case.shapes)
    preset = dataclasses.replace(case.model.connector, dtype="bfloat16")
    model = dataclasses.replace(case.model, connector=preset)

    def half(leaves):
        flat = {p: jnp.zeros(leaf.shape) for p, leaf in params.abstract(model).items()}
        flat |= {f"connector/{path}": leaf for path, leaf in leaves.items()}
        seen = tuple(Features(jnp.asarray(fed[f"x{i}"])) for i in range(len(case.features)))
        return params.build(model, flat).connector(seen, fed.get("texts"))

    found, exact = jax.jit(lambda leaves: (half(leaves), run(case, leaves, fed)))(weights)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), np.asarray(exact)) < 0.05


def test_no_two_random_leaves_or_layers_start_alike():
    seen = {}
    made = jax.jit(lambda key: params.init(KINDS["qformer"].model, key))(jax.random.key(0))
    for path, leaf in made.items():
        for layer in np.asarray(leaf if "/stack/blocks/" in path else leaf[None]):
            if np.ptp(layer) > 0:
                start = tuple((layer.ravel() / np.abs(layer).max())[:4])
                assert start not in seen, (path, seen[start])
                seen[start] = path


def published(connector, *features, width: int):
    """A published connector behind encoders of these sizes."""
    first, *others = (encoder(*sizes) for sizes in features)
    model = config.Model(first, connector, Decoder(8, width, 1, 8, 1, 1, 4), tuple(others))
    config.check_model(model)
    return model


CAMBRIAN = ((27, 27, 1152), (24, 24, 1024), (27, 27, 1536), (96, 96, 5760))
# Parameters: Q-Formers, without queries and projection, and Idefics' resampler as transformers'
# classes count them on the meta device; Idefics2's parts as its paper's code has them.
COUNTS = [
    (qformer.BLIP2, ((16, 16, 1408),), 2560, r"(?!project|queries)", 105_137_664, 32),
    (qformer.INSTRUCTBLIP, ((16, 16, 1408),), 4096, r"(?!project|queries)", 185_660_160, 32),
    (connectors.RESAMPLERS["idefics2"], ((70, 70, 1152),), 4096, "embed_mlp", 91_750_400, 64),
    (connectors.RESAMPLERS["idefics2"], ((70, 70, 1152),), 4096, "", 743_219_200, 64),
    (connectors.RESAMPLERS["idefics"], ((16, 16, 1280),), 1280, "", 125_961_984, 64),
    (connectors.RESAMPLERS["open-flamingo"], ((16, 16, 1024),), 1024, "", 63_019_008, 64),
    (connectors.RESAMPLERS["mplug-owl"], ((16, 16, 1024),), 4096, "", 105_097_216, 65),
    (Connector("mlp"), ((24, 24, 1024),), 4096, "", 20_979_712, 576),
    (sva.CAMBRIAN, CAMBRIAN, 4096, "", 82_191_360, 600),
    (mapping.Mapping(), ((1, 1, 512),), 768, "", 31_468_800, 10),
]


@pytest.mark.parametrize("connector, features, width, part, count, tokens", COUNTS)
def test_published_connectors_have_the_published_sizes(
    connector, features, width, part, count, tokens
):
    model = published(connector, *features, width=width)
    assert model.visual_tokens == tokens
    leaves = params.abstract(model)
    mine = {path: leaf for path, leaf in leaves.items() if path.startswith("connector/")}
    found = sum(
        math.prod(leaf.shape) for path, leaf in mine.items() if re.match(f"connector/{part}", path)
    )
    assert found == count
    for path, leaf in mine.items():
        axes = params.axes(path)
        assert len(axes) == len(leaf.shape), path
        assert (axes[0] == "layers") == ("/stack/blocks/" in path), path


GRID, POOLED = (4, 6, 8), (1, 1, 8)
REFUSED = [
    ("kind", Connector("none"), [GRID]),
    ("factor", Connector("mlp", pool="shuffle", factor=4), [GRID]),
    ("factor", Connector("mlp", pool="adjacent", factor=5), [GRID]),
    ("grid", Connector("mlp", pool="average", grid=(2, 7)), [GRID]),
    ("newline", Connector("perceiver", newline="row"), [GRID]),
    ("newline", Connector("mlp", pool="adjacent", newline="row"), [GRID]),
    ("hidden", Connector("mlp", layers=3, hidden=(5,)), [GRID]),
    ("hidden", Connector("perceiver", hidden=(5, 6)), [GRID]),
    ("embed", Connector("perceiver", embed="none"), [GRID]),
    ("embed", Connector("mlp", embed="none"), [GRID]),
    ("embed_hidden", Connector("perceiver", embed="swiglu"), [GRID]),
    ("input_norm", Connector("perceiver", input_norm="rms"), [GRID]),
    ("heads", Connector("perceiver", heads=6, kv_heads=4), [GRID]),
    ("heads", Connector("perceiver", heads=5, kv_heads=5), [GRID]),
    ("depth", QFormer(depth=3), [GRID]),
    ("heads", QFormer(heads=7), [GRID]),
    ("kind", QFormer(), [GRID, GRID]),
    ("out", Connector("mlp", out=17), [GRID]),
    ("kind", Mapping(), [GRID]),
    ("heads", Mapping("transformer", heads=3), [POOLED]),
    ("sides", Sva((24,)), [GRID, GRID]),
    ("sides", Sva((25,)), [GRID]),
    ("heads", Sva((24,), heads=5), [GRID]),
]


@pytest.mark.parametrize("field, connector, features", REFUSED)
def test_a_connector_that_contradicts_itself_or_its_encoders_is_refused(field, connector, features):
    with pytest.raises(ConfigError, match=rf"model\.connector\.{field} is"):
        published(connector, *features, width=16)


@pytest.mark.parametrize(
    "connector",
    [
        Connector("mlp", pool="shuffle"),
        Connector("mlp", pool="average", grid=(1, 1)),
        Connector("mlp", resize=(2, 2)),
        Sva((24,)),
    ],
)
def test_features_that_form_no_grid_are_refused_where_a_grid_is_needed(connector):
    pooled = Encoder(8, 1, 8, 1, patch=4, image_size=16, pool="map")
    with pytest.raises(ConfigError, match="grid"):
        config.check_model(config.Model(pooled, connector, Decoder(8, 16, 1, 8, 1, 1, 4)))


def test_texts_beyond_the_positions_of_a_qformer_are_refused():
    case = dataclasses.replace(KINDS["qformer"], texts=6)
    with pytest.raises(ValueError, match=r"6 tokens.*5 positions"):
        run(case, random_weights(case.shapes), inputs(case))


def test_a_model_of_two_encoders_gives_visual_tokens_of_every_image():
    model = STATED["cambrian"].model
    visual = lambda flat, images: params.build(model, flat).visual(images)  # noqa: E731
    images = tuple(
        Images(
            np.full((2, 2, 2), encoder.grid, np.int32),
            patches=np.ones((2, 2 * encoder.patches, 48), np.float32),
        )
        for encoder in model.encoders
    )
    found = jax.eval_shape(visual, params.abstract(model), images)
    assert found.shape == (2, 2, 12, 10)
