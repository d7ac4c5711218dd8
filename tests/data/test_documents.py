"""Documents: what one sample is on its own, good or bad."""

import dataclasses

import numpy as np
import pytest

from vlm_jax.data import documents, images, sources, tokenizer
from vlm_jax.data.example import ImageRef, Turn
from vlm_jax.errors import DataError

TOKENIZER = tokenizer.load("embedded")


def made(index: int):
    return sources.open_source("made:one", "train").example(index, np.random.default_rng(index))


def test_each_visual_token_and_its_image_are_named(small, spoiled):
    document = documents.document(made(3), small(), TOKENIZER)
    visual = document.visual_index[document.visual_index >= 0]
    np.testing.assert_array_equal(visual, np.arange(12))  # 3 images of 2 x 2 patches, in order
    np.testing.assert_array_equal(document.visual_index >= 0, document.tokens == TOKENIZER.image)
    starts = np.flatnonzero(np.isin(document.visual_index, (0, 4, 8)))
    expected = np.searchsorted(starts, np.arange(len(document)), side="right") - 1
    np.testing.assert_array_equal(document.image_index, expected)
    assert document.image_index[0] == -1 and len(document.pixels) == len(document.texts) == 3
    for n, row in enumerate(document.texts):
        assert row.tolist() == (TOKENIZER.encode(f"text 3 {n}") + [0] * 4)[:4]


@pytest.mark.parametrize("spoil, reason", [(b"", "empty"), (b"nothing", "not_an_image")])
def test_a_bad_picture_leaves_a_masked_document_of_the_same_shape(small, spoiled, spoil, reason):
    config = small(attention="prefix")
    good = documents.document(made(3), config, TOKENIZER, np.random.default_rng(0))
    spoiled[3] = spoil
    bad = documents.document(made(3), config, TOKENIZER, np.random.default_rng(0))
    assert bad.rejects == (reason,) * 3 and not good.rejects
    assert good.texts.any() and not bad.texts.any()
    assert good.loss_weights.any() and not bad.loss_weights.any()
    assert np.any(good.pixels) and not np.any(bad.pixels)
    assert [one.shape for one in good.pixels] == [one.shape for one in bad.pixels]
    for field in ("tokens", "blocks", "visual_index", "image_index"):
        np.testing.assert_array_equal(getattr(good, field), getattr(bad, field))


def test_an_image_that_is_not_there_is_a_bad_picture(small, spoiled):
    example = dataclasses.replace(made(1), images=())
    assert documents.document(example, small(), TOKENIZER).rejects == ("no_such_image",)


def test_what_fits_no_row_is_refused_whole(small, spoiled):
    whole = documents.document(made(3), small(), TOKENIZER)
    limits = {"tokens": len(whole) - 1}, {"images_per_row": 2}
    for limit, reason in zip(limits, ("too_many_tokens", "too_many_images"), strict=True):
        document = documents.document(made(3), small(**limit), TOKENIZER)
        assert (len(document), len(document.pixels), document.rejects) == (0, 0, (reason,))
    assert not documents.document(made(3), small(tokens=len(whole)), TOKENIZER).rejects


def test_what_fits_no_row_is_cut_before_a_picture_where_that_is_the_policy(small, spoiled):
    whole = documents.document(made(3), small(), TOKENIZER)
    last = np.flatnonzero(whole.visual_index >= 8)  # of the third picture, in the second turn
    first_answer = int(np.flatnonzero(whole.loss_weights)[0])
    for tokens in range(first_answer + 1, len(whole) + 1):
        config = small(tokens=tokens, overlong="truncate")
        document = documents.document(made(3), config, TOKENIZER)
        inside = last[0] <= tokens - 1 and tokens <= last[-1]
        size = last[0] if inside else tokens
        assert (len(document), document.rejects) == (size, ())
        assert document.truncated == (tokens < len(whole))
        assert len(document.pixels) == len(document.texts) == 2 + (size > last[-1])
        for field in ("tokens", "loss_weights", "visual_index", "image_index"):
            np.testing.assert_array_equal(getattr(document, field), getattr(whole, field)[:size])
    # Nothing of an answer would be left.
    config = small(tokens=first_answer, overlong="truncate")
    assert documents.document(made(3), config, TOKENIZER).rejects == ("too_many_tokens",)


def test_without_images_the_text_stays_and_nothing_visual(small, spoiled):
    config = small(images=False)
    example = made(3)
    document = documents.document(example, config, TOKENIZER)
    assert not (document.tokens == TOKENIZER.image).any()
    assert (document.visual_index == -1).all() and (document.image_index == -1).all()
    assert document.pixels == () and document.texts.shape == (0, 4)
    seen = documents.document(example, small(), TOKENIZER)
    np.testing.assert_array_equal(
        seen.tokens[seen.visual_index < 0][seen.loss_weights[seen.visual_index < 0] > 0],
        document.tokens[document.loss_weights > 0],
    )


def test_prefix_attention_gives_each_prompt_a_block_and_answers_none(small, spoiled):
    document = documents.document(made(3), small(attention="prefix"), TOKENIZER)
    assistant = np.flatnonzero(document.tokens == TOKENIZER.special("<assistant>"))
    ends = np.flatnonzero(document.tokens == TOKENIZER.eos)
    expected = np.zeros(len(document), np.int32)
    expected[: assistant[0] + 1] = 1
    expected[ends[0] + 1 : assistant[1] + 1] = 2
    np.testing.assert_array_equal(document.blocks, expected)
    assert not documents.document(made(3), small(), TOKENIZER).blocks.any()


def test_a_prompt_shows_evaluation_pixels_and_refuses_bad_ones(small, spoiled):
    example, config = made(1), small()
    document = documents.prompt_document(example.turns[:1], example.images, config, TOKENIZER)
    encoder = config.model.encoder
    expected = images.fit(images.decode(example.images[0]), encoder)
    np.testing.assert_array_equal(images.normalised(*document.pixels, encoder), expected)
    assert document.tokens[-1] == TOKENIZER.special("<assistant>")
    with pytest.raises(DataError, match="image 1 of the prompt cannot be used: truncated"):
        cut = example.images[0][:60]
        documents.prompt_document([Turn("user", (ImageRef(0),))], [cut], config, TOKENIZER)
    with pytest.raises(DataError, match="allows 20 and 5"):
        documents.prompt_document([Turn("user", ("word " * 40,))], [], small(tokens=20), TOKENIZER)


def test_a_turn_that_the_template_has_no_place_for_is_counted(small, spoiled):
    turns = (Turn("system", ("be brief",)), *made(0).turns)
    document = documents.document(dataclasses.replace(made(0), turns=turns), small(), TOKENIZER)
    assert (len(document), document.rejects) == (0, ("no_place_for_turn",))
