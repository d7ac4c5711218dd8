"""Scenes: placement keeps its promises, and compositing leaves no fringes."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import scenes


def png(rgba: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGBA"
        return np.asarray(image)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_counted_boxes_stay_on_the_canvas_and_apart(count):
    for seed in range(200):
        covered = np.zeros((scenes.CANVAS, scenes.CANVAS), int)
        boxes = scenes.count_boxes(count, np.random.default_rng(seed))
        for box in boxes:
            covered[box.top : box.top + box.size, box.left : box.left + box.size] += 1
        assert covered.max() == 1
        assert covered.sum() == count * scenes.COUNT_SIZE**2


@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_a_pair_stands_as_asked_and_not_as_the_opposite(relation):
    for seed in range(200):
        one, other = scenes.pair_boxes(relation, np.random.default_rng(seed))
        # written out, not with the module's own predicate
        gap = {
            "left of": other.left - (one.left + one.size),
            "right of": one.left - (other.left + other.size),
            "above": other.top - (one.top + one.size),
            "below": one.top - (other.top + other.size),
        }[relation]
        assert gap >= 0
        for box in (one, other):
            assert 0 <= box.top <= scenes.CANVAS - box.size
            assert 0 <= box.left <= scenes.CANVAS - box.size
        assert scenes.holds(relation, one, other)
        assert scenes.holds(scenes.OPPOSITE[relation], other, one)
        assert not scenes.holds(scenes.OPPOSITE[relation], one, other)


def test_every_pair_position_can_occur():
    lefts = {
        tuple(box.left for box in scenes.pair_boxes("left of", np.random.default_rng(seed)))
        for seed in range(500)
    }
    slack = scenes.CANVAS - 2 * scenes.PAIR_SIZE
    assert len(lefts) == (slack + 1) * (slack + 2) // 2


def test_shrinking_never_mixes_in_the_colour_of_transparent_pixels():
    # A red disc on transparent green: straight-alpha resizing would give a green fringe.
    rows, columns = np.mgrid[:64, :64] - 31.5
    inside = rows**2 + columns**2 < 28**2
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[inside] = (255, 0, 0, 255)
    rgba[~inside] = (0, 255, 0, 0)
    for size in (scenes.COUNT_SIZE, scenes.PAIR_SIZE):
        small = scenes.thumbnail(png(rgba), size)
        assert small[..., 1].max() == 0
        # premultiplied red equals alpha everywhere: pure red at any coverage
        np.testing.assert_array_equal(small[..., 0], small[..., 3])


def test_over_agrees_with_the_porter_duff_formula_in_floating_point():
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (2, 16, 16, 1))
    colour = rng.integers(0, 256, (2, 16, 16, 3)) * alpha // 255
    top, below = np.concatenate([colour, alpha], -1).astype(np.uint8)
    want = top + below * (1 - top[..., 3:] / 255.0)
    assert np.abs(scenes.over(top, below) - want).max() <= 0.5 + 1e-6


def test_an_encoded_scene_shows_each_picture_in_its_box_only():
    rng = np.random.default_rng(1)
    rgba = rng.integers(1, 256, (64, 64, 4)).astype(np.uint8)
    rgba[..., 3] = 255
    small = scenes.thumbnail(png(rgba), scenes.PAIR_SIZE)
    boxes = scenes.pair_boxes("above", rng)
    shown = decode(scenes.encode(scenes.compose([(small, box) for box in boxes])))
    left = shown.copy()
    for box in boxes:
        window = np.s_[box.top : box.top + box.size, box.left : box.left + box.size]
        np.testing.assert_array_equal(shown[window], small)
        left[window] = 0
    assert not left.any()
