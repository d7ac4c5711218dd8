"""Samplers between decoder layers, against a statement of Cambrian's language model."""

import dataclasses
import functools
import math

import handmade
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_statements
from connector_cases import relative_error

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.config import Model
from vlm_jax.data.documents import Document
from vlm_jax.data.packing import Shape, assemble
from vlm_jax.errors import ConfigError
from vlm_jax.models import params, sampling
from vlm_jax.models.vlm import target_weights
from vlm_jax.presets.convnets import ConvNet, convnext, convnext_stages
from vlm_jax.presets.decoders import Decoder, decoder
from vlm_jax.presets.encoder_sizes import PUBLISHED
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.presets.sva import CAMBRIAN, CAMBRIAN_SAMPLERS, Samplers, Sva
from vlm_jax.weights import tables
from vlm_jax.weights.families import cambrian_sva, llama

VOCAB, SIDE = 41, 12
PLAIN = {"dtype": "float32", "remat": False}
SCANNED = {"dtype": "float32", "remat": True}  # a scan compiles its block once
# A grid that is resized to the queries', and one of 2 x 2 windows; the last sampler stands after
# the last layer.
MODEL = Model(
    Encoder(10, 1, 14, 2, patch=3, image_size=SIDE, max_patches=16, **PLAIN),
    Sva(sides=(3, 6), side=3, width=6, layers=2, heads=3, **SCANNED),
    Decoder(VOCAB, 20, 5, 28, 6, 3, 4, norm_eps=1e-2, **SCANNED),
    (ConvNet(convnext_stages((1,), (8,)), 8, stem_stride=2, image_size=SIDE, **PLAIN),),
    samplers=Samplers(start=0, stride=2, count=3),
)
PARTS = [(2, "image", 3, "image", 2), ("image", 1), (4,)]  # three documents of a row


def document(rng: np.random.Generator, parts: tuple, model: Model = MODEL) -> Document:
    """Words, so many of them, and images, in reading order; each image's pixels drawn."""
    each, tokens, visual, images = model.visual_tokens, [], [], 0
    for part in parts:
        if part == "image":
            tokens += [0] * each
            visual += range(images * each, (images + 1) * each)
            images += 1
        else:
            tokens += rng.integers(1, VOCAB, part).tolist()
            visual += [-1] * part
    pixels = rng.normal(size=(2, images, SIDE, SIDE, 3)).astype(np.float32)
    visual, nowhere = np.array(visual, np.int32), np.full(len(tokens), -1, np.int32)
    return Document(
        *("made", "made", np.array(tokens, np.int32), (visual < 0).astype(np.float32)),
        *(np.zeros_like(visual), visual, nowhere, pixels[0], np.zeros((images, 1), np.int32)),
        extra_pixels=(pixels[1],),
    )


def documents(seed: int = 0, parts=PARTS) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [document(rng, one) for one in parts]


def laid_out(rows: list[list[Document]], tokens: int = 56, images: int = 4):
    """A batch of these rows."""
    sizes = len(rows), tokens, images, 1, MODEL.visual_tokens
    shape = Shape(*sizes, MODEL.encoders, dtype="float32")
    return jax.tree.map(jnp.asarray, assemble(rows, shape))


def see(vlm, batch):
    """What the decoder and its samplers look at."""
    return vlm.visual((batch.images, *batch.extra_images))


@functools.cache
def leaves(seed: int = 0) -> dict[str, jax.Array]:
    return handmade.weights(MODEL, seed)


@jax.jit
def answers(flat, batch):
    """Logits, and the features of both encoders."""
    vlm = params.build(MODEL, flat)
    features = vlm.features((batch.images, *batch.extra_images))
    logits = vlm.unembed(vlm.hidden(batch, see(vlm, batch)))
    return logits, [seen.x for seen in features]


def rows_of_all() -> list[tables.Row]:
    """The tables of a Cambrian but for its encoders."""
    preset = MODEL.connector
    return [
        *tables.placed(llama.rows(MODEL.decoder), "decoder/"),
        *tables.placed(cambrian_sva.rows(preset), "connector/"),
        *cambrian_sva.between(preset),
    ]


def test_packed_logits_equal_the_published_definition_of_each_document():
    packed = documents()
    batch = laid_out([[], packed])
    logits, features = answers(leaves(), batch)
    theirs = tables.scatter(rows_of_all(), leaves())
    exact = {name: tensor.astype(np.float64) for name, tensor in theirs.items()}
    start = image = 0
    for one in packed:
        length, count = len(one), len(one.pixels)
        seen = [np.asarray(x[4 + image : 4 + image + count]) for x in features]  # slots of row 1
        wanted = sampler_statements.logits(MODEL, exact, one, seen)
        found = logits[1, start : start + length]
        assert relative_error(found, wanted) < 1e-4
        start, image = start + length, image + count


@pytest.mark.slow
def test_packed_rows_give_the_gradients_of_separate_rows_and_every_leaf_has_one():
    @jax.jit
    def gradients(flat, batch):
        def loss(flat):
            vlm = params.build(MODEL, flat)
            logits = vlm.unembed(vlm.hidden(batch, see(vlm, batch)))
            chosen = jax.nn.log_softmax(logits)[..., 7]
            return (target_weights(batch) * chosen).sum()

        return jax.grad(loss)(flat)

    first, second, third = documents()
    together = gradients(leaves(), laid_out([[first, second, third], [], []]))
    apart = gradients(leaves(), laid_out([[first], [second], [third]]))
    largest = max(np.abs(leaf).max() for leaf in apart.values())
    for path, leaf in apart.items():
        assert np.isfinite(leaf).all() and np.any(leaf), path
        atol = 1e-4 * np.abs(leaf).max() + 1e-6 * largest
        np.testing.assert_allclose(together[path], leaf, rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.slow
def test_cached_generation_equals_full_passes():
    rows = [[one] for one in documents(2)] + [[]]
    batch = laid_out(rows, tokens=36, images=2)

    def generate(function):
        def run(flat, batch):
            vlm = params.build(MODEL, flat)
            return function(vlm, batch, see(vlm, batch), 5, -1)

        return np.asarray(jax.jit(run)(leaves(2), batch))

    cached = generate(sampling.greedy)
    np.testing.assert_array_equal(cached, generate(sampling.greedy_uncached))
    assert len({tuple(row) for row in cached}) == 4  # rows that differ, or it would say little


def test_tensors_go_in_and_out_bit_for_bit_and_none_is_left():
    kept = {path: x for path, x in leaves().items() if "encoder" not in path}
    shapes = {path: leaf.shape for path, leaf in kept.items()}
    theirs = tables.scatter(rows_of_all(), kept)
    assert tables.uncovered(rows_of_all(), shapes, theirs) == ([], [])
    back = tables.gather(rows_of_all(), shapes, theirs)
    for path, leaf in kept.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    found = {name for name in theirs if "vision_sampler_layers" in name}
    assert len(found) == 3 * (1 + 1 + 2 + 2 + 3 + 1 + 1 + 2 * 2 * 3)
    assert "vision_sampler_layers.2.layers.0.pos_embed_1" in found


@pytest.mark.parametrize("samplers", [None, MODEL.samplers, *CAMBRIAN_SAMPLERS.values()])
def test_what_is_written_of_samplers_reads_back(samplers):
    assert cambrian_sva.read_samplers(cambrian_sva.write_samplers(samplers)) == samplers


def test_the_samplers_of_cambrian_8b_have_as_many_parameters_as_their_definition():
    encoders = [PUBLISHED[name] for name in ("clip-l14-336", "dinov2-g14")]
    convnet = convnext("xxlarge", image_size=1024)
    model = Model(
        PUBLISHED["siglip-so400m14-378"],
        CAMBRIAN,
        decoder("llama3-8b"),
        (*encoders, convnet),
        samplers=CAMBRIAN_SAMPLERS["8b"],
    )
    sizes = {path: math.prod(leaf.shape) for path, leaf in params.abstract(model).items()}
    found = sum(size for path, size in sizes.items() if path.startswith("samplers/"))
    width, inner = 4096, 1024
    square, norm = inner**2, 2 * inner
    joint = square + (width + inner) * inner  # proj_context, proj_in
    attention = 2 * square + norm + 4 * 2 * (square + norm)  # q, o; k and v of four encoders
    out = norm + square + inner * width + 16 * inner  # norm, proj_out, pos_embed_3
    assert found == 10 * (joint + attention + out) == 220_569_600


def test_every_parameter_has_logical_axes_of_its_rank():
    for path, leaf in params.abstract(MODEL).items():
        assert len(params.axes(path)) == len(leaf.shape), path


def test_a_model_with_samplers_survives_as_plain_data():
    configs.check_model(MODEL)
    assert schema.typed(Model, schema.plain(MODEL), "model") == MODEL


CROSS = CrossAttention(8, heads=2, kv_heads=1, head_dim=4, both=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samplers": Samplers(0, 2, 4)}, "model.samplers.count is 4; expected at least 1, and no"),
        ({"samplers": Samplers(0, 0, 1)}, "model.samplers.stride is 0; expected at least 1"),
        ({"samplers": Samplers(-1, 1, 1)}, "model.samplers.start is -1; expected at least 0"),
        ({"fusion": CROSS}, "expected None beside samplers"),
        (
            {"connector": handmade.MODEL.connector},
            "connector.kind is 'perceiver'; expected sva, whose windows",
        ),
    ],
)
def test_samplers_that_fit_no_model_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        configs.check_model(dataclasses.replace(MODEL, **changes))
