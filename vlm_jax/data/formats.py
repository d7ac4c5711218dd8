"""How users' own corpora are written: a table from a format's name to what reads it.

`messages` is the one to write oneself, one object per line:

    {"id": "unique", "images": ["a.png"], "messages": [
       {"role": "user", "content": "<image>What is this?"},
       {"role": "assistant", "content": "A cat."}]}

`content` may also be a list of {"type": "text", "text": ...} and {"type": "image"}; both forms name
images in the order in which they stand. `llava` is what LLaVA, ShareGPT4V and most that came after
are published in: `conversations` of `from` and `value`, and `image`, a path or several.
`coco` is the captions' own JSON, e.g. captions_train2017.json beside the folder train2017.
`webdataset` is what img2dataset makes of CC3M, CC12M or LAION: shards of images and captions.
`shards` is a folder that `python -m vlm_jax.prepare run` wrote of any of these.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Corpus
from vlm_jax.data import shards, tars
from vlm_jax.data.example import BadExample, Example, ImageRef, Part, Turn
from vlm_jax.data.records import CocoRecords, JsonRecords
from vlm_jax.errors import ConfigError
from vlm_jax.schema import unknown_key

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


@dataclasses.dataclass(frozen=True)
class Format:
    """How a corpus is written.

    Attributes:
      open: the records of a path.
      parse: a record's key, its images and its turns.
    """

    open: Callable[[Path], Any]
    parse: Callable[[Any], Parsed]


def messages(record: Record) -> Parsed:
    """A conversation as chat APIs have it."""
    turns = [
        _turn(said, "role", "content", f"messages[{i}]")
        for i, said in enumerate(_list(record, "messages"))
    ]
    return _key(record), _paths(record), tuple(turns)


def llava(record: Record) -> Parsed:
    """A conversation as LLaVA's authors write it."""
    turns = [
        _turn(said, "from", "value", f"conversations[{i}]")
        for i, said in enumerate(_list(record, "conversations"))
    ]
    return _key(record), _paths(record), tuple(turns)


def coco(record: Record) -> Parsed:
    """An annotation of COCO captions with its image's file name."""
    caption = record.get("caption")
    if not isinstance(caption, str):
        raise BadExample("no_caption", f"caption is {_short(caption)}; expected text")
    turns = Turn("user", (ImageRef(-1),)), Turn("assistant", (caption,))
    return _key(record), (record["file_name"],), turns


def captioned(sample: tars.Sample) -> Parsed:
    """A picture and its caption."""
    turns = Turn("user", (ImageRef(-1),)), Turn("assistant", (sample.caption,))
    return "", (sample.image,), turns


FORMATS = {
    "messages": Format(JsonRecords, messages),
    "llava": Format(JsonRecords, llava),
    "coco": Format(CocoRecords, coco),
    "webdataset": Format(tars.TarRecords, captioned),
    "shards": Format(shards.ShardRecords, shards.unpack),
}


class CorpusSource:
    """A corpus of files as a source of examples.

    Args:
      name: of the corpus, which its examples carry as their source.
      corpus: what the config says of it.
      split: which of its paths.

    Raises:
      ConfigError: an unknown format, or a split that it does not have.
      DataError: its file cannot be read.
    """

    def __init__(self, name: str, corpus: Corpus, split: str):
        if corpus.format not in FORMATS:
            message = unknown_key(corpus.format, FORMATS)
            raise ConfigError(message.replace("config key", f"format of data.corpora.{name}"))
        if split not in corpus.paths:
            known = ", ".join(corpus.paths)
            raise ConfigError(f"data.corpora.{name} has no split {split!r}; it has {known}")
        self.name, self.split = name, split
        self.format = FORMATS[corpus.format]
        path = Path(corpus.paths[split]).expanduser()
        folder = Path(corpus.images).expanduser() if corpus.images else path.parent
        self.folder = Path(os.path.abspath(folder))
        self.records = self.format.open(path)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """Of the corpus's records."""
        return self.records.fingerprint

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; nothing of it is left to chance.

        Raises:
          BadExample: the record makes none.
        """
        key, images, turns = self.format.parse(self.records[index])
        images = tuple(i if isinstance(i, bytes) else _inside(self.folder, i) for i in images)
        turns = _numbered(turns, len(images))
        _check(turns)
        # Not by its id, which may hold anything: keys become names of files.
        return Example(
            f"{self.name}/{self.split}/{index}",
            self.name,
            images,
            turns,
            meta={"id": key} if key else {},
        )

    def groups(self) -> Sequence[Sequence[int]]:
        """Every example is about something else."""
        return [[i] for i in range(len(self))]


def _key(record: Record) -> str:
    key = record.get("id", "")
    if not isinstance(key, (str, int)):
        raise BadExample("bad_id", f"id is {key!r}; expected text or a number")
    return str(key)


def _list(record: Record, name: str) -> list:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        given = "is missing" if found is None else f"is {_short(found)}"
        raise BadExample("no_turns", f"{name} {given}; expected a list of turns")
    return found


def _paths(record: Record) -> Sequence[str]:
    """Of `images` or `image`, one path or several: both names are in use for both."""
    name = "images" if "images" in record else "image"
    found = record.get(name)
    paths = [] if found is None else found if isinstance(found, list) else [found]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise BadExample("bad_image_path", f"{name} holds {_short(path)}; expected a path")
    return paths


def _turn(said: Any, role: str, content: str, where: str) -> Turn:
    if not isinstance(said, dict) or role not in said or content not in said:
        raise BadExample("bad_turn", f"{where} is {_short(said)}; expected {role} and {content}")
    if not isinstance(said[role], str) or said[role] not in ROLES:
        known = ", ".join(ROLES)
        raise BadExample("unknown_role", f"{where}.{role} is {said[role]!r}; expected {known}")
    return Turn(ROLES[said[role]], tuple(_parts(said[content], f"{where}.{content}")))


def _parts(content: Any, where: str) -> list[Part]:
    """Text and images in order; images are numbered by `_numbered`."""
    if isinstance(content, str):
        pieces = re.split(f"({PLACEHOLDER})", content)
        return [ImageRef(-1) if piece == PLACEHOLDER else piece for piece in pieces if piece]
    if not isinstance(content, list):
        raise BadExample("bad_content", f"{where} is {_short(content)}; expected text or a list")
    parts: list[Part] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append(ImageRef(-1))
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            expected = 'expected {"type": "image"} or {"type": "text", "text": ...}'
            raise BadExample("bad_content", f"{where}[{i}] is {_short(part)}; {expected}")
    return parts


def _numbered(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """The turns with their images numbered as they come."""
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


def _check(turns: Sequence[Turn]) -> None:
    """That the user and the assistant take turns, and that there is something to learn."""
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


def _inside(folder: Path, path: str) -> Path:
    """The path below the folder; what links there lead to is the owner's business."""
    # The folder is absolute: every path is relative to ".", even "../x".
    whole = os.path.normpath(folder / path)
    if "\0" in path or not Path(whole).is_relative_to(folder):
        raise BadExample("path_outside", f"{path!r} is not below {folder}")
    return Path(whole)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
