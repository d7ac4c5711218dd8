"""Encoders give for bytes what they give for the same pixels normalised before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import params, stems
from vlm_jax.presets.convnets import ConvNet
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.sam import Sam

COLOURS = {"mean": (0.48, 0.3, 0.6), "std": (0.27, 0.5, 0.2), "dtype": "float32"}
SIZES = {"width": 16, "depth": 1, "mlp": 32, "heads": 2, "patch": 4, "image_size": 16}
STAGES = ((2, 8, 1),)

PRESETS = {
    "patches": Encoder(**SIZES, **COLOURS),
    "hybrid": Encoder(**SIZES, **COLOURS, stem="conv", stem_stages=STAGES),
    "sam": Sam(**SIZES, **COLOURS, global_layers=(0,), window=2, out=8),
    "convnet": ConvNet(((1, 8, 7, 1, 4),), 8, image_size=16, **COLOURS),
}


def images(preset, pixels: np.ndarray) -> Images:
    """A row of one image."""
    grids = np.full((1, 1, 2), preset.grid, np.int32)
    if preset.reads == "pixels":
        return Images(grids, pixels=pixels[None, None])
    rows, columns = preset.grid
    split = pixels.reshape(rows, preset.patch, columns, preset.patch, 3).swapaxes(1, 2)
    return Images(grids, patches=split.reshape(1, rows * columns, -1))


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_normalised_by_the_encoder(name):
    preset = PRESETS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    wanted = ((pixels / 255.0 - preset.mean) / preset.std).astype(np.float32)
    flat = params.init(Model(preset), jax.random.key(0))
    see = jax.jit(lambda images: params.build(Model(preset), flat).encoder(images).x)
    of_bytes, of_floats = see(images(preset, pixels)), see(images(preset, wanted))
    assert np.std(of_floats) > 1e-3
    np.testing.assert_allclose(of_bytes, of_floats, rtol=1e-4, atol=1e-5)


def test_every_byte_is_normalised_to_the_rounding_of_float32():
    preset = dataclasses.replace(PRESETS["patches"], mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 1.0))
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 6, axis=1)
    found = jax.jit(stems.normalised, static_argnums=1)(levels, preset)
    rgb = (levels.reshape(256, 2, 3) / 255.0 - preset.mean) / preset.std
    assert found.dtype == jnp.float32
    # Two roundings: of what the mean takes off, which is at most mean / std, and of the product.
    off = np.abs(found - rgb.reshape(256, 6)).max()
    assert off <= 2 * np.finfo(np.float32).eps * 5
