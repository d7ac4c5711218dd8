"""What every recipe makes of one sample: the prompt, what of it is learned, and the pixels."""

import io
import itertools
from typing import Any

import numpy as np
import PIL.Image
import systems
from jaxtyping import UInt8

from vlm_jax import config as c
from vlm_jax.data import documents
from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.documents import Document
from vlm_jax.data.example import Example, ImageRef, Turn

CELLS = 4  # rows and columns of which a view's mean colours are kept, and of its middle pixels


def picture() -> bytes:
    """A wide picture whose every part has a colour of its own."""
    height, width = 100, 150
    y, x = np.mgrid[:height, :width]
    stripes = 255 * ((x // 15 + y // 20) % 2)
    pixels = np.stack([255 * x / width, 255 * y / height, stripes], -1).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


SAMPLE = Example(
    "sample",
    "made",
    (picture(),),
    (
        Turn("user", (ImageRef(0), "What is it?")),
        Turn("assistant", ("A fox.",)),
        Turn("user", ("And where?",)),
        Turn("assistant", ("In snow.",)),
    ),
)


def record(config: c.Config) -> dict[str, Any]:
    """The sample under a config, as JSON holds it."""
    tokenizer = tokenizers.for_config(config)
    made = documents.document(SAMPLE, config, tokenizer)
    assert not made.rejects
    return {
        "prompt": _text(made, tokenizer),
        "tokens": len(made),
        "attention": config.data.attention,
        "pixels": [
            [f"{view.shape[0]}x{view.shape[1]} {_colours(view).tobytes().hex()}" for view in views]
            for views in (made.pixels, *made.extra_pixels)
        ],
    }


def records() -> list[dict[str, Any]]:
    """Of all variants, those that make the same of it together."""
    found: list[dict[str, Any]] = []
    for name in [*systems.systems(), *systems.FIRST]:
        made = record(systems.config(name))
        alike = next((each for each in found if made.items() <= each.items()), None)
        if alike is None:
            found.append(alike := {"recipes": [], **made})
        alike["recipes"].append(name)
    return found


def _text(made: Document, tokenizer: tokenizers.Tokenizer) -> str:
    """Text in which «» holds what is learned and {n} stands for n positions of an image."""
    there = made.tokens == tokenizer.image
    kinds = zip(made.loss_weights > 0, there, np.where(there, made.image_index, -1))
    shown = []
    for (learned, image, _), run in itertools.groupby(
        zip(made.tokens.tolist(), kinds), lambda pair: pair[1]
    ):
        ids = [token for token, _ in run]
        text = f"{{{len(ids)}}}" if image else "".join(tokenizer.pieces(ids))
        shown.append(f"«{text}»" if learned else text)
    return "".join(shown)


def _colours(view: np.ndarray) -> UInt8[np.ndarray, "2 cells cells 3"]:
    """Mean colours of a view's cells, which say what of the picture is where, and the pixels of its
    middle, a border of stripes that says how they were resampled."""
    assert view.dtype == np.uint8
    rows = np.array_split(view.astype(float), CELLS)
    cells = [[cell.mean((0, 1)) for cell in np.array_split(row, CELLS, 1)] for row in rows]
    top, left = (length // 2 - CELLS // 2 for length in view.shape[:2])
    middle = view[top : top + CELLS, left : left + CELLS]
    return np.round([cells, middle]).astype(np.uint8)


def colours(recorded: str) -> tuple[str, np.ndarray]:
    """Size and mean colours of a recorded view."""
    size, hexed = recorded.split()
    return size, np.frombuffer(bytes.fromhex(hexed), np.uint8).astype(int)
