"""Pictures out of a Batch: what an encoder is given, turned back into what people see."""

import base64
import io

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
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
        return _shown(_levels(images.pixels[row, slot], encoder))
    own = images.patch_images[row] == slot
    patches, places = _levels(images.patches[row][own], encoder), images.patch_positions[row][own]
    return _shown(unpatchify(patches, places, images.grids[row, slot], encoder.patch))


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


def _levels(pixels: Shaped[np.ndarray, "... C"], encoder: Encoder) -> Float[np.ndarray, "... C"]:
    """What a batch holds, pixels or patches, as levels from 0 to 255."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32)
    std, mean = (
        np.resize(np.float32(rgb), pixels.shape[-1]) for rgb in (encoder.std, encoder.mean)
    )
    return 255 * (pixels * std + mean)


def _shown(levels: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    missing = np.isnan(levels).any(axis=-1)
    shown = np.round(np.nan_to_num(levels).clip(0, 255)).astype(np.uint8)
    shown[missing] = MISSING
    return shown


def data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as a URI that holds it as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
