"""The Example: one training sample as every source yields it, whatever it was read from."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """Stands in a turn where an image does; `index` points into `Example.images`."""

    index: int


Part = str | ImageRef
Image = bytes | os.PathLike  # encoded bytes, or a file that is read when the sample is decoded


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one role says: text and images in reading order."""

    role: str  # "user" or "assistant"; the first may be "system"
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: images as encoded bytes and turns that refer to them.

    Attributes:
      key: unique and stable, e.g. "emoji/caption/train/1F600-noto".
      source: the name that metrics and counts use, e.g. "caption".
      images: encoded images.
      turns: the conversation, in order; assistant turns are what is learned.
      image_texts: a text per image (a contrastive caption), or empty.
      meta: facts that only evaluation uses (options, concept, flag), plain data.
    """

    key: str
    source: str
    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    image_texts: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class BadExample(Exception):
    """A record that makes no Example; it is counted, never learned from, and ends nothing.

    Attributes:
      reason: a stable word that is counted.
      detail: what was given and what was expected.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail
