"""From the arrays that transformers' `forward` takes to our Batch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError

Arrays = Mapping[str, np.ndarray]
TEXT = ("input_ids", "attention_mask")


class Picture(NamedTuple):
    """How a picture stands in the sequence.

    Attributes:
      images: into how many images of the batch it was cut.
      tokens: which of their visual tokens stand there, counted from the first of its images.
    """

    images: int
    tokens: np.ndarray


class Prompts(NamedTuple):
    """Prompts with their padding moved to the right.

    Attributes:
      batch: the prompts.
      order: int [B, T], where in the given row each position of the batch stood.
    """

    batch: Batch
    order: np.ndarray

    def moved(self, array: np.ndarray) -> np.ndarray:
        """What is given per position [B, T, ...], at the positions of the batch."""
        order = self.order.reshape(*self.order.shape, *(1,) * (array.ndim - 2))
        return np.take_along_axis(array, order, axis=1)

    def back(self, array: np.ndarray) -> np.ndarray:
        """What belongs to the positions of the batch [B, T, ...], at those of the given rows."""
        back = np.argsort(self.order, axis=1)
        return np.take_along_axis(
            array, back.reshape(*back.shape, *(1,) * (array.ndim - 2)), axis=1
        )


def text(arrays: Arrays, others: Sequence[str] = ()) -> Prompts:
    """Text as `input_ids` and `attention_mask`, padded on either side.

    Args:
      arrays: by keyword.
      others: names that are looked at elsewhere.

    Raises:
      ConfigError: an array that the model does not take.
      DataError: an array is missing or of another shape.
    """
    refuse_unknown(arrays, (*TEXT, *others))
    tokens = array(arrays, "input_ids", 2).astype(np.int32)
    mask = arrays.get("attention_mask")
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape:
        raise DataError(f"attention_mask has shape {real.shape}; input_ids has {tokens.shape}")
    edges = np.diff(np.pad(real, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    if ((edges == 1).sum(axis=1) > 1).any():
        raise DataError("attention_mask has holes; expected padding before or behind the text only")
    order = np.argsort(~real, axis=1, kind="stable")
    moved = np.take_along_axis(real, order, axis=1)
    nothing = np.full(tokens.shape, -1, np.int32)
    batch = Batch(
        tokens=np.where(moved, np.take_along_axis(tokens, order, axis=1), 0),
        segments=moved.astype(np.int32),
        positions=np.where(moved, np.arange(tokens.shape[1]), 0).astype(np.int32),
        loss_weights=np.zeros(tokens.shape, np.float32),
        blocks=np.zeros(tokens.shape, np.int32),
        visual_index=nothing,
        image_index=nothing,
        image_texts=np.zeros((len(tokens), 0, 0), np.int32),
        images=Images(np.zeros((len(tokens), 0, 2), np.int32)),
    )
    return Prompts(batch, order)


def pictures(encoder, pixels: np.ndarray) -> Images:
    """Pictures [n, 3, H, W] of the encoder's size, each in a row of its own.

    Raises:
      DataError: they are of another size.
    """
    x = np.asarray(pixels, np.float32).transpose(0, 2, 3, 1)
    height, width = encoder.size
    patch = getattr(encoder, "patch", 1)
    # What is left of the last whole patch is never looked at (384 pixels, patches of 14).
    if tuple(side // patch for side in x.shape[1:3]) != (height // patch, width // patch):
        raise DataError(
            f"pixel_values are of {x.shape[1:3]} pixels; the model takes {height, width}"
        )
    x = x[:, :height, :width]
    grids = np.tile(np.int32(encoder.grid), (len(x), 1, 1))
    if encoder.reads == "pixels":
        return Images(grids, pixels=x[:, None])
    patches = patchify(x, encoder.patch)
    return Images(
        grids,
        patches=patches,
        patch_positions=np.tile(_positions(encoder.grid), (len(x), 1, 1)),
        patch_images=np.zeros(patches.shape[:2], np.int32),
    )


def padded_pictures(encoder, arrays: Arrays, whole: bool) -> Images:
    """Pictures `pixel_values` [B, N, 3, H, W] of their own sizes, each in a row of its own.

    Pictures that are all zero are padding. `pixel_attention_mask` [B, N, H, W] says which pixels
    are there; by default all are.

    Args:
      encoder: of that size, with room for a patch at every place.
      arrays: by keyword.
      whole: whether only patches whose pixels are all there count, or any of which one is.

    Raises:
      DataError: an array is of another shape, or no patch of a picture counts.
    """
    pixels = array(arrays, "pixel_values", 5).astype(np.float32)
    mask = np.asarray(arrays.get("pixel_attention_mask", np.ones(1))) > 0
    if "pixel_attention_mask" in arrays and mask.shape != (*pixels.shape[:2], *pixels.shape[3:]):
        raise DataError(
            f"pixel_attention_mask has shape {mask.shape}; pixel_values have {pixels.shape}"
        )
    real = (pixels != 0).any(axis=(2, 3, 4))
    height, width = encoder.size
    x = pixels[real][:, :, :height, :width].transpose(0, 2, 3, 1)
    mask = np.broadcast_to(mask, (*pixels.shape[:2], *pixels.shape[3:]))[real]
    squares = patchify(mask[:, :height, :width, None], encoder.patch)
    there = squares.all(axis=-1) if whole else squares.any(axis=-1)
    if not there.any(axis=-1).all():
        raise DataError("pixel_attention_mask leaves no patch of an image")
    grids = corners(there.reshape(-1, *encoder.grid), "pixel_attention_mask")
    # Padding has the position of the first patch: connectors without a mask see what becomes of it.
    positions = np.where(there[..., None], _positions(encoder.grid), 0)
    return Images(
        grids.astype(np.int32)[:, None],
        patches=patchify(x, encoder.patch),
        patch_positions=positions.astype(np.int32),
        patch_images=np.where(there, 0, -1).astype(np.int32),
    )


def corners(there: np.ndarray, name: str) -> np.ndarray:
    """Rows and columns [n, 2] of images that fill the upper left corners of grids [n, h, w].

    Raises:
      DataError: an image is no such rectangle; `name` is that of the mask.
    """
    grids = np.stack([there[:, :, 0].sum(axis=1), there[:, 0].sum(axis=1)], axis=1)
    rows, columns = np.indices(there.shape[1:])
    if ((rows < grids[:, :1, None]) & (columns < grids[:, 1:, None]) != there).any():
        raise DataError(f"{name} has holes; expected images in the upper left corner, and padding")
    return grids


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Pictures [n, H, W, C] as flattened patches [n, P, patch * patch * C], row by row."""
    n, height, width, channels = pixels.shape
    x = pixels.reshape(n, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, patch * patch * channels)


def _positions(grid: tuple[int, int]) -> np.ndarray:
    return np.indices(grid, dtype=np.int32).reshape(2, -1).T


def in_sequence(
    prompts: Prompts,
    model: Model,
    token: int,
    images: Images,
    pictures: Sequence[Picture] | None = None,
    texts: np.ndarray | None = None,
) -> Prompts:
    """Prompts whose placeholders stand for the visual tokens of pictures, in reading order.

    Args:
      prompts: the text.
      model: says how many visual tokens an image has.
      token: id of the placeholder.
      images: one per row, in the order of the placeholders of all prompts.
      pictures: what they are parts of; by default each is a picture whose visual tokens all stand
        there.
      texts: int [n, S], the second text of each image, 0 = padding.

    Raises:
      DataError: the placeholders of a row are not those of whole pictures.
    """
    batch, per_image = prompts.batch, model.visual_tokens
    if pictures is None:
        pictures = [Picture(1, np.arange(per_image))] * len(images.grids)
    here = (batch.tokens == token) & (batch.segments > 0)
    owned = _owned(pictures, here.sum(axis=1), token)
    index = np.full(here.shape, -1, np.int32)
    for row, mine in enumerate(owned):
        first = per_image * np.cumsum([0, *(picture.images for picture in mine)])
        parts = [start + picture.tokens for start, picture in zip(first, mine, strict=False)]
        index[row, here[row]] = np.concatenate([np.zeros(0, int), *parts])
    counts = [sum(picture.images for picture in mine) for mine in owned]
    texts = np.zeros((len(images.grids), 0), np.int32) if texts is None else texts
    return prompts._replace(
        batch=batch._replace(
            visual_index=index,
            image_index=np.maximum.accumulate(index // per_image, axis=1),
            image_texts=_in_rows(texts, *_slots(counts)),
            images=rows_of(images, counts),
        )
    )


def _owned(pictures: Sequence[Picture], places: np.ndarray, token: int) -> list[list[Picture]]:
    """The pictures of each row, which has so many places for visual tokens."""
    found: list[list[Picture]] = [[] for _ in places]
    sizes = [len(picture.tokens) for picture in pictures]
    ends = np.cumsum(places)
    for picture, end in zip(pictures, np.cumsum(sizes), strict=True):
        row = int(np.searchsorted(ends, end))
        if row < len(found):
            found[row].append(picture)
    taken = [sum(len(picture.tokens) for picture in mine) for mine in found]
    if taken != places.tolist() or sum(taken) != sum(sizes):
        raise DataError(
            f"{places.tolist()} placeholders {token} in the rows of input_ids; expected "
            f"{sizes} for {len(pictures)} images"
        )
    return found


def rows_of(images: Images, counts: Sequence[int]) -> Images:
    """Images, one per row, as rows of so many images each; empty slots are padding."""
    chosen, there = _slots(counts)

    def placed(array: np.ndarray | None, empty: int = 0) -> np.ndarray | None:
        return None if array is None else _in_rows(array, chosen, there, empty)

    joined = lambda x: None if x is None else x.reshape(len(x), -1, *x.shape[3:])  # noqa: E731
    owners = placed(images.patch_images, -1)
    if owners is not None:
        number = np.arange(there.shape[1])[:, None]
        owners = np.where(owners >= 0, number, -1).astype(np.int32)
    pixels = placed(images.pixels)
    return Images(
        grids=placed(images.grids)[:, :, 0],
        pixels=None if pixels is None else pixels[:, :, 0],
        patches=joined(placed(images.patches)),
        patch_positions=joined(placed(images.patch_positions)),
        patch_images=joined(owners),
    )


def _slots(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which of all images stands in each slot of rows of so many [B, N], and whether one does."""
    number = np.arange(max(1, *counts))
    there = number < np.asarray(counts)[:, None]
    start = np.cumsum([0, *counts[:-1]])
    return np.where(there, start[:, None] + number, 0), there


def _in_rows(array: np.ndarray, chosen: np.ndarray, there: np.ndarray, empty: int = 0):
    """What is given per image [n, ...], per slot [B, N, ...]."""
    return np.where(there.reshape(*there.shape, *(1,) * (array.ndim - 1)), array[chosen], empty)


def array(arrays: Arrays, name: str, axes: int) -> np.ndarray:
    """An array by keyword.

    Raises:
      DataError: it is missing or has another number of axes.
    """
    if name not in arrays:
        raise DataError(f"the inputs lack {name}; they have {', '.join(arrays) or 'nothing'}")
    found = np.asarray(arrays[name])
    if found.ndim != axes or not found.size or found.dtype.kind not in "biuf":
        raise DataError(
            f"{name} has shape {found.shape} and dtype {found.dtype}; expected {axes} axes "
            "of numbers, none of them empty"
        )
    return found


def refuse_unknown(arrays: Arrays, known: Sequence[str]) -> None:
    """Raises ConfigError where an array is none of the known ones."""
    unknown = [name for name in arrays if name not in known]
    if unknown:
        raise ConfigError(f"inputs {', '.join(unknown)} are not taken; expected {', '.join(known)}")
