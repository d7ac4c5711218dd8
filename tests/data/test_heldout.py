"""Held-out batches and prompts."""

import dataclasses

import numpy as np
import pytest
from batches import digest, with_pictures

from vlm_jax.batch import Batch
from vlm_jax.data import heldout, tokenizer
from vlm_jax.data.example import ImageRef
from vlm_jax.errors import ConfigError, DataError

TOKENIZER = tokenizer.load("embedded")


def evaluated(config, kind: str, limit: int, images: str = "right"):
    return list(heldout.eval_batches(config, "validation", kind, limit, images))


def test_held_out_rows_are_the_examples_in_order_and_never_change(small):
    config = dataclasses.replace(small(**with_pictures()), seed=1)
    batches = evaluated(config, "choice", 40)
    again = evaluated(dataclasses.replace(config, seed=2), "choice", 40)
    assert [digest(b) for b, _ in batches] == [digest(b) for b, _ in again]
    keys = [key for _, info in batches for ((key, _),) in info.documents]
    assert keys == [e.key for e in heldout.eval_examples(config, "validation", "choice", 40)]
    assert len(set(keys)) == 40
    for batch, _ in batches:
        assert batch.tokens.shape == batches[0][0].tokens.shape
        assert batch.tokens.shape[0] == config.eval.rows and batch.tokens.shape[1] % 32 == 0
    last = batches[-1][0]
    assert not last.segments[40 - config.eval.rows :].any()


@pytest.mark.parametrize("kind", ["caption", "scene", "compare", "yes_no"])
def test_shuffled_images_are_another_examples_and_the_text_stays(small, kind):
    config = small(**with_pictures())
    right, shuffled = (evaluated(config, kind, 33, how) for how in ("right", "shuffled"))
    for (a, _), (b, _) in zip(right, shuffled, strict=True):
        for field in Batch._fields[:7]:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    examples = heldout.eval_examples(config, "validation", kind, 33)
    swapped = heldout.shuffle_images(examples)
    everything = {image for example in examples for image in example.images}
    for old, new in zip(examples, swapped, strict=True):
        assert len(old.images) == len(new.images) and not set(old.images) & set(new.images)
        assert set(new.images) <= everything and old.turns == new.turns
    assert len({e.images for e in swapped}) > len(swapped) // 2


def test_pictures_that_cannot_be_swapped_are_an_error(small):
    (example,) = heldout.eval_examples(small(**with_pictures()), "validation", "caption", 1)
    with pytest.raises(DataError, match="none of 2 examples has other pictures"):
        heldout.shuffle_images([example, example])


def test_without_images_only_text_is_evaluated(small):
    for batch, _ in evaluated(small(**with_pictures()), "yes_no", 5, "none"):
        assert batch.images.grids.shape[1] == 0 and (batch.visual_index == -1).all()
        assert batch.loss_weights.any()
    with pytest.raises(ConfigError, match="expected 'right', 'shuffled' or 'none'"):
        evaluated(small(**with_pictures()), "yes_no", 5, "wrong")


def test_prompts_stand_one_per_row_from_the_left_without_their_answers(small):
    config = small(**with_pictures())
    examples = heldout.eval_examples(config, "validation", "compare", 35)
    prompts = [heldout.prompt_of(example) for example in examples]
    assert all(prompt.turns[-1].role == "user" for prompt in prompts)
    batches = list(heldout.prompt_batches(config, prompts))
    rows = [
        batch.tokens[row][batch.segments[row] > 0]
        for batch in batches
        for row in range(config.eval.rows)
    ]
    assert len(rows) == 64 and all(len(row) for row in rows[:35])
    assert not any(len(row) for row in rows[35:])
    for batch in batches:
        assert (np.diff((batch.segments > 0).astype(int), axis=1) <= 0).all()
    for row, example in zip(rows[:35], examples, strict=True):
        assert row[-1] == TOKENIZER.special("<assistant>")
        asked = example.turns[0].parts[-1]
        assert TOKENIZER.decode(row) == asked


def test_asking_puts_images_before_the_text():
    prompt = heldout.ask("why?", b"1", b"2")
    assert prompt.turns[0].parts == (ImageRef(0), ImageRef(1), "why?")
    assert heldout.ask("", b"1").turns[0].parts == (ImageRef(0),)
