"""Rows of tables, as data sets of Hugging Face and TFDS have them, become conversations.

What a row says is known by its columns: `LAYOUTS` names them, the first one that fits counts.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from vlm_jax.data import conversations
from vlm_jax.data.conversations import Parsed, Record, short
from vlm_jax.data.example import BadExample, ImageRef, Turn
from vlm_jax.errors import DataError

IMAGES = ("images", "image")  # columns of them, the first there is counts
IDS = ("id", "question_id")
ANSWERS = ("multiple_choice_answer", "answer", "answers")
CAPTIONS = ("caption", "captions", "text", "sentences")
_TEXTS = ("text", "answer", "raw", "caption")  # members that say it, where a text is a structure


@dataclasses.dataclass(frozen=True)
class Layout:
    """What rows of some columns say.

    Attributes:
      needs: of each of these, one column must be there; the first that is counts.
      turns: those of a row, given the names of these columns.
      seen: whether a row without an image is bad, where there is a column of images.
    """

    needs: tuple[tuple[str, ...], ...]
    turns: Callable[..., tuple[Turn, ...]]
    seen: bool = False


def parse(row: Record) -> Parsed:
    """A row's key, images and turns.

    Raises:
      BadExample: it makes none.
    """
    layout, names = _layout(row)
    images = images_of(row)
    if layout.seen and not images and not row.keys().isdisjoint(IMAGES):
        raise BadExample("no_image", "its image is null; expected bytes or a path")
    turns = _placed(layout.turns(row, *names), len(images))
    key = next((row[name] for name in IDS if isinstance(row.get(name), (str, int))), "")
    return str(key), images, turns


def columns(names: Collection[str]) -> list[str]:
    """Which columns of a table `parse` reads.

    Raises:
      DataError: no layout fits.
    """
    layout = _layout(names)
    if layout is None:
        known = "; ".join(
            ", ".join(" or ".join(need) for need in layout.needs) for layout in LAYOUTS
        )
        raise DataError(f"has columns {', '.join(names)}; expected, beside images, one of: {known}")
    image_column = next((name for name in IMAGES if name in names), "")
    return [name for name in (*IDS, image_column, *layout[1]) if name in names]


def images_of(row: Record) -> list[str | bytes]:
    """A row's images, each as bytes or a path.

    Raises:
      BadExample: one is neither.
    """
    name = next((n for n in IMAGES if n in row), None)
    if name is None or row[name] is None:
        return []
    found = row[name] if isinstance(row[name], list) else [row[name]]
    return [image(value, f"{name}[{i}]") for i, value in enumerate(found)]


def image(value: Any, where: str) -> str | bytes:
    """An image: encoded bytes, a path, or Hugging Face's structure of both, of which one is None.

    Raises:
      BadExample: it is none of these.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise BadExample("no_image", f"{where} is empty; expected bytes or a path")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise BadExample("not_downloaded", f"{where} is {short(value)}; expected the image itself")
    if not isinstance(value, (bytes, str)) or not value:
        raise BadExample("bad_image_path", f"{where} is {short(value)}; expected bytes or a path")
    return value


def answer(record: Record) -> str:
    """The one to learn of a question's answers: the one given most, of several the first.

    It is what VQAv2 calls `multiple_choice_answer`, and what LLaVA-1.5 was taught.

    Raises:
      BadExample: there is none.
    """
    for name in ANSWERS:
        found = collections.Counter(text for text in texts(record.get(name)) if text.strip())
        if found:
            return found.most_common(1)[0][0]
    given = ", ".join(f"{n} {short(record[n])}" for n in ANSWERS if n in record) or "none of them"
    raise BadExample("no_answer", f"{given}; expected one of {', '.join(ANSWERS)}")


def texts(value: Any) -> Iterator[str]:
    """The texts of a value: one, a list of them, or of structures of which a member says it."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeError as error:
            raise BadExample("not_utf8", str(error)) from error
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, dict):
        yield from texts(next((value[name] for name in _TEXTS if name in value), None))


def text(record: Record, name: str, reason: str) -> str:
    """The text of a column, of several the first.

    Raises:
      BadExample: there is none, for that reason.
    """
    found = next(texts(record.get(name)), "")
    if not found.strip():
        raise BadExample(reason, f"{name} is {short(record.get(name))}; expected text")
    return found


def _cauldron(row: Record, name: str) -> tuple[Turn, ...]:
    """Questions and answers about the images, as The Cauldron and FineVision have them."""
    said = row[name]
    if not isinstance(said, list) or not said:
        raise BadExample("no_turns", f"{name} is {short(said)}; expected a list of turns")
    turns: list[Turn] = []
    for i, pair in enumerate(said):
        for role in ("user", "assistant"):
            content = pair.get(role) if isinstance(pair, dict) else None
            if not isinstance(content, str):
                expected = "expected texts of user and assistant"
                raise BadExample("bad_turn", f"{name}[{i}] is {short(pair)}; {expected}")
            parts = conversations.parts_of(content, f"{name}[{i}].{role}")
            turns.append(Turn(role, tuple(parts)))
    return tuple(turns)


def _asked(row: Record, question: str, _: str) -> tuple[Turn, ...]:
    return _pair(answer(row), text(row, question, "no_question"))


def _captioned(row: Record, name: str) -> tuple[Turn, ...]:
    return _pair(text(row, name, "no_caption"))


def _pair(said: str, asked: str = "") -> tuple[Turn, ...]:
    return Turn("user", (asked,) if asked else ()), Turn("assistant", (said,))


LAYOUTS = (
    Layout((("texts",),), _cauldron),
    Layout((("messages",),), lambda row, _: conversations.of_messages(row)),
    Layout((("conversations",),), lambda row, _: conversations.of_llava(row)),
    Layout((("question",), ANSWERS), _asked, seen=True),
    Layout((CAPTIONS,), _captioned, seen=True),
)


def _layout(names: Collection[str]) -> tuple[Layout, list[str]] | None:
    """The layout of some columns, and those it reads."""
    for layout in LAYOUTS:
        found = [next((n for n in need if n in names), None) for need in layout.needs]
        if None not in found:
            return layout, found
    return None


def _placed(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """The turns with the images at the start of the first question, where they say no places."""
    turns = tuple(turns)
    if any(isinstance(part, ImageRef) for turn in turns for part in turn.parts):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    asked = Turn(turns[first].role, (*[ImageRef(-1)] * images, *turns[first].parts))
    return (*turns[:first], asked, *turns[first + 1 :])
