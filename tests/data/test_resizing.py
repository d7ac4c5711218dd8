"""Resize modes against the published image processors, before normalisation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resizing_theirs import TORCHVISION, picture, table

from vlm_jax.config import Augment
from vlm_jax.data import augmentation, images, resizing, steps

GOLDENS = Path(__file__).parents[1] / "goldens" / "resizing.npz"
# Wide, tall, and smaller than a tile.
SMALL = ((37, 61), (83, 20), (5, 7))
SIZES = ((375, 500), (501, 334), (336, 336), (40, 1000), (1000, 41), (2, 3), (1, 1), (700, 702))


def views(row, image):
    made = resizing.plan((image.height, image.width), row.encoder)
    found = [np.asarray(view) for view in steps.apply(image, made)]
    assert tuple(view.shape[:2] for view in found) == made.sizes
    return found


def assert_equal_views(ours, theirs):
    assert [view.shape for view in ours] == [view.shape for view in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        # Goldens are whole levels, of which half a one may be the rounding.
        np.testing.assert_allclose(mine.astype(float), other.astype(float), atol=1)


@pytest.mark.parametrize("name", table())
def test_every_mode_gives_the_pixels_of_the_published_processor(name):
    with np.load(GOLDENS) as goldens:
        for height, width in SMALL:
            prefix = f"{name}/{height}x{width}/"
            count = sum(key.startswith(prefix) for key in goldens.files)
            theirs = [goldens[f"{prefix}{n}"] for n in range(count)]
            assert_equal_views(views(table()[name], picture(height, width, 0.1)), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in table() if name not in TORCHVISION])
def test_noise_of_odd_sizes_comes_out_as_transformers_makes_it(name):
    row = table(patch=28)[name]
    theirs = row.theirs()
    for height, width in SIZES:
        if name == "idefics2_split" and min(height, width) == 1:
            continue  # theirs cuts an empty quarter
        image = picture(height, width)
        assert_equal_views(views(row, image), theirs(image))


@pytest.mark.parametrize("name", table())
@pytest.mark.parametrize("size", [(1, 16_384), (16_384, 1)])
def test_no_view_of_a_long_picture_makes_a_huge_one(name, size):
    row = table()[name]
    largest = 0
    original = Image.new

    def watched(mode, size, *rest):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return original(mode, size, *rest)

    made = resizing.plan(size, row.encoder)
    for step in {step for view in made.views for step in view}:
        if isinstance(step, steps.Scale | steps.Window):
            largest = max(largest, step.height * step.width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "new", watched)
        found = steps.apply(original("RGB", size[::-1]), made)
    assert tuple((view.height, view.width) for view in found) == made.sizes
    assert largest <= 2**24


def test_a_transparent_picture_has_the_views_of_the_same_picture_on_white():
    rgb = picture(61, 90, 0.1)
    alpha = Image.fromarray(np.asarray(picture(61, 90, 0.1))[..., 0])
    clear = rgb.copy()
    clear.putalpha(alpha)
    white = Image.new("RGBA", rgb.size, "white")
    flat = Image.alpha_composite(white, clear).convert("RGB")
    for name in ("siglip", "clip", "siglip2", "idefics2_split", "idefics3", "nanovlm"):
        encoder = table(patch=4)[name].encoder
        (ours,), (expected,) = (images.fit_all(x, (encoder,)) for x in (clear, flat))
        for mine, other in zip(ours, expected, strict=True):
            # Where a filter overshoots white, the flat picture is cut off there.
            difference = np.abs(mine - other)
            assert difference.mean() < 2 / 255 and difference.max() < 20 / 255


def test_an_opaque_picture_gives_the_same_pixels_with_and_without_alpha():
    encoder = table(patch=4)["siglip"].encoder
    rgb = picture(61, 90)
    rgba = rgb.convert("RGBA")
    rgba.putpixel((0, 0), (*rgba.getpixel((0, 0))[:3], 254))
    # Far from the one pixel that is not opaque, what the slow path gives.
    np.testing.assert_allclose(
        images.fit(rgb, encoder)[6:], images.fit(rgba, encoder)[6:], atol=2e-6
    )
    np.testing.assert_array_equal(
        images.fit(rgb, encoder), images.fit(np.asarray(rgb.convert("RGBA")), encoder)
    )


def test_random_crops_have_the_area_and_aspect_they_are_allowed():
    augment = Augment(crop=(0.2, 0.6))
    areas = []
    for seed in range(300):
        (part,) = augmentation.shown((300, 400), augment, np.random.default_rng(seed))
        assert part.top >= 0 and part.left >= 0
        assert part.top + part.height <= 300 and part.left + part.width <= 400
        assert 0.74 < part.width / part.height < 1.35
        areas.append(part.height * part.width / 120_000)
    assert 0.19 < min(areas) < 0.25 and 0.55 < max(areas) < 0.61
    assert np.mean(areas) == pytest.approx(0.4, abs=0.02)
    (middle,) = augmentation.shown((10, 1000), augment, np.random.default_rng(0))
    assert middle[:4] == (0, 493, 10, 13)


def test_flips_come_as_often_as_asked_and_exchange_left_and_right():
    encoder = table(patch=4)["siglip"].encoder
    image = picture(12, 12)
    straight, flipped = (images.fit(x, encoder) for x in (image, image.transpose(0)))
    count = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        seen = images.fit(image, encoder, Augment(flip=0.25), rng)
        count += np.array_equal(seen, flipped)
        assert np.array_equal(seen, flipped) or np.array_equal(seen, straight)
    assert count == pytest.approx(100, abs=25)


def test_up_scaling_enlarges_small_pictures_only_and_keeps_their_shape():
    augment, found = Augment(upscale=(378, 980)), []
    for seed in range(200):
        (scaled,) = augmentation.shown((100, 300), augment, np.random.default_rng(seed))
        assert scaled.height == round(scaled.width / 3)
        found.append(scaled.width)
        (larger,) = augmentation.shown((800, 500), augment, np.random.default_rng(seed))
        assert 800 <= larger.height <= 980
    assert min(found) < 400 and max(found) > 960 and min(found) >= 378 and max(found) <= 980
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert augmentation.shown((980, 20), augment, rng) == ()
    assert augmentation.shown((98, 20), Augment(), rng) == ()
    assert rng.bit_generator.state == before


def test_views_of_any_size_fit_the_encoder():
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, np.exp(rng.uniform(0, np.log(5000), 2)))) for _ in range(150)]
    for name, row in table(patch=14).items():
        encoder, how = row.encoder, row.encoder.resize
        fewest = how.fewest(encoder)
        assert min(len(resizing.plan(size, encoder).views) for size in sizes) >= fewest
        for size in sizes:
            made = resizing.plan(size, encoder)
            rows, columns = made.tiles
            assert len(made.views) == rows * columns + 1 and made.whole in (0, rows * columns)
            if how.mode not in how.NATIVE:
                assert set(made.sizes) == {encoder.size}, name
                continue
            for height, width in made.sizes:
                patches = (height // encoder.patch) * (width // encoder.patch)
                assert height % encoder.patch == width % encoder.patch == 0
                assert 1 <= patches <= encoder.max_patches, (name, size)
