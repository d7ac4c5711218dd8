import dataclasses
import io

import numpy as np
from PIL import Image

from vlm_jax.data.emoji import EmojiSource
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.evaluation import baselines, questions


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def example(answer: str, image: bytes = b"", **meta) -> Example:
    turns = (Turn("user", (ImageRef(0),)), Turn("assistant", (answer,)))
    return Example(answer, "caption", (image,), turns, meta=meta)


def test_the_neighbour_of_an_exact_copy_is_that_picture():
    rng = np.random.default_rng(0)
    train = [example(f"picture {i}", picture(rng), style="noto") for i in range(20)]
    asked = [dataclasses.replace(train[i], meta={"style": "fluent"}) for i in (7, 3, 12)]
    for captions in baselines.Neighbours(train)(asked).values():
        assert captions == ["picture 7", "picture 3", "picture 12"]


def test_the_pool_of_other_styles_leaves_out_the_style_that_is_asked_about():
    rng = np.random.default_rng(1)
    image = picture(rng)
    train = [example("same", image, style="fluent"), example("other", picture(rng), style="noto")]
    found = baselines.Neighbours(train)([example("?", image, style="fluent")])
    assert found["pixels all, 16 px"] == ["same"]
    assert found["pixels other styles, 32 px"] == ["other"]


def test_without_other_styles_there_is_one_pool():
    rng = np.random.default_rng(2)
    train = [example(str(i), picture(rng), style="noto") for i in range(2)]
    assert set(baselines.Neighbours(train)(train)) == {"pixels all, 16 px", "pixels all, 32 px"}


def test_the_neighbour_has_the_largest_cosine_less_the_mean():
    rng = np.random.default_rng(3)
    seen, asked = rng.normal(3, 1, (30, 8)), rng.normal(3, 1, (9, 8))
    mean = seen.mean(0)
    expected = [
        max(range(30), key=lambda i: (s := seen[i] - mean) @ (q - mean) / np.linalg.norm(s))
        for q in asked
    ]
    assert baselines.nearest_rows(seen, asked).tolist() == expected


def test_transparent_pixels_are_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (200, 0, 0, 128)
    white = baselines.on_white(Image.fromarray(rgba))
    assert white[0, 0].tolist() == [200, 0, 0]
    assert white[0, 1].tolist() == [227, 127, 127]  # 128/255 of the colour, the rest white
    assert white[1, 1].tolist() == [255, 255, 255]


def test_the_majority_answer_is_of_the_same_form_and_among_the_options():
    train = [
        example(answer, form=form)
        for form, answers in {"count": "two two one", "same": "Yes no yes."}.items()
        for answer in answers.split()
    ]
    asked = [
        example("?", form="count"),
        example("?", form="same"),
        example("?", form="count", options=("one", "three")),
    ]
    assert baselines.majority(train, asked) == ["two", "yes", "one"]


def test_the_majority_answer_to_yes_or_no_is_right_about_half_the_time():
    train, held = (EmojiSource(split, "yes_no") for split in ("train", "validation"))
    examples = [held[i] for i in range(len(held))]
    answers = baselines.majority([train[i] for i in range(300)], examples)
    rights = [a == questions.reference(e) for a, e in zip(answers, examples, strict=True)]
    # 201 fair coins, five standard errors.
    assert abs(np.mean(rights) - 0.5) < 5 * 0.5 / np.sqrt(len(rights))
