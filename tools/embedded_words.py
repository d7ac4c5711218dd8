"""Pictures of rendered words, in fonts that matplotlib ships."""

import hashlib
import io
import pathlib

import embedded_pictures as pix
import matplotlib
import numpy as np
from embedded_concepts import Picture
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

# style name: file, of DejaVu 2.37
FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
}
SHA256 = {
    "sans": "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
    "sans-bold": "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
    "sans-oblique": "ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213",
    "mono": "602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3",
    "serif": "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
    "serif-italic": "3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04",
}
HELD_OUT_FONT = "serif-italic"
WIDTH = 60  # leaves two pixels on either side
LARGEST = 30  # font size of the shortest words
INK = (24, 24, 32)


def font_folder() -> pathlib.Path:
    return pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_bytes(style: str) -> bytes:
    """A font file, refused when it is not the pinned one."""
    data = (font_folder() / FONTS[style]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[style]:
        raise SystemExit(f"{FONTS[style]} has sha256 {digest}, expected {SHA256[style]}")
    return data


def render(word: str, fonts: list[ImageFont.FreeTypeFont]) -> UInt8[np.ndarray, "64 64 4"]:
    """Dark ink on transparent, centred, in the largest of `fonts` (falling sizes) that fits."""
    font = next(font for font in fonts if font.getlength(word) <= WIDTH)
    ink = Image.new("L", (pix.SIZE, pix.SIZE))
    middle = (pix.SIZE / 2, pix.SIZE / 2)
    ImageDraw.Draw(ink).text(middle, word, fill=255, font=font, anchor="mm")
    alpha = np.asarray(ink)[..., None]
    colour = np.where(alpha > 0, np.array(INK, np.uint8), np.uint8(0))
    return np.concatenate([colour, alpha], -1)


def word_pictures(words: list[str]) -> list[Picture]:
    """Every word in every font."""
    pictures = []
    for style in FONTS:
        data = font_bytes(style)
        # The basic layout engine: what Raqm draws depends on the system's libraries.
        fonts = [
            ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)
            for size in range(LARGEST, 5, -1)
        ]
        pictures += [Picture(f"word-{word}", style, render(word, fonts)) for word in words]
    return pictures


def licence() -> str:
    """The licence text of the fonts."""
    return (font_folder() / "LICENSE_DEJAVU").read_text()
