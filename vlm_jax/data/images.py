"""Pictures: one decode for everything (`decoding.py`), then fit to the encoder, changed or not.

Alpha is kept until the last moment and is premultiplied before any resampling, so that the colour
hidden under transparent pixels never bleeds into edges.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from vlm_jax.config import Augment
from vlm_jax.data.decoding import BadImage as BadImage
from vlm_jax.data.decoding import decode as decode
from vlm_jax.presets.encoders import Encoder

# Less than this leaves a picture as it is, at the price of a whole filter pass.
_SMALLEST_BLUR = 0.2


def fit(
    rgba: UInt8[np.ndarray, "h w 4"],
    encoder: Encoder,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    drawn: int = 0,
) -> Float[np.ndarray, "H W 3"]:
    """Pixels as the encoder sees them: squashed to its size, on a background, normalised.

    Args:
      rgba: a decoded picture.
      encoder: its image size, mean and standard deviation are read.
      augment: random changes; None (evaluation) composites on white and changes nothing.
      rng: where the changes are drawn from; needed with `augment`.
      drawn: side in pixels for which they are drawn, and then scaled; 0 = the encoder's own.
    """
    height, width = encoder.size
    image = Image.fromarray(np.ascontiguousarray(rgba)).convert("RGBa")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if augment is None:
        rgb = _composite(image, np.eye(4, 3, dtype=np.float32), np.ones(3, np.float32))
    else:
        rgb = _augmented(image, augment, rng, drawn or width)
    np.clip(rgb, 0.0, 1.0, out=rgb)
    rgb -= _row(encoder.mean, width)
    rgb /= _row(encoder.std, width)
    return rgb.reshape(height, width, 3)


def fit_all(
    rgba: UInt8[np.ndarray, "h w 4"],
    encoders: Sequence[Encoder],
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "H W 3"], ...]:
    """One picture, changed once, as each of several encoders sees it; see `fit`.

    Sizes in pixels are those of the first encoder, after which alone `rng` is advanced.
    """
    first, *others = encoders
    replays = [copy.deepcopy(rng) for _ in others]
    found = [fit(rgba, first, augment, rng)]
    for encoder, replay in zip(others, replays, strict=True):
        found.append(fit(rgba, encoder, augment, replay, first.size[1]))
    return tuple(found)


# Pictures are worked on as rows of interleaved colours: numpy is several times faster on rows
# than on a last axis of three.


def _row(colour: Sequence[float], size: int) -> Float[np.ndarray, " row"]:
    """One colour, all along a row."""
    return np.tile(np.asarray(colour, np.float32), size)


def _composite(image: Image.Image, colour, background) -> Float[np.ndarray, "H row"]:
    """x @ colour + (1 - alpha) * background, for the premultiplied x = (r, g, b, alpha) of `image`.

    On a plain background that is a single product: alpha's row of `colour` takes it off again.

    Args:
      image: of mode RGBa.
      colour: [4, 3].
      background: [3], or [H, row].
    """
    width, height = image.size
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(-1, 4).astype(np.float32)
    weights = colour / np.float32(255)
    if background.ndim == 1:
        weights[3] -= background / np.float32(255)
        rgb = (pixels @ weights).reshape(height, -1)
        rgb += _row(background, width)
        return rgb
    clear = np.float32(1) - pixels[:, 3] / np.float32(255)
    return (pixels @ weights).reshape(height, -1) + clear.repeat(3).reshape(height, -1) * background


def _augmented(
    image: Image.Image, augment: Augment, rng: np.random.Generator, drawn: int
) -> Float[np.ndarray, "H row"]:
    """What depends on a number of pixels is drawn for `drawn` of them a side, then scaled."""
    size = image.size[0]
    image = _warped(image, augment, rng)
    radius = augment.blur * rng.uniform(-1, 1)  # half of the pictures stay sharp
    if radius > _SMALLEST_BLUR:
        image = image.filter(ImageFilter.BoxBlur(radius * (size / drawn)))
    rgb = _composite(image, _colour(augment, rng), _background(augment, size, rng))
    if augment.shade:
        rgb *= 1 + _ramp(size, augment.shade, rng)
    if augment.noise:
        strength = augment.noise * rng.random()
        rgb += strength * _grain(rng.standard_normal((drawn, 3 * drawn), np.float32), size)
    if rng.random() < augment.erase:
        _erase(rgb.reshape(size, size, 3), drawn, rng)
    return rgb


def _warped(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """One random projective map about the centre; what comes from outside is transparent."""
    rotate, shear, dx, dy, zoom, aspect, *tilt = rng.uniform(-1, 1, 8)
    low, high = np.log(augment.scale)
    zoom = np.exp(low + (high - low) * (zoom + 1) / 2)
    stretch = np.exp(np.log1p(augment.aspect) * aspect / 2)
    angle, slant = np.deg2rad(augment.rotate * rotate), np.tan(np.deg2rad(augment.shear * shear))
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.array([[cos, cos * slant - sin], [sin, sin * slant + cos]])
    size = image.size[0]
    forward = np.eye(3)
    forward[:2, :2] = zoom * turned * (stretch, 1 / stretch)
    forward[:2, 2] = augment.translate * size * np.array([dx, dy])
    forward[2, :2] = augment.perspective / size * np.array(tilt)
    if np.array_equal(forward, np.eye(3)):
        return image
    # Pillow asks where each output pixel comes from, so it is given the inverse.
    centre = np.array([[1, 0, size / 2], [0, 1, size / 2], [0, 0, 1]])
    inverse = centre @ np.linalg.inv(centre @ forward)
    inverse /= inverse[2, 2]
    flat = not augment.perspective
    kind = Image.Transform.AFFINE if flat else Image.Transform.PERSPECTIVE
    coefficients = inverse.ravel()[: 6 if flat else 8].tolist()
    return image.transform(image.size, kind, coefficients, resample=Image.Resampling.BILINEAR)


_GREY = np.full((3, 3), 1 / 3)


def _colour(augment: Augment, rng: np.random.Generator) -> Float[np.ndarray, "4 3"]:
    """All changes of colour as one matrix on premultiplied (r, g, b, alpha)."""
    hue, saturation, contrast, brightness, grey, *gains = rng.uniform(-1, 1, 8)
    saturation = 1 + augment.saturation * saturation
    if (grey + 1) / 2 < augment.grey:
        saturation = 0.0
    contrast = 1 + augment.contrast * contrast
    turned = _hue_rotation(2 * np.pi * augment.hue * hue)
    gains = contrast * (1 + augment.gain * np.array(gains))
    mixed = gains[:, None] * (saturation * turned + (1 - saturation) * _GREY)
    lift = 0.5 * (1 - contrast) + augment.brightness * brightness
    return np.vstack([mixed.T, np.full((1, 3), lift)]).astype(np.float32)


def _hue_rotation(angle: float) -> Float[np.ndarray, "3 3"]:
    """Rotation of colours about the grey axis (Rodrigues' formula)."""
    axis = np.sqrt(1 / 3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * _GREY + np.sin(angle) * cross


def _background(augment: Augment, size: int, rng: np.random.Generator) -> np.ndarray:
    """A plain colour [3] or, now and then, a gradient between two [H, row]."""
    if augment.background == "white":
        return np.ones(3, np.float32)
    kind, (one, other) = rng.random(), rng.random((2, 3), np.float32)
    # White stays common: it is what evaluation shows.
    if kind < 0.4:
        return np.ones(3, np.float32)
    if kind < 0.8:
        return one
    return _row(one, size) + (0.5 + _ramp(size, 0.5, rng)) * _row(other - one, size)


def _ramp(size: int, strength: float, rng: np.random.Generator) -> Float[np.ndarray, "H row"]:
    """A random linear gradient, 0 at the centre, the same for all three colours."""
    down, along = (strength * rng.uniform(-1, 1, 2)).astype(np.float32)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return down * line[:, None] + along * line.repeat(3)


def _grain(noise: Float[np.ndarray, "h row"], size: int) -> Float[np.ndarray, "H _row"]:
    """Noise at another size, not smoothed: it would lose its strength."""
    drawn = len(noise)
    if drawn == size:
        return noise
    nearest = (2 * np.arange(size) + 1) * drawn // (2 * size)
    grain = noise.reshape(drawn, drawn, 3)[nearest[:, None], nearest]
    return grain.reshape(size, -1)


def _erase(rgb: Float[np.ndarray, "H W 3"], drawn: int, rng: np.random.Generator) -> None:
    """Paints a rectangle of 10 to 38 % of the side with one colour, in place."""
    height, width = np.maximum(1, (drawn * rng.uniform(0.1, 0.38, 2)).astype(int))
    top, left = rng.integers(0, drawn - height + 1), rng.integers(0, drawn - width + 1)
    size = len(rgb)
    rows, columns = (
        slice(start * size // drawn, -(-(start + length) * size // drawn))
        for start, length in ((top, height), (left, width))
    )
    rgb[rows, columns] = rng.random(3, np.float32)


def grid_of(pixels: Float[np.ndarray, "H W 3"], patch: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture."""
    return pixels.shape[0] // patch, pixels.shape[1] // patch


def patches_of(pictures: Sequence[Float[np.ndarray, "H W 3"]], patch: int) -> int:
    """Patches of several pictures together."""
    return sum(math.prod(grid_of(pixels, patch)) for pixels in pictures)


def patchify(pixels: Float[np.ndarray, "H W 3"], patch: int) -> Float[np.ndarray, "P patch_dim"]:
    """Patches in reading order, each flattened as (row, column, channel)."""
    rows, columns = grid_of(pixels, patch)
    split = pixels.reshape(rows, patch, columns, patch, 3)
    return split.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch * patch * 3)
