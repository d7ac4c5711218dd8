"""How bytes of pixels become what an encoder reads: on the host and on the device alike."""

from typing import NamedTuple


class Affine(NamedTuple):
    """A byte of a channel times `scale`, less `shift`.

    Attributes:
      scale, shift: of red, green and blue.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]


def affine(preset) -> Affine:
    """(byte / 255 - mean) / std, of an encoder's preset."""
    pairs = list(zip(preset.mean, preset.std, strict=True))
    return Affine(tuple(1 / (255 * std) for _, std in pairs), tuple(m / std for m, std in pairs))
