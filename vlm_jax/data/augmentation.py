"""Random changes to training pictures: what of them is shown, and how it looks.

What is shown (crop, flip, up-scaling) is drawn before a picture is resized, as steps of
`data.steps`; the rest changes views of the encoder's size.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageFilter

from vlm_jax.config import Augment
from vlm_jax.data.steps import Flip, Scale, Size, Steps, Window

# Less than this leaves a picture as it is, at the price of a whole filter pass.
_SMALLEST_BLUR = 0.2
# Of a random crop, as torchvision's RandomResizedCrop and big_vision's inception_crop have them.
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


def shown(size: Size, augment: Augment, rng: np.random.Generator) -> Steps:
    """What of a picture of this size is shown, and how large; nothing is drawn for what is off."""
    steps: list[Window | Flip | Scale] = []
    if augment.crop != (1.0, 1.0):
        steps.append(_crop(size, augment.crop, rng))
        size = steps[-1].height, steps[-1].width
    if augment.flip and rng.random() < augment.flip:
        steps.append(Flip(*size))
    low, high = augment.upscale
    if max(size) < high:
        scale = rng.integers(max(low, max(size)), high, endpoint=True) / max(size)
        steps.append(Scale(*(max(1, round(side * scale)) for side in size), "bicubic"))
    return tuple(steps)


def _crop(size: Size, area: tuple[float, float], rng: np.random.Generator) -> Window:
    """A part of the picture by share of its area and aspect ratio (Szegedy et al. 2015)."""
    height, width = size
    for _ in range(_TRIES):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*map(math.log, _ASPECTS)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, (height - h + 1, width - w + 1))
            return Window(int(top), int(left), h, w)
    # Long and narrow: the middle, as near to an allowed aspect ratio as it comes.
    low, high = _ASPECTS
    h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
    return Window((height - h) // 2, (width - w) // 2, h, w)


def changed(
    image: Image.Image, augment: Augment, rng: np.random.Generator, drawn: int
) -> Float[np.ndarray, "H row"]:
    """A square view of mode RGBa with all changes but those of `shown`, as rows, not clipped.

    What depends on a number of pixels is drawn for `drawn` of them a side, then scaled.
    """
    size = image.size[0]
    image = _warped(image, augment, rng)
    radius = augment.blur * rng.uniform(-1, 1)  # half of the pictures stay sharp
    if radius > _SMALLEST_BLUR:
        image = image.filter(ImageFilter.BoxBlur(radius * (size / drawn)))
    rgb = composite(image, _colour(augment, rng), _background(augment, size, rng))
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
    return row(one, size) + (0.5 + _ramp(size, 0.5, rng)) * row(other - one, size)


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


# Pictures are worked on as rows of interleaved colours: numpy is several times faster on rows
# than on a last axis of three.


def row(colour: Sequence[float], size: int) -> Float[np.ndarray, " row"]:
    """One colour, all along a row."""
    return np.tile(np.asarray(colour, np.float32), size)


def composite(image: Image.Image, colour, background) -> Float[np.ndarray, "H row"]:
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
        rgb += row(background, width)
        return rgb
    clear = np.float32(1) - pixels[:, 3] / np.float32(255)
    return (pixels @ weights).reshape(height, -1) + clear.repeat(3).reshape(height, -1) * background
