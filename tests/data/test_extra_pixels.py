"""Pictures for several encoders: one picture, changed once, in every encoder's own size."""

import dataclasses

import numpy as np
import pytest

from vlm_jax.config import Augment
from vlm_jax.data import documents, images, packing, pipeline, sources, tokenizer
from vlm_jax.errors import ConfigError
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.presets.encoders import Encoder

TOKENIZER = tokenizer.load("embedded")
FIRST = Encoder(16, 1, 32, 2, patch=4, image_size=8)
LARGER = ConvNet(
    convnext_stages((1,), (8,)), 8, image_size=24, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3
)


def seen_by_two(config, extra=LARGER):
    """The config with a second encoder."""
    model = dataclasses.replace(config.model, extra_encoders=(extra,))
    return dataclasses.replace(config, model=model)


def smooth(side: int = 64) -> np.ndarray:
    """A picture without detail, so that it looks the same in all sizes."""
    y, x = np.mgrid[:side, :side] / side
    colours = np.stack([x, y, 1 - x * y, np.ones_like(x)], axis=-1)
    return (255 * colours).astype(np.uint8)


def plain(pixels: np.ndarray, encoder) -> np.ndarray:
    return pixels * np.float32(encoder.std) + np.float32(encoder.mean)


def test_encoders_of_one_size_see_the_same_picture_and_draws_end_as_with_one(small):
    strong = small().data.augment
    other = dataclasses.replace(FIRST, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for seed in range(20):
        rng, alone = np.random.default_rng(seed), np.random.default_rng(seed)
        (one,), (two,) = images.fit_all(smooth(), (FIRST, other), strong, rng)
        np.testing.assert_array_equal(one, images.fit(smooth(), FIRST, strong, alone))
        np.testing.assert_allclose(plain(one, FIRST), plain(two, other), atol=1e-6)
        assert rng.bit_generator.state == alone.bit_generator.state


@pytest.mark.parametrize("sizes", [(24, 12), (12, 24)], ids=["smaller", "larger"])
def test_encoders_of_other_sizes_see_the_same_changes(small, sizes):
    encoders = [dataclasses.replace(FIRST, image_size=size) for size in sizes]
    augment = dataclasses.replace(small().data.augment, blur=2.0, shade=0.5, erase=1.0)
    for seed in range(30):
        found = images.fit_all(smooth(), encoders, augment, np.random.default_rng(seed))
        less, more = sorted(
            (plain(*pair) for pair in zip([v for (v,) in found], encoders)), key=len
        )
        averaged = more.reshape(12, 2, 12, 2, 3).mean((1, 3))
        # What is left are edges; rectangles of their own would leave up to 0.09.
        assert np.abs(averaged - less).mean() < 0.05, seed


def test_noise_keeps_its_strength_in_another_size():
    encoders = [dataclasses.replace(FIRST, image_size=size) for size in (16, 40)]
    grey = np.full((40, 40, 4), 128, np.uint8) | np.array([0, 0, 0, 255], np.uint8)
    augment = Augment(noise=0.1)
    (small,), (large,) = images.fit_all(grey, encoders, augment, np.random.default_rng(1))
    assert large.std() == pytest.approx(small.std(), rel=0.05) and small.std() > 0.01


def test_a_further_encoder_changes_nothing_that_was_there(small, spoiled):
    spoiled[5] = b"bad"
    config = small(encoder={"stem": "conv"})
    one, two = (pipeline.train_stream(c) for c in (config, seen_by_two(config)))
    for _ in range(3):
        (first, info), (both, same) = next(one), next(two)
        assert info == same and len(both.extra_images) == 1 and not first.extra_images
        for mine, other in zip(first, both._replace(extra_images=())):
            for x, y in zip(
                *(part if isinstance(part, tuple) else (part,) for part in (mine, other))
            ):
                np.testing.assert_array_equal(x, y)
        extra = both.extra_images[0]
        assert extra.pixels.shape == (3, 5, 24, 24, 3)
        there = both.images.grids.any(axis=-1)
        np.testing.assert_array_equal(extra.grids.any(axis=-1), there)
        assert not extra.pixels[~there].any()
    assert one.get_state()["fingerprint"].items() < two.get_state()["fingerprint"].items()


def test_every_slot_holds_the_same_picture_for_all_encoders(small, spoiled):
    spoiled[2] = b"bad"
    patched = dataclasses.replace(FIRST, image_size=16)
    config = seen_by_two(small(encoder={"stem": "conv"}, augment=Augment()), patched)
    source = sources.open_source("made:one", "train")
    examples = [source.example(i, np.random.default_rng(i)) for i in (3, 2, 1)]
    made = [documents.document(example, config, TOKENIZER) for example in examples]
    assert made[1].rejects and not np.any(made[1].pixels) and not np.any(made[1].extra_pixels)
    shape = packing.shape_of(config, TOKENIZER.pad, rows=2, images=6, tokens=256)
    batch = packing.assemble([[], made], shape)
    extra, pictures = batch.extra_images[0], [p for d in made for p in d.extra_pixels[0]]
    assert len(pictures) == 6 and (extra.patch_images[0] == -1).all()
    for slot, picture in enumerate(pictures):
        patches = extra.patches[1][extra.patch_images[1] == slot]
        np.testing.assert_array_equal(patches, images.patchify(picture, 4))
        assert tuple(extra.grids[1, slot]) == (4, 4)


def test_a_position_of_other_sizes_is_refused(small, spoiled):
    config = small()
    state = pipeline.train_stream(seen_by_two(config)).get_state()
    other = seen_by_two(config, dataclasses.replace(LARGER, image_size=32))
    for changed in (config, other):
        with pytest.raises(ConfigError, match="extra_image_sizes"):
            pipeline.train_stream(changed).set_state(state)
