"""From the arrays that encoders of transformers take to our Images, each picture in its own row.

Pictures of another size than the preset's, or with more patches, need no other weights: what comes
back is the preset with room for them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.batch import Images
from vlm_jax.errors import DataError
from vlm_jax.weights import inputs
from vlm_jax.weights.inputs import Arrays, array


class Seen(NamedTuple):
    """Pictures, and texts where the model reads both.

    Attributes:
      encoder: its preset, with room for the pictures.
      images: the pictures.
      tokens: int [m, T] of the texts.
      mask: bool [m, T], True where there is a token.
    """

    encoder: Any
    images: Images
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None


class Way(NamedTuple):
    """How a class of transformers is given pictures.

    Attributes:
      names: the keywords of its `forward` that we take.
      see: an encoder's preset and the arrays -> what is seen.
    """

    names: tuple[str, ...]
    see: Callable[[Any, Arrays], Seen]


def alone(way: Way, encoder: Any, arrays: Arrays) -> Seen:
    """What an encoder alone is given.

    Raises:
      ConfigError: an array that the model does not take.
      DataError: an array is missing or of another shape.
    """
    inputs.refuse_unknown(arrays, way.names)
    return way.see(encoder, arrays)


def with_texts(way: Way, encoder: Any, arrays: Arrays) -> Seen:
    """The same with texts, as `input_ids` and `attention_mask`; see `alone`."""
    inputs.refuse_unknown(arrays, (*way.names, *inputs.TEXT))
    tokens = array(arrays, "input_ids", 2).astype(np.int32)
    mask = np.asarray(arrays.get("attention_mask", np.ones(tokens.shape))).astype(bool)
    if mask.shape != tokens.shape:
        raise DataError(f"attention_mask has shape {mask.shape}; input_ids has {tokens.shape}")
    return way.see(encoder, arrays)._replace(tokens=tokens, mask=mask)


def _whole(encoder: Any, arrays: Arrays) -> Seen:
    """Pictures of the size that the weights are made for."""
    return Seen(encoder, inputs.pictures(encoder, array(arrays, "pixel_values", 4)))


def _any_size(encoder: Any, arrays: Arrays) -> Seen:
    """Pictures of any size, of which a convolutional network makes another grid."""
    height, width = array(arrays, "pixel_values", 4).shape[2:]
    return _whole(dataclasses.replace(encoder, image_size=(height, width)), arrays)


def _resized(encoder: Any, arrays: Arrays) -> Seen:
    """Pictures of any size, to whose grid the table of positions is resized."""
    height, width = array(arrays, "pixel_values", 4).shape[2:]
    patch, table = encoder.patch, encoder.table_grid
    size = (height - height % patch, width - width % patch)
    return _whole(dataclasses.replace(encoder, image_size=size, position_grid=table), arrays)


def _resized_on_demand(encoder: Any, arrays: Arrays) -> Seen:
    """The same where the flag of transformers says so."""
    see = _resized if arrays.get("interpolate_pos_encoding", False) else _whole
    return see(encoder, arrays)


def _naflex(encoder: Any, arrays: Arrays) -> Seen:
    """Flattened patches of images with grids of their own, row by row."""
    patches = array(arrays, "pixel_values", 3)
    grids = array(arrays, "spatial_shapes", 2).astype(np.int32)
    there = array(arrays, "pixel_attention_mask", 2).astype(bool)
    number = np.arange(patches.shape[1])
    if grids.shape[1:] != (2,) or grids.min() < 1 or grids.prod(axis=1).max() > len(number):
        raise DataError(
            f"spatial_shapes are {grids.tolist()}; expected rows and columns of at most the "
            f"{len(number)} patches of pixel_values"
        )
    columns = grids[:, 1:]
    places = np.stack([number // columns, number % columns], axis=-1)
    places = np.where((number < grids.prod(axis=1)[:, None])[..., None], places, 0)
    return _with_grids(encoder, patches, grids, places, there)


def _flattened(encoder: Any, arrays: Arrays) -> Seen:
    """Patches with their row and column before them, counted from 1; 0 is padding's."""
    whole = array(arrays, "flattened_patches", 3)
    there = whole.sum(axis=-1) != 0
    if "attention_mask" in arrays:
        there = array(arrays, "attention_mask", 2).astype(bool)
    places = whole[..., :2].astype(np.int32)
    known = encoder.table_grid[0]
    if there.shape == places.shape[:2] and (places[there] <= 0).any():
        raise DataError(
            "flattened_patches have row or column 0, that of padding, where attention_mask (by "
            "default wherever they are not 0) says that there is a patch"
        )
    if places.min() < 0 or places.max() >= known:
        raise DataError(
            f"flattened_patches have rows or columns {places.min()} to {places.max()}; "
            f"expected 0, that of padding, to {known - 1}"
        )
    return _with_grids(
        encoder, whole[..., 2:], places.max(axis=1), np.maximum(places - 1, 0), there
    )


def _padded(encoder: Any, arrays: Arrays) -> Seen:
    """Whole images in the upper left corner of the largest, and which of its patches are theirs."""
    pixels = array(arrays, "pixel_values", 4).transpose(0, 2, 3, 1)
    patch, (n, *sides) = encoder.patch, pixels.shape[:3]
    rows, columns = (side // patch for side in sides)
    there = np.ones((n, rows, columns), bool)
    if "patch_attention_mask" in arrays:
        there = array(arrays, "patch_attention_mask", 3).astype(bool)
    if there.shape != (n, rows, columns):
        raise DataError(
            f"patch_attention_mask has shape {there.shape}; expected {(n, rows, columns)}"
        )
    grids = inputs.corners(there, "patch_attention_mask")
    there = there.reshape(n, -1)
    # Padding stands at the first place, as theirs does: its features come out the same.
    places = np.where(there[..., None], np.indices((rows, columns)).reshape(2, -1).T, 0)
    patches = inputs.patchify(pixels[:, : rows * patch, : columns * patch], patch)
    return _with_grids(encoder, patches, grids, places, there)


def _with_grids(encoder: Any, patches, grids, places, there) -> Seen:
    """Images of patches, where each has a grid of its own.

    Args:
      encoder: the preset.
      patches: [n, P, patch * patch * 3].
      grids: [n, 2], rows and columns.
      places: [n, P, 2], row and column of each patch.
      there: bool [n, P], False for padding.

    Raises:
      DataError: they do not fit together.
    """
    n, count, values = patches.shape
    expected = {"patches": (n, count, 3 * encoder.patch**2), "grids": (n, 2), "mask": (n, count)}
    found = {"patches": (n, count, values), "grids": grids.shape, "mask": there.shape}
    for name, shape in expected.items():
        if found[name] != shape:
            raise DataError(f"the {name} of pictures have shape {found[name]}; expected {shape}")
    images = Images(
        grids[:, None].astype(np.int32),
        patches=patches.astype(np.float32),
        patch_positions=places.astype(np.int32),
        patch_images=np.where(there, 0, -1).astype(np.int32),
    )
    return Seen(dataclasses.replace(encoder, max_patches=count), images)


WHOLE = Way(("pixel_values",), _whole)
ANY_SIZE = Way(("pixel_values",), _any_size)
RESIZED = Way(("pixel_values",), _resized)
RESIZED_ON_DEMAND = Way(("pixel_values", "interpolate_pos_encoding"), _resized_on_demand)
NAFLEX = Way(("pixel_values", "pixel_attention_mask", "spatial_shapes"), _naflex)
FLATTENED = Way(("flattened_patches", "attention_mask"), _flattened)
PADDED = Way(("pixel_values", "patch_attention_mask"), _padded)
