"""Pictures out of a Batch: what an encoder is given, turned back into what people see."""

import base64
import io

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vlm_jax.batch import Images
from vlm_jax.presets.encoders import Encoder

MISSING = (255, 0, 255)  # colour of patches that a picture should have and the batch has not


def slots(images: Images, row: int) -> list[int]:
    """The image slots of a row that hold a picture."""
    return np.flatnonzero((images.grids[row] > 0).all(axis=-1)).tolist()


def picture(images: Images, row: int, slot: int, encoder: Encoder) -> UInt8[np.ndarray, "h w 3"]:
    """One picture as its encoder sees it: whole pixels, or put together from its patches."""
    if images.pixels is not None:
        return _denormalised(images.pixels[row, slot], encoder)
    own = images.patch_images[row] == slot
    patches, places = images.patches[row][own], images.patch_positions[row][own]
    pixels = unpatchify(patches, places, images.grids[row, slot], encoder.patch)
    return _denormalised(pixels, encoder)


def unpatchify(
    patches: Float[np.ndarray, "p patch_dim"],
    places: Int[np.ndarray, "p 2"],
    grid: Int[np.ndarray, " 2"],
    patch: int,
) -> Float[np.ndarray, "h w 3"]:
    """The pixels whose patches these are, in any order; the inverse of `images.patchify`.

    Pixels of places without a patch are NaN.
    """
    rows, columns = grid
    placed = np.full((rows, columns, patch, patch, 3), np.nan, np.float32)
    placed[places[:, 0], places[:, 1]] = patches.reshape(-1, patch, patch, 3)
    return placed.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)


def _denormalised(pixels: Float[np.ndarray, "h w 3"], encoder: Encoder) -> np.ndarray:
    shown = pixels * np.float32(encoder.std) + np.float32(encoder.mean)
    missing = np.isnan(shown).any(axis=-1)
    shown = np.round(255 * np.nan_to_num(shown).clip(0, 1)).astype(np.uint8)
    shown[missing] = MISSING
    return shown


def data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as a URI that holds it as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
