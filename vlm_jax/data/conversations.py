"""Conversations as users write them: records become turns, and turns are checked."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.example import BadExample, ImageRef, Part, Turn

Record = Mapping[str, Any]
Parsed = tuple[str, Sequence[str | bytes], tuple[Turn, ...]]

PLACEHOLDER = "<image>"
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


def messages(record: Record) -> Parsed:
    """A conversation as chat APIs have it."""
    return key_of(record), _paths(record), of_messages(record)


def llava(record: Record) -> Parsed:
    """A conversation as LLaVA's authors write it."""
    return key_of(record), _paths(record), of_llava(record)


def of_messages(record: Record) -> tuple[Turn, ...]:
    """The turns of `messages`."""
    return _turns(record, "messages", "role", "content")


def of_llava(record: Record) -> tuple[Turn, ...]:
    """The turns of `conversations`."""
    return _turns(record, "conversations", "from", "value")


def shown(answer: str, question: str = "") -> tuple[Turn, ...]:
    """A picture, what is asked about it, and the answer."""
    asked = (question,) if question else ()
    return Turn("user", (ImageRef(-1), *asked)), Turn("assistant", (answer,))


def key_of(record: Record) -> str:
    """A record's id as text.

    Raises:
      BadExample: it is neither text nor a number.
    """
    key = record.get("id", "")
    if not isinstance(key, (str, int)):
        raise BadExample("bad_id", f"id is {key!r}; expected text or a number")
    return str(key)


def _list(record: Record, name: str) -> list:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        given = "is missing" if found is None else f"is {short(found)}"
        raise BadExample("no_turns", f"{name} {given}; expected a list of turns")
    return found


def _paths(record: Record) -> Sequence[str]:
    """Of `images` or `image`, one path or several: both names are in use for both."""
    name = "images" if "images" in record else "image"
    found = record.get(name)
    paths = [] if found is None else found if isinstance(found, list) else [found]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise BadExample("bad_image_path", f"{name} holds {short(path)}; expected a path")
    return paths


def _turns(record: Record, name: str, role: str, content: str) -> tuple[Turn, ...]:
    return tuple(
        _turn(said, role, content, f"{name}[{i}]") for i, said in enumerate(_list(record, name))
    )


def _turn(said: Any, role: str, content: str, where: str) -> Turn:
    if not isinstance(said, dict) or role not in said or content not in said:
        raise BadExample("bad_turn", f"{where} is {short(said)}; expected {role} and {content}")
    if not isinstance(said[role], str) or said[role] not in ROLES:
        known = ", ".join(ROLES)
        raise BadExample("unknown_role", f"{where}.{role} is {said[role]!r}; expected {known}")
    return Turn(ROLES[said[role]], tuple(parts_of(said[content], f"{where}.{content}")))


def parts_of(content: Any, where: str) -> list[Part]:
    """Text and images in order; images are numbered by `numbered`.

    Raises:
      BadExample: it is neither text nor a list of parts.
    """
    if isinstance(content, str):
        pieces = re.split(f"({PLACEHOLDER})", content)
        return [ImageRef(-1) if piece == PLACEHOLDER else piece for piece in pieces if piece]
    if not isinstance(content, list):
        raise BadExample("bad_content", f"{where} is {short(content)}; expected text or a list")
    parts: list[Part] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append(ImageRef(-1))
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            expected = 'expected {"type": "image"} or {"type": "text", "text": ...}'
            raise BadExample("bad_content", f"{where}[{i}] is {short(part)}; {expected}")
    return parts


def numbered(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """The turns with their images numbered as they come.

    Raises:
      BadExample: there are more or fewer than `images` of them.
    """
    count = 0
    found = []
    for turn in turns:
        parts: list[Part] = []
        for part in turn.parts:
            parts.append(ImageRef(count) if isinstance(part, ImageRef) else part)
            count += isinstance(part, ImageRef)
        found.append(Turn(turn.role, tuple(parts)))
    if count != images:
        raise BadExample(
            "image_count",
            f"{images} images for {count} places in the turns; expected one {PLACEHOLDER} each",
        )
    return tuple(found)


def check(turns: Sequence[Turn]) -> None:
    """That the user and the assistant take turns, and that there is something to learn.

    Raises:
      BadExample: they do not, or there is not.
    """
    spoken = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in spoken]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        expected = "user and assistant in turn, after at most one system"
        raise BadExample("roles_out_of_turn", f"{', '.join(t.role for t in turns)}; {expected}")
    for turn in turns:
        text = "".join(part for part in turn.parts if isinstance(part, str))
        if turn.role != "user" and any(isinstance(part, ImageRef) for part in turn.parts):
            raise BadExample("image_in_answer", f"{turn.role} shows an image; only the user may")
        if turn.role == "assistant" and not text.strip():
            raise BadExample("empty_answer", "the assistant says nothing")


def short(value: Any) -> str:
    """A value as a detail shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
