"""A small config and a made-up source, whose pictures a test can spoil."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax import config as c
from vlm_jax.data import sources
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoders import Encoder

STRONG = c.Augment(
    background="random",
    scale=(0.7, 1.1),
    aspect=0.2,
    rotate=20.0,
    shear=10.0,
    translate=0.1,
    perspective=0.2,
    brightness=0.1,
    contrast=0.3,
    saturation=0.5,
    hue=0.1,
    gain=0.1,
    grey=0.1,
    blur=1.0,
    shade=0.3,
    noise=0.02,
    erase=0.5,
)


def png(seed: int) -> bytes:
    """A random picture of 12 x 10 pixels with alpha."""
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Made:
    """Examples with 0 to 3 images, first, between words, or in the second turn.

    Attributes:
      kind: named in keys.
      spoiled: bytes that stand instead of all images, by index.
    """

    kind: str
    spoiled: dict

    def __len__(self) -> int:
        return 23

    def groups(self) -> list[list[int]]:
        return [[0], *([i, i + 1] for i in range(1, 19, 2)), [19, 20, 21, 22]]

    def example(self, index: int, rng: np.random.Generator) -> Example:
        count = index % 4
        pictures = [self.spoiled.get(index, png(100 * index + n)) for n in range(count)]
        refs = [ImageRef(n) for n in range(count)]
        drawn = "now " * int(rng.integers(3))
        turns = (
            Turn("user", (*refs[:1], f"what is in {index}?", *refs[1:2], drawn)),
            Turn("assistant", (f"a thing of kind {index}" + " and more" * (index % 5),)),
        )
        if count == 3:
            turns += (Turn("user", (*refs[2:], "sure?")), Turn("assistant", ("yes",)))
        texts = tuple(f"text {index} {n}" for n in range(count))
        return Example(f"{self.kind}/{index}", self.kind, tuple(pictures), turns, texts)


@pytest.fixture
def spoiled(monkeypatch) -> dict:
    """Registers the sources "made:one" and "made:two"; returns what spoils images of "one"."""
    bad: dict = {}
    family = sources.Family(
        ("one", "two"),
        ("train",),
        lambda kind, split, seed: Made(kind, bad if kind == "one" else {}),
    )
    monkeypatch.setitem(sources.FAMILIES, "made", family)
    return bad


@pytest.fixture
def small():
    """Builds a small config from fields of `config.Data` and, as `encoder`, of an Encoder."""

    def build(seed: int = 7, encoder: dict | None = None, **data) -> c.Config:
        tower = Encoder(16, 1, 32, 2, patch=4, **{"image_size": 8, **(encoder or {})})
        model = c.Model(tower, Connector(), decoder("1m", vocab=3072))
        fields = {
            "mixture": {"made:one": 2.0, "made:two": 1.0},
            "rows": 3,
            "tokens": 96,
            "images_per_row": 5,
            "text_tokens": 4,
            "pool": 12,
            "threads": 0,
            "augment": STRONG,
        }
        return c.Config("small", model, c.Data(**{**fields, **data}), seed=seed)

    return build
