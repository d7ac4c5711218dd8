"""Packing: rows are their documents, whole, and nothing else."""

import dataclasses
import itertools

import numpy as np
import pytest

from vlm_jax import config as c
from vlm_jax.data import documents, packing, sources, tokenizer

TOKENIZER = tokenizer.load("embedded")
CONV = {"stem": "conv"}


def made(config, count: int) -> list[documents.Document]:
    source = sources.open_source("made:one", "train")
    rngs = [np.random.default_rng((3, i)) for i in range(count)]
    return [
        documents.document(source.example(i % 23, rng), config, TOKENIZER, rng)
        for i, rng in enumerate(rngs)
    ]


def packed(config, count: int):
    """All of `count` documents in as many rows as it takes; (rows, shape)."""
    pending, rows = made(config, count), []
    shape = packing.shape_of(config, TOKENIZER.pad)
    while pending:
        size = lambda d: (len(d), len(d.pixels))  # noqa: E731
        chosen = packing.choose(pending, size, shape.tokens, shape.images)
        rows.append([pending[i] for i in chosen])
        pending = [d for i, d in enumerate(pending) if i not in chosen]
    return rows, packing.shape_of(config, TOKENIZER.pad, rows=len(rows) + 1)


def pixels_of(images, row: int, slot: int, encoder) -> np.ndarray:
    """The picture in a slot, put together again from its patches where it came in patches."""
    if images.pixels is not None:
        return images.pixels[row, slot]
    picture = np.zeros((encoder.image_size, encoder.image_size, 3), images.patches.dtype)
    here = images.patch_images[row] == slot
    pairs = zip(images.patches[row][here], images.patch_positions[row][here], strict=True)
    for patch, (y, x) in pairs:
        p = encoder.patch
        picture[y * p : (y + 1) * p, x * p : (x + 1) * p] = patch.reshape(p, p, 3)
    return picture


@pytest.mark.parametrize("stem", [{}, CONV], ids=["patches", "pixels"])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_every_document_comes_out_of_its_row_as_it_went_in(small, spoiled, stem, attention):
    config = small(attention=attention, encoder=stem)
    spoiled[5] = b"bad"
    rows, shape = packed(config, 46)
    assert max(map(len, rows)) > 2
    batch = packing.assemble(rows, shape)
    encoder, visual_tokens = config.model.encoder, config.model.visual_tokens
    for b, row in enumerate([*rows, []]):
        slot = 0
        for segment, document in enumerate(row, start=1):
            at = batch.segments[b] == segment
            for field in ("tokens", "loss_weights", "blocks"):
                np.testing.assert_array_equal(
                    getattr(batch, field)[b, at], getattr(document, field)
                )
            np.testing.assert_array_equal(batch.positions[b, at], np.arange(len(document)))
            for field, step in (("visual_index", visual_tokens), ("image_index", 1)):
                index = getattr(batch, field)[b, at]
                own = np.where(index >= 0, index - slot * step, -1)
                np.testing.assert_array_equal(own, getattr(document, field))
            for pixels, text in zip(document.pixels, document.texts, strict=True):
                np.testing.assert_array_equal(pixels_of(batch.images, b, slot, encoder), pixels)
                np.testing.assert_array_equal(batch.image_texts[b, slot], text)
                assert batch.images.grids[b, slot].tolist() == [2, 2]
                slot += 1
        padding = batch.segments[b] == 0
        assert padding.sum() == shape.tokens - sum(map(len, row))
        assert (batch.tokens[b, padding] == TOKENIZER.pad).all()
        for field, empty in (
            ("positions", 0),
            ("loss_weights", 0),
            ("blocks", 0),
            ("visual_index", -1),
            ("image_index", -1),
        ):
            assert (getattr(batch, field)[b, padding] == empty).all()
        assert not batch.images.grids[b, slot:].any() and not batch.image_texts[b, slot:].any()
        if batch.images.patches is not None:
            assert (batch.images.patch_images[b, slot * 4 :] == -1).all()


def test_shapes_and_types_are_static(small, spoiled):
    config = small()
    for count in (1, 30):
        rows, _ = packed(config, count)
        batch = packing.assemble(rows[:3], packing.shape_of(config, TOKENIZER.pad))
        assert {f: getattr(batch, f).shape for f in batch._fields[:7]} == dict.fromkeys(
            batch._fields[:7], (3, 96)
        )
        assert batch.image_texts.shape == (3, 5, 4)
        images = batch.images
        assert (images.patches.shape, images.patches.dtype) == ((3, 20, 48), np.float32)
        assert (images.patch_positions.shape, images.patch_images.shape) == ((3, 20, 2), (3, 20))
        assert (images.grids.shape, images.pixels) == ((3, 5, 2), None)


@pytest.mark.parametrize("stem", [{}, CONV], ids=["patches", "pixels"])
def test_pixels_are_bytes_of_what_repainting_next_to_nothing_gives_as_floats(small, spoiled, stem):
    spoiled[2] = b"bad"
    encoder = stem | {"mean": (0.2, 0.3, 0.4), "std": (0.2, 0.5, 0.3)}
    found, there = [], []
    for augment in (c.Augment(), c.Augment(noise=1e-9)):
        config = small(augment=augment, encoder=encoder)
        rows, shape = packed(config, 8)
        batch = packing.assemble(rows, shape)
        good = [not d.rejects for row in rows for d in row for _ in d.pixels]
        places = np.argwhere(batch.images.grids.any(axis=-1))[good]
        found.append([pixels_of(batch.images, *at, config.model.encoder) for at in places])
        there.append(places.tolist())
    assert there[0] == there[1] and len(there[0]) > 8
    bytes_, floats = map(np.stack, found)
    assert (bytes_.dtype, floats.dtype) == (np.uint8, np.float32)
    shown = (bytes_ / 255 - encoder["mean"]) / encoder["std"]
    np.testing.assert_allclose(floats, shown, atol=5e-6)


def test_normalised_pixels_do_not_become_bytes(small, spoiled):
    config = small(augment=c.Augment())
    _, document = made(config, 2)
    document = dataclasses.replace(document, pixels=[np.zeros((8, 8, 3), np.float32)])
    with pytest.raises(ValueError, match="pixels of float32 for a batch of uint8"):
        packing.assemble([[document]], packing.shape_of(config, TOKENIZER.pad))


def test_a_row_that_does_not_fit_is_refused(small, spoiled):
    config = small()
    shape = packing.shape_of(config, TOKENIZER.pad)
    with pytest.raises(ValueError, match="row 0 needs"):
        packing.assemble([made(config, 20)], shape)
    with pytest.raises(ValueError, match="4 rows for a batch of 3"):
        packing.assemble([[]] * 4, shape)


def choose(sizes, tokens: int, images: int) -> list[int]:
    return packing.choose(sizes, lambda size: size, tokens, images)


def test_rows_take_the_oldest_and_what_fills_them():
    assert choose([(3, 0), (9, 0), (6, 0), (5, 0), (2, 0)], 10, 0) == [0, 3, 4]
    assert choose([(3, 1), (7, 2), (5, 1), (2, 1)], 10, 2) == [0, 2]
    assert choose([(3, 0), (7, 0), (7, 1)], 10, 2) == [0, 2]
    assert choose([(4, 0), (3, 0), (3, 0)], 12, 0) == [0, 1, 2]
    assert choose([], 10, 2) == []


def test_no_other_set_with_the_oldest_fits_better():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = list(
            zip(rng.integers(1, 30, 9).tolist(), rng.integers(0, 4, 9).tolist(), strict=True)
        )
        room = np.array([rng.integers(30, 90), rng.integers(3, 7)])
        sets = [(0, *rest) for k in range(9) for rest in itertools.combinations(range(1, 9), k)]
        totals = [np.sum([sizes[i] for i in chosen], axis=0) for chosen in sets]
        best = max(tuple(total) for total in totals if (total <= room).all())
        chosen = choose(sizes, *room.tolist())
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert tuple(np.sum([sizes[i] for i in chosen], axis=0)) == best
