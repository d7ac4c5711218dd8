"""Pictures: one decode for everything (`decoding.py`), then the views of them that encoders see.

Alpha is kept until the last moment and is premultiplied before any resampling, so that the colour
hidden under transparent pixels never bleeds into edges. Pictures without any are spared that.
"""

import copy
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image

from vlm_jax.config import Augment
from vlm_jax.data import augmentation, resizing, steps
from vlm_jax.data.augmentation import row
from vlm_jax.data.decoding import BadImage as BadImage
from vlm_jax.data.decoding import decode as decode
from vlm_jax.data.decoding import opened as opened
from vlm_jax.data.decoding import picture as picture
from vlm_jax.data.decoding import size as size
from vlm_jax.data.steps import Plan, Size
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.pixels import affine

Picture = Image.Image | UInt8[np.ndarray, "h w 4"]
# Bytes that the model normalises; where `dtype` says so, floats that are.
View = UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"]
Views = tuple[View, ...]


def dtype(augment: Augment | None) -> str:
    """What views are of: bytes, four times as small, where nothing repaints them; else floats."""
    return "float32" if augment is not None and augment.repaints else "uint8"


def plans(
    size: Size,
    encoders: Sequence[Encoder],
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Plan, ...]:
    """How each encoder sees a picture of this size (height, width).

    Args:
      size: of the picture.
      encoders: their presets.
      augment: what of the picture is shown is drawn here; None (evaluation) shows all of it.
      rng: where that is drawn from; needed with `augment`.
    """
    first = () if augment is None else augmentation.shown(size, augment, rng)
    if first:
        size = first[-1].height, first[-1].width
    found = (resizing.plan(size, encoder) for encoder in encoders)
    return tuple(p._replace(views=tuple(first + view for view in p.views)) for p in found)


def see(
    picture: Picture,
    plans: Sequence[Plan],
    encoders: Sequence[Encoder],
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Views, ...]:
    """One picture, changed once, as each encoder sees it: its views, on a background.

    They are of `dtype(augment)`: whole bytes on white unless something repaints them.

    Args:
      picture: decoded, of the size that the plans were made for.
      plans: one per encoder.
      encoders: mean and standard deviation are read, and the size.
      augment: random changes; None (evaluation) composites on white and changes nothing.
      rng: where the changes are drawn from; needed with `augment`. Sizes in pixels are those of
        the first encoder, after which alone `rng` is advanced.
    """
    image = _premultiplied(picture)
    augment = augment if augment is not None and augment.repaints else None
    replays = [rng, *(copy.deepcopy(rng) for _ in encoders[1:])]
    drawn = encoders[0].size[1]
    found = []
    for plan, encoder, replay in zip(plans, encoders, replays, strict=True):
        views = steps.apply(image, plan)
        found.append(tuple(_pixels(view, encoder, augment, replay, drawn) for view in views))
    return tuple(found)


def fit(
    picture: Picture,
    encoder: Encoder,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, "H W 3"]:
    """What an encoder sees of a picture that becomes one view, normalised."""
    ((view,),) = fit_all(picture, (encoder,), augment, rng)
    return view


def fit_all(
    picture: Picture,
    encoders: Sequence[Encoder],
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[tuple[Float[np.ndarray, "h w 3"], ...], ...]:
    """The views of several encoders, normalised; see `plans` and `see`."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    made = plans((image.height, image.width), encoders, augment, rng)
    seen = see(image, made, encoders, augment, rng)
    return tuple(
        tuple(normalised(view, encoder) for view in views)
        for views, encoder in zip(seen, encoders, strict=True)
    )


def normalised(view: View, encoder: Encoder) -> Float[np.ndarray, "h w 3"]:
    """A view as its encoder reads it."""
    if view.dtype != np.uint8:
        return view
    height, width, _ = view.shape
    scale, shift = affine(encoder)
    rgb = view.reshape(height, -1) * row(scale, width)
    rgb -= row(shift, width)
    return rgb.reshape(height, width, 3)


_COPIED = 16  # bytes that `numpy.take` copies without a call


def put_patches(view: View, patch: int, out: Shaped[np.ndarray, "P patch_dim"]) -> None:
    """Writes a view's patches as `patchify` orders them into `out`, which lies in one piece."""
    rows, columns = grid_of(view, patch)
    line = patch * 3 * view.itemsize  # bytes of a patch that lie together
    unit = np.dtype((np.void, line if line % _COPIED else _COPIED))
    order = _order(patch, columns, line // unit.itemsize)
    found, places = (each.reshape(rows, -1).view(unit) for each in (view, out))
    # With "raise", NumPy would write elsewhere first; all indices are in range.
    np.take(found, order, axis=1, out=places, mode="clip")


@functools.lru_cache(maxsize=1024)
def _order(patch: int, columns: int, units: int) -> Int[np.ndarray, " N"]:
    """Where in a row of patches, which lies line by line, those of each patch are, in turn."""
    return np.arange(patch * columns * units).reshape(patch, columns, units).swapaxes(0, 1).ravel()


def _premultiplied(picture: Picture) -> Image.Image:
    """Of mode RGB where every pixel is opaque, else RGBa."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if image.mode == "RGB":
        return image
    opaque = image.getchannel("A").getextrema()[0] == 255
    return image.convert("RGB" if opaque else "RGBa")


def _pixels(
    view: Image.Image,
    encoder: Encoder,
    augment: Augment | None,
    rng: np.random.Generator | None,
    drawn: int,
) -> View:
    if augment is None:
        return np.asarray(view) if view.mode == "RGB" else _on_white(np.asarray(view))
    width, height = view.size
    rgb = augmentation.changed(_with_alpha(view), augment, rng, drawn)
    np.clip(rgb, 0.0, 1.0, out=rgb)
    rgb -= row(encoder.mean, width)
    rgb /= row(encoder.std, width)
    return rgb.reshape(height, width, 3)


def _on_white(view: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Of a premultiplied picture. Filters overshoot: a colour may be above its alpha."""
    white = view[..., :3] + (255 - view[..., 3:].astype(np.uint16))
    return np.minimum(white, 255).astype(np.uint8)


def _with_alpha(view: Image.Image) -> Image.Image:
    return view.convert("RGBA").convert("RGBa") if view.mode == "RGB" else view


def grid_of(pixels: Float[np.ndarray, "H W 3"], patch: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture."""
    return pixels.shape[0] // patch, pixels.shape[1] // patch


def patches_of(sizes: Sequence[Size], patch: int) -> int:
    """Patches of pictures of these sizes together."""
    return sum((height // patch) * (width // patch) for height, width in sizes)


def patchify(pixels: Float[np.ndarray, "H W 3"], patch: int) -> Float[np.ndarray, "P patch_dim"]:
    """Patches in reading order, each flattened as (row, column, channel)."""
    rows, columns = grid_of(pixels, patch)
    split = pixels.reshape(rows, patch, columns, patch, 3)
    return split.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch * patch * 3)
