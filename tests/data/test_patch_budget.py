"""Images of differing sizes share a row's patches: what is assembled, chosen, refused, resumed."""

import dataclasses
import itertools

import numpy as np
import pytest

from vlm_jax import config as configs
from vlm_jax.data import documents, filling, packing, pipeline, sources, tokenizer
from vlm_jax.errors import ConfigError

TOKENIZER = tokenizer.load("embedded")
GRIDS = ((1, 1), (3, 2), (2, 4), (1, 9), (3, 3))


def roomy(small, patches_per_row: int) -> configs.Config:
    """With an encoder of up to nine patches an image."""
    config = small(patches_per_row=patches_per_row, augment=configs.Augment())
    encoder = dataclasses.replace(config.model.encoder, image_size=12, max_patches=9)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def native(config, count: int, seed: int = 0) -> list[documents.Document]:
    """Documents whose pictures have sizes of their own."""
    source = sources.open_source("made:one", "train")
    rng = np.random.default_rng(seed)
    made = [documents.document(source.example(i, rng), config, TOKENIZER) for i in range(count)]
    return [
        dataclasses.replace(
            document, pixels=tuple(picture(rng) for _ in range(len(document.pixels)))
        )
        for document in made
    ]


def picture(rng: np.random.Generator) -> np.ndarray:
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    return rng.integers(0, 256, (4 * rows, 4 * columns, 3), np.uint8)


def picture_of(images, row: int, slot: int) -> np.ndarray:
    """The picture in a slot, put together again from its patches."""
    rows, columns = images.grids[row, slot]
    whole = np.zeros((4 * rows, 4 * columns, 3), images.patches.dtype)
    here = images.patch_images[row] == slot
    for patch, (y, x) in zip(
        images.patches[row][here], images.patch_positions[row][here], strict=True
    ):
        whole[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = patch.reshape(4, 4, 3)
    return whole


@pytest.mark.parametrize("shared", [0, 24])
def test_pictures_of_any_size_come_out_of_their_row_as_they_went_in(small, spoiled, shared):
    config = roomy(small, shared)
    configs.check(config)
    shape = packing.shape_of(config, TOKENIZER.pad)
    pending, rows = native(config, 12), []
    while pending:
        chosen = packing.choose(pending, shape.needs, *shape.room)
        rows.append([pending[i] for i in chosen])
        pending = [d for i, d in enumerate(pending) if i not in chosen]
    batch = packing.assemble(rows, dataclasses.replace(shape, rows=len(rows) + 1))
    images, room = batch.images, shared or 5 * 9
    assert images.patches.shape == (len(rows) + 1, room, 48)
    for b, row in enumerate([*rows, []]):
        pictures = [pixels for document in row for pixels in document.pixels]
        for slot, pixels in enumerate(pictures):
            np.testing.assert_array_equal(picture_of(images, b, slot), pixels)
        counts = images.grids[b].prod(axis=-1)
        assert not counts[len(pictures) :].any()
        assert (images.patch_images[b] >= 0).sum() == counts.sum() <= room
        if shared:
            np.testing.assert_array_equal(
                images.starts[b, : len(pictures)], np.cumsum([0, *counts])[: len(pictures)]
            )
            assert (images.patch_images[b, counts.sum() :] == -1).all()
    assert (images.starts is None) == (not shared)


def test_a_row_or_an_image_with_too_many_patches_is_refused(small, spoiled):
    config = roomy(small, 9)
    shape = packing.shape_of(config, TOKENIZER.pad)
    (document,) = native(config, 2)[1:]
    sized = lambda *grids: dataclasses.replace(  # noqa: E731
        document, pixels=[np.zeros((4 * r, 4 * c, 3), np.uint8) for r, c in grids]
    )
    packing.assemble([[sized((3, 3))]], shape)
    with pytest.raises(ValueError, match="has 2 patches from 9 on"):
        packing.assemble([[sized((3, 3)), sized((1, 2))]], shape)
    for room in (0, 20):
        with pytest.raises(ValueError, match="has 10 patches from 0 on; an image may have 9"):
            packing.assemble([[sized((2, 5))]], dataclasses.replace(shape, patches=room))


def filled(sizes, chosen, room) -> float:
    tokens, _, patches = np.sum([sizes[i] for i in chosen], axis=0)
    return tokens / room[0] + patches / room[2]


def best_of_all(sizes, room) -> float:
    """Over every set with the first that fits."""
    number = range(1, len(sizes))
    sets = [(0, *rest) for k in range(len(sizes)) for rest in itertools.combinations(number, k)]
    fits = [s for s in sets if (np.sum([sizes[i] for i in s], axis=0) <= room).all()]
    return max(filled(sizes, s, room) for s in fits)


def drawn(rng, count: int) -> list[tuple[int, int, int]]:
    sizes = rng.integers((4, 0, 1), (30, 4, 12), (count, 3))
    return [(int(t), int(n), int(n * p)) for t, n, p in sizes]


def test_rows_keep_all_budgets_and_come_near_the_best_set():
    rng, lost = np.random.default_rng(0), []
    for _ in range(60):
        sizes = drawn(rng, 11)
        room = int(rng.integers(30, 140)), int(rng.integers(4, 12)), int(rng.integers(40, 110))
        chosen = packing.choose(sizes, lambda size: size, *room)
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert (np.sum([sizes[i] for i in chosen], axis=0) <= room).all()
        best = best_of_all(sizes, room)
        lost.append(1 - filled(sizes, chosen, room) / best)
    # Eleven documents and three tight budgets are hard; pools of a run hold more to choose from.
    assert np.mean(lost) < 0.02 and max(lost) < 0.2


def test_where_three_more_fill_a_row_the_choice_is_exact():
    rng = np.random.default_rng(1)
    for _ in range(40):
        sizes = [(t + 30, n, p + 25) for t, n, p in drawn(rng, 10)]
        room = 150, 8, 130  # four documents fit, never five
        chosen = filling.chosen(sizes, room)
        assert filled(sizes, chosen, room) == pytest.approx(best_of_all(sizes, room))


def test_documents_with_too_many_patches_are_rejected_and_counted(small, spoiled):
    config = small(encoder={"max_patches": 4}, patches_per_row=8, bad_samples=1.0)
    configs.check(config)
    three = sources.open_source("made:one", "train").example(3, np.random.default_rng(0))
    document = documents.document(three, config, TOKENIZER)
    assert (len(document), document.rejects) == (0, ("too_many_patches",))
    with pipeline.train_stream(config) as stream:
        batches = [next(stream) for _ in range(6)]
    assert sum(info.rejects.get(("one", "too_many_patches"), 0) for _, info in batches)
    for batch, _ in batches:
        assert batch.images.patches.shape == (3, 8, 48)
        assert (batch.images.grids.prod(axis=-1).sum(axis=-1) <= 8).all()


def test_a_stream_with_a_budget_goes_on_where_it_stood_and_refuses_another(small, spoiled):
    config = small(encoder={"max_patches": 4}, patches_per_row=16)
    with pipeline.train_stream(config) as stream:
        for _ in range(3):
            next(stream)
        state = stream.get_state()
        wanted = [next(stream)[0] for _ in range(3)]
        stream.set_state(state)
        found = [next(stream)[0] for _ in range(3)]
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one.images, other.images, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    for other in (
        small(encoder={"max_patches": 4}),
        small(encoder={"max_patches": 4}, patches_per_row=12),
    ):
        with (
            pipeline.train_stream(other) as stream,
            pytest.raises(ConfigError, match="patches_per_row"),
        ):
            stream.set_state(state)


def test_budgets_that_make_no_sense_are_refused_by_name(small):
    for fields in ({"patches_per_row": 20}, {"patches_per_row": 3, "encoder": {"max_patches": 4}}):
        with pytest.raises(ConfigError, match=r"data\.patches_per_row"):
            configs.check(small(**fields))
