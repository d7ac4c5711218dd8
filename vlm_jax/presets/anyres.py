"""LLaVA-NeXT's tiles: which visual tokens of a picture stand in the sequence, in which order.

A picture is fitted into the resolution, one of a list, that wastes the least; that is cut into
tiles of the encoder's size, row by row, behind the whole picture as the first tile. Sizes are
(height, width) throughout. As `LlavaNextModel.pack_image_features` of transformers.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from vlm_jax.errors import ConfigError

Size = tuple[int, int]


def best_resolution(size: Size, resolutions: Iterable[Size]) -> Size:
    """The resolution that keeps most of a picture's pixels, and of those alike the smallest."""

    def merit(resolution: Size) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - height * width

    return max(((height, width) for height, width in resolutions), key=merit)


def tiling(size: Size, resolutions: Iterable[Size], side: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a picture, without the whole picture.

    Raises:
      ConfigError: tiles of this side do not fill its resolution.
    """
    best = best_resolution(size, resolutions)
    if any(length % side for length in best):
        raise ConfigError(f"image_grid_pinpoints has {best}; expected multiples of {side} pixels")
    return best[0] // side, best[1] // side


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Rows and columns of a grid that a picture fills, once it is fitted into the grid's middle."""
    (height, width), (rows, columns) = size, grid

    def middle(places: int, length: int, scale: float) -> slice:
        # Rounded as transformers does: a product just below a whole number is that number.
        padding = (places - int(round(length * scale, 7))) // 2
        return slice(padding, places - padding)

    if width / height > columns / rows:
        return middle(rows, height, columns / width), slice(0, columns)
    return slice(0, rows), middle(columns, width, rows / height)


def visual_tokens(size: Size, tiles: tuple[int, int], grid: Size) -> Int[np.ndarray, " n"]:
    """The visual tokens of a picture as they stand in the sequence.

    Args:
      size: of the picture before it was fitted.
      tiles: rows and columns of tiles.
      grid: rows and columns of the visual tokens of a tile, which has its newline behind them.

    Returns:
      Indices into the visual tokens of all its tiles: those of the whole picture, then those of
      the tiles put together, without what is padding, with a newline behind each row.
    """
    (down, across), (rows, columns) = tiles, grid
    newline = rows * columns
    first = (1 + np.arange(down * across)) * (newline + 1)
    index = first[:, None] + np.arange(newline)
    index = index.reshape(down, across, rows, columns).transpose(0, 2, 1, 3)
    index = index.reshape(down * rows, across * columns)
    index = index[unpadded(size, index.shape)]
    lines = np.concatenate([index, np.full((len(index), 1), newline)], axis=1)
    return np.concatenate([np.arange(newline), lines.ravel()])
