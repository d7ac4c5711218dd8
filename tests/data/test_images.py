"""Decoding every kind of pixels, and fitting them to the encoder; see also `hostile.py`."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax import config as c
from vlm_jax.data import augmentation, images
from vlm_jax.presets.encoders import Encoder

ENCODER = Encoder(16, 1, 32, 2, patch=4, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(mode: str, size=(48, 64)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (*size[::-1], channels) if channels > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), mode)


# "tRNS" is a palette with alpha.
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "1", "P", "I;16", "tRNS"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "1", "P", "I;16", "CMYK"),
}


@pytest.mark.parametrize(
    "mode, format", [(mode, format) for format, modes in MODES.items() for mode in modes]
)
def test_every_kind_of_pixels_decodes_to_the_rgba_it_stands_for(mode, format):
    rng = np.random.default_rng(1)
    grey, alpha = rng.integers(0, 256, (2, 9, 7), np.uint8)
    colour = rng.integers(0, 256, (9, 7, 3), np.uint8)
    opaque = np.full((9, 7, 1), 255, np.uint8)
    grey3 = np.repeat(grey[..., None], 3, axis=2)
    options = {}
    if mode in ("RGB", "RGBA"):
        expected = np.concatenate([colour, alpha[..., None] if mode == "RGBA" else opaque], 2)
        image = Image.fromarray(expected[..., : len(mode)])
    elif mode == "LA":
        image = Image.fromarray(np.stack([grey, alpha], axis=2), "LA")
        expected = np.concatenate([grey3, alpha[..., None]], axis=2)
    elif mode == "CMYK":
        ink = rng.integers(0, 256, (9, 7, 4), np.uint8)
        image = Image.fromarray(ink, "CMYK")
        # Pillow's plain conversion: each ink dims what is left of the light.
        light = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
        expected = np.concatenate([np.round(light).astype(np.uint8), opaque], axis=2)
    elif mode == "1":
        image = Image.fromarray(np.where(grey > 127, 255, 0).astype(np.uint8)).convert("1")
        expected = np.concatenate([np.where(grey3 > 127, 255, 0).astype(np.uint8), opaque], 2)
    elif mode in ("P", "tRNS"):
        palette = rng.integers(0, 256, (256, 3), np.uint8)
        image = Image.fromarray(grey, "P")
        image.putpalette(palette.tobytes())
        see_through = opaque.copy()
        if mode == "tRNS":
            options = {"transparency": bytes(range(256))}
            see_through = grey[..., None]  # alpha i for palette entry i
        expected = np.concatenate([palette[grey], see_through], axis=2)
    elif mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = np.concatenate([grey3, opaque], axis=2)
    else:
        image, expected = Image.fromarray(grey), np.concatenate([grey3, opaque], axis=2)
    decoded = images.decode(encoded(image, format, **options))
    # CMYK rounds in integers, elsewhere nothing may differ.
    np.testing.assert_allclose(decoded.astype(int), expected.astype(int), atol=mode == "CMYK")


def test_colour_hidden_under_transparent_pixels_never_shows():
    red = np.zeros((32, 32, 4), np.uint8)
    red[8:24, 8:24] = (0, 0, 255, 255)
    green = red.copy()
    green[red[..., 3] == 0] = (0, 255, 0, 0)
    augment = c.Augment(scale=(0.6, 0.6), rotate=30.0)
    for change in (None, augment):
        shown = [images.fit(x, ENCODER, change, np.random.default_rng(0)) for x in (red, green)]
        np.testing.assert_array_equal(*shown)
    assert shown[0][0, 0].tolist() == [1, 1, 1]


def test_evaluation_composites_on_white_and_normalises():
    encoder = dataclasses.replace(ENCODER, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    alpha = rgba[..., 3:] / 255
    shown = rgba[..., :3] / 255 * alpha + 1 - alpha
    expected = (shown - (0.5, 0.4, 0.3)) / (0.5, 0.25, 0.2)
    # Premultiplied 8-bit colours are off by at most half a step.
    np.testing.assert_allclose(
        images.fit(rgba, encoder) * encoder.std, expected * encoder.std, atol=0.6 / 255
    )


def test_augmentation_that_asks_for_nothing_changes_nothing():
    rgba = images.decode(encoded(noise("RGBA")))
    still = images.fit(rgba, ENCODER, c.Augment(), np.random.default_rng(0))
    np.testing.assert_array_equal(still, images.fit(rgba, ENCODER))


NEUTRAL = c.Augment()
CHANGES = {
    "background": "random",
    "scale": (0.6, 0.8),
    "aspect": 0.5,
    "rotate": 30.0,
    "shear": 20.0,
    "translate": 0.3,
    "perspective": 0.5,
    "brightness": 0.3,
    "contrast": 0.5,
    "saturation": 0.9,
    "hue": 0.3,
    "gain": 0.4,
    "grey": 1.0,
    "blur": 2.0,
    "shade": 0.6,
    "noise": 0.2,
    "erase": 1.0,
    "crop": (0.2, 0.8),
    "flip": 0.5,
    "upscale": (80, 100),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(c.Augment)])
def test_every_augmentation_changes_pictures_and_only_by_the_generator(field):
    rgba = images.decode(encoded(noise("RGBA")))
    augment = dataclasses.replace(NEUTRAL, **{field: CHANGES[field]})
    shown = [images.fit(rgba, ENCODER, augment, np.random.default_rng(s)) for s in (*range(9), 0)]
    assert any(not np.array_equal(one, images.fit(rgba, ENCODER)) for one in shown)
    np.testing.assert_array_equal(shown[0], shown[-1])
    if field != "grey":
        assert any(not np.array_equal(one, shown[0]) for one in shown)
    for one in shown:
        assert one.shape == (8, 8, 3) and one.dtype == np.float32
        assert one.min() >= 0 and one.max() <= 1


def test_a_quarter_turn_is_the_transposed_picture(monkeypatch):
    rgba = images.decode(encoded(noise("RGB", (8, 8))))

    class Turned:
        """Draws the largest rotation and no other change."""

        def uniform(self, low, high, size=None):
            return 0.0 if size is None else np.eye(1, size).ravel()

        def random(self, *_):
            return 1.0

    turned = images.fit(rgba, ENCODER, c.Augment(rotate=90.0), Turned())
    np.testing.assert_allclose(turned, np.rot90(images.fit(rgba, ENCODER), -1), atol=2 / 255)


def test_hue_turns_red_into_green_and_keeps_grey():
    third = augmentation._hue_rotation(2 * np.pi / 3)
    np.testing.assert_allclose(third @ (1, 0, 0), (0, 1, 0), atol=1e-12)
    np.testing.assert_allclose(augmentation._hue_rotation(1.234) @ (1, 1, 1), (1, 1, 1), atol=1e-12)


def test_patches_come_in_reading_order_as_row_column_channel():
    pixels = np.arange(8 * 12 * 3, dtype=np.float32).reshape(8, 12, 3)
    patches = images.patchify(pixels, 4)
    assert patches.shape == (6, 48)
    np.testing.assert_array_equal(patches[4], pixels[4:8, 4:8].ravel())


# Lines of 42, 48, 168 and 192 bytes: copied whole, or in several units of 16 bytes.
@pytest.mark.parametrize(("patch", "dtype"), [(14, "u1"), (16, "u1"), (14, "f4"), (16, "f4")])
def test_patches_are_put_where_patchify_has_them(patch, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (2 * patch, 3 * patch, 3)).astype(dtype)
    out = np.zeros((6, patch * patch * 3), dtype)
    images.put_patches(pixels, patch, out)
    np.testing.assert_array_equal(out, images.patchify(pixels, patch))
