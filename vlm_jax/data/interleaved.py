"""Web pages whose texts and images stand in reading order become turns.

The user shows images and the assistant says the text that follows them: all text is learned, each
with the images before it in sight. A page that begins with text has an empty first question. Images
that no text follows are left out, as nothing would be learned from them. Under the chat template
`interleaved` nothing stands between these turns, under `flamingo` its end of a chunk.
"""

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data import rows
from vlm_jax.data.conversations import Parsed, Record, key_of, short
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.data.parquet import ParquetRecords
from vlm_jax.data.records import JsonRecords
from vlm_jax.errors import DataError

_Picture = tuple[str | bytes]  # in a tuple, as a path is a text too


def obelics(record: Record) -> Parsed:
    """A page of OBELICS: `images` and `texts`, one of which is null at each place.

    Raises:
      BadExample: they are not, a text is none, or an image was not downloaded.
    """
    images, texts = (_list(record, name) for name in ("images", "texts"))
    if len(images) != len(texts):
        lengths = f"{len(images)} images and {len(texts)} texts"
        raise BadExample("unequal_lists", f"{lengths}; expected one of both at each place")
    return key_of(record), *_turns(list(_parts(images, texts)), "\n\n")


def mmc4(record: Record) -> Parsed:
    """A page of MMC4: sentences, and images that each stand before the one they match.

    Raises:
      BadExample: an image matches no sentence, or one of them is none.
    """
    texts, images = _list(record, "text_list"), _list(record, "image_info")
    before: dict[int, list[_Picture]] = {}
    for i, image in enumerate(images):
        name, at = (
            image.get(key) if isinstance(image, dict) else None
            for key in ("image_name", "matched_text_index")
        )
        if not isinstance(name, str) or not isinstance(at, int) or not 0 <= at < len(texts):
            expected = f"expected image_name, and matched_text_index below {len(texts)}"
            raise BadExample("bad_image_info", f"image_info[{i}] is {short(image)}; {expected}")
        before.setdefault(at, []).append((rows.image(name, f"image_info[{i}]"),))
    parts = [
        part
        for i, text in enumerate(texts)
        for part in (*before.get(i, ()), _text(text, f"text_list[{i}]"))
    ]
    return "", *_turns(parts, " ")


def pages(path: Path) -> JsonRecords | ParquetRecords:
    """The records of parquet files, or of a JSON file.

    Raises:
      DataError: they cannot be read.
    """
    if path.is_dir() or os.fspath(path).endswith(".parquet"):
        return ParquetRecords(path, _columns)
    return JsonRecords(path)


def _columns(names: Collection[str]) -> list[str]:
    if not {"images", "texts"} <= set(names):
        raise DataError(f"has columns {', '.join(names)}; expected images and texts")
    return [name for name in ("id", "images", "texts") if name in names]


def _list(record: Record, name: str) -> list:
    found = record.get(name)
    if not isinstance(found, list):
        raise BadExample("no_turns", f"{name} is {short(found)}; expected a list")
    return found


def _parts(images: Sequence[Any], texts: Sequence[Any]) -> Iterator[str | _Picture]:
    for i, (image, text) in enumerate(zip(images, texts)):
        if image is not None and text is not None:
            raise BadExample("image_and_text", f"both stand at place {i}; expected one of them")
        if image is not None:
            yield (rows.image(image, f"images[{i}]"),)
        elif text is not None:
            yield _text(text, f"texts[{i}]")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadExample("bad_content", f"{where} is {short(value)}; expected text")
    return value


def _turns(
    parts: Sequence[str | _Picture], between: str
) -> tuple[list[str | bytes], tuple[Turn, ...]]:
    """Images, and the turns of parts in reading order."""
    images: list[str | bytes] = []
    turns: list[Turn] = []
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str)):
        if not is_text:
            shown = [image for (image,) in run]
            images += shown
            turns.append(Turn("user", (ImageRef(-1),) * len(shown)))
            continue
        if not turns:
            turns.append(Turn("user", ()))
        turns.append(Turn("assistant", (between.join(run),)))
    if turns and turns[-1].role == "user":
        del images[len(images) - len(turns.pop().parts) :]
    if not turns:
        raise BadExample("no_text", "the page has no text")
    return images, tuple(turns)
