"""Pictures as the embedded data stores them: 64x64 RGBA PNG, resized on premultiplied colour."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIZE = 64


def premultiplied(image: Image.Image) -> Float[np.ndarray, "H W 4"]:
    """Any Pillow image as RGBA in 0..1, colour already multiplied by alpha.

    `convert("RGBA")` also settles palettes with transparency and grey with alpha.
    """
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


def square(pixels: Float[np.ndarray, "H W 4"]) -> Float[np.ndarray, "S S 4"]:
    """Pads with transparency to a centred square."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    out = np.zeros((side, side, 4), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = pixels
    return out


def resize(pixels: Float[np.ndarray, "S S 4"], size: int) -> Float[np.ndarray, "size size 4"]:
    """Lanczos per premultiplied channel, clipped to what premultiplied colour can be."""
    if pixels.shape[0] == size:
        return pixels
    channels = [
        np.asarray(Image.fromarray(pixels[..., c]).resize((size, size), Image.Resampling.LANCZOS))
        for c in range(4)
    ]
    out = np.stack(channels, -1)
    alpha = np.clip(out[..., 3:], 0, 1)
    return np.concatenate([np.clip(out[..., :3], 0, alpha), alpha], -1)


def straight(pixels: Float[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 4"]:
    """Undoes the multiplication; where alpha rounds to 0 so does colour, which keeps PNGs small."""
    alpha = pixels[..., 3:]
    colour = np.divide(pixels[..., :3], alpha, out=np.zeros_like(pixels[..., :3]), where=alpha > 0)
    out = np.rint(np.concatenate([colour, alpha], -1).clip(0, 1) * 255).astype(np.uint8)
    out[out[..., 3] == 0] = 0
    return out


def normalise(data: bytes) -> UInt8[np.ndarray, "64 64 4"]:
    """Decodes an encoded picture of any mode and size to 64x64 straight RGBA."""
    with Image.open(io.BytesIO(data)) as image:
        return straight(resize(square(premultiplied(image)), SIZE))


def png(rgba: UInt8[np.ndarray, "H W 4"]) -> bytes:
    """The smallest PNG that Pillow writes, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def fingerprint(rgba: UInt8[np.ndarray, "H W 4"]) -> bytes:
    """Equal for pictures that look equal: 8-bit premultiplied colour and alpha."""
    wide = rgba.astype(np.uint16)
    colour = (wide[..., :3] * wide[..., 3:] + 127) // 255
    return np.concatenate([colour, wide[..., 3:]], -1).astype(np.uint8).tobytes()
