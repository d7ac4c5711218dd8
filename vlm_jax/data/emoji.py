"""The embedded data as Examples: emoji and rendered words, seven kinds, four splits.

A source is a pure function of (split, kind, index, seed): `EmojiSource("train", "choice")[7]` is
always the same Example, and `example(7, rng)` draws another question about the same picture. Names
that a question mentions come from pictures drawn like the right answers are, so that the text
alone says nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import scenes
from vlm_jax.data.emoji_records import SPLITS, Record, World, thumbnail, world
from vlm_jax.data.example import Example, ImageRef, Part, Turn
from vlm_jax.errors import ConfigError

KINDS = ("caption", "group", "yes_no", "choice", "scene", "reading", "compare")
COUNTS = ("one", "two", "three", "four", "five")
YES_NO = ("yes", "no")
ORDINALS = ("first", "second")

# Every text that a question can be. {name} and {other} are captions, {relation} is one of
# scenes.RELATIONS; options are joined by "; " because captions contain commas.
QUESTIONS = {
    "group": ("which group is it?", "what kind of thing is it?", "name its group."),
    "yes_no": ("is it {name}?", "is this {name}?", "does it show {name}?"),
    "choice": ("which is it: {options}?", "choose one: {options}.", "what is it: {options}?"),
    "count": ("how many are there?", "how many {name}?", "count them."),
    "relation": ("is {name} {relation} {other}?", "does {name} stand {relation} {other}?"),
    "neighbour": ("what is {relation} {name}?", "what stands {relation} {name}?"),
    "reading": ("what does it say?", "read the word.", "which word is it?"),
    "same": ("do both show the same thing?", "are they the same?", "is it the same thing twice?"),
    "which": ("which one shows {name}?", "which picture is {name}?", "where is {name}?"),
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A drawn question: what differs between kinds. `question` is "" for captions."""

    images: tuple[bytes, ...]
    question: str
    answer: str
    image_texts: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pick(options: Sequence, rng: np.random.Generator):
    """One of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def ask(form: str, rng: np.random.Generator, **fields: str) -> str:
    """One of the phrasings of a form, filled in."""
    return pick(QUESTIONS[form], rng).format(**fields)


def single(record: Record, question: str, answer: str, **meta: Any) -> Draft:
    """A question about one picture."""
    return Draft((record.image,), question, answer, (record.caption,), meta)


def caption(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """The picture alone; its CLDR name is the answer."""
    return single(record, "", record.caption)


def group(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Which of the nine emoji groups."""
    return single(record, ask("group", rng), record.group)


def reading(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Which word is written."""
    return single(record, ask("reading", rng), record.caption)


def yes_no(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Is it ...? Half yes; of the wrong names, half come from the picture's subgroup."""
    named = record
    if rng.random() < 0.5:
        close = here.names.where("subgroup", record.subgroup) if rng.random() < 0.5 else ()
        named = here.names.other([record], rng, close)
    answer = YES_NO[named is not record]
    question = ask("yes_no", rng, name=named.caption)
    return single(record, question, answer, options=YES_NO, named=named.caption)


def choice(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Four names in random order; half the time all of the picture's group."""
    close = here.names.where("group", record.group) if rng.random() < 0.5 else ()
    taken = [record]
    for _ in range(3):
        taken.append(here.names.other(taken, rng, close))
    options = tuple(taken[i].caption for i in rng.permutation(4))
    question = ask("choice", rng, options="; ".join(options))
    return single(record, question, record.caption, options=options)


def scene(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Counting or a relation, half and half."""
    return pick((count, relation), rng)(record, here, rng)


def count(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """One to five copies of the picture."""
    number = 1 + int(rng.integers(len(COUNTS)))
    boxes = scenes.count_boxes(number, rng)
    question = ask("count", rng, name=record.caption)
    meta = {"form": "count", "options": COUNTS, "captions": (record.caption,) * number}
    return draw_scene([(record, box) for box in boxes], question, COUNTS[number - 1], meta)


def relation(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Two pictures: does the asked relation hold, or what stands there."""
    other = here.anchors.other([record], rng)
    asked = pick(tuple(scenes.RELATIONS), rng)
    form = pick(("relation", "neighbour"), rng)
    meta = {"form": form, "relation": asked, "captions": (record.caption, other.caption)}
    if form == "neighbour":
        # The other is the answer, so it is what stands in the asked relation to the named one.
        answer_box, named_box = scenes.pair_boxes(asked, rng)
        question = ask(form, rng, name=record.caption, relation=asked)
        placed = [(record, named_box), (other, answer_box)]
        return draw_scene(placed, question, other.caption, meta)
    answer = pick(YES_NO, rng)
    true = asked if answer == "yes" else scenes.OPPOSITE[asked]
    placed = list(zip((record, other), scenes.pair_boxes(true, rng), strict=True))
    question = ask(form, rng, name=record.caption, relation=asked, other=other.caption)
    return draw_scene(placed, question, answer, {**meta, "options": YES_NO})


def draw_scene(
    placed: Sequence[tuple[Record, scenes.Box]], question: str, answer: str, meta: Mapping
) -> Draft:
    """Composes and encodes the scene; its boxes go to `meta` in the order of `captions`."""
    canvas = scenes.compose([(thumbnail(record, box.size), box) for record, box in placed])
    boxes = tuple(dataclasses.astuple(box) for _, box in placed)
    return Draft((scenes.encode(canvas),), question, answer, (), {**meta, "boxes": boxes})


def compare(record: Record, here: World, rng: np.random.Generator) -> Draft:
    """Two pictures in two styles, in random order: the same thing? Or: which one shows ...?"""
    style = pick([r.style for r in others_of(record, here)], rng)
    form, same = pick(("same", "which"), rng), rng.random() < 0.5
    if form == "same" and same:
        partner = next(r for r in others_of(record, here) if r.style == style)
    else:
        partner = other_in_style(record, style, here, rng)
    shown = (record, partner) if rng.random() < 0.5 else (partner, record)
    meta = {"form": form, "captions": tuple(r.caption for r in shown)}
    if form == "same":
        question, answer, options = ask(form, rng), YES_NO[partner.key != record.key], YES_NO
    else:
        # Either may be asked for: an unseen style must not give the answer away.
        asked = int(rng.integers(2))
        question, answer = ask(form, rng, name=shown[asked].caption), ORDINALS[asked]
        options = ORDINALS
    images = tuple(r.image for r in shown)
    return Draft(images, question, answer, meta["captions"], {**meta, "options": options})


def others_of(record: Record, here: World) -> list[Record]:
    """The pictures of the same concept in other styles that this split may show beside it."""
    return [r for r in here.names.where("key", record.key) if r.style != record.style]


def other_in_style(record: Record, style: str, here: World, rng: np.random.Generator) -> Record:
    """Another concept's picture of that style, half the time of the same group."""
    among = here.names.where("style", style)
    if rng.random() < 0.5:
        among = [r for r in here.names.where("group", record.group) if r.style == style]
    return here.names.other([record], rng, among)


BUILDERS: Mapping[str, Callable[[Record, World, np.random.Generator], Draft]] = {
    "caption": caption,
    "group": group,
    "yes_no": yes_no,
    "choice": choice,
    "scene": scene,
    "reading": reading,
    "compare": compare,
}


@dataclasses.dataclass(frozen=True)
class EmojiSource:
    """Random access to the Examples of one kind in one split.

    Attributes:
      split: one of SPLITS.
      kind: one of KINDS.
      seed: which questions `source[i]` asks; the pictures do not depend on it.

    Raises:
      ConfigError: an unknown split or kind.
    """

    split: str
    kind: str
    seed: int = 0

    def __post_init__(self):
        if self.kind not in BUILDERS:
            raise ConfigError(f"unknown kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        self._world()

    def _world(self) -> World:
        # Not stored: a source that travels to a worker process is then three small fields.
        return world("words" if self.kind == "reading" else "emoji", self.split)

    @functools.cached_property
    def _anchors(self) -> Sequence[Record]:
        here = self._world()
        if self.kind == "compare":
            return [r for r in here.anchors.records if others_of(r, here)]
        return here.anchors.records

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __len__(self) -> int:
        return len(self._anchors)

    def __getitem__(self, index: int) -> Example:
        # Kind and split are in the seed so that question 7 is not alike everywhere.
        place = KINDS.index(self.kind), SPLITS.index(self.split)
        return self.example(index, np.random.default_rng((self.seed, index, *place)))

    def groups(self) -> list[list[int]]:
        """Indices of the anchors that show one concept in its styles, for every concept."""
        found: dict[str, list[int]] = {}
        for index, record in enumerate(self._anchors):
            found.setdefault(record.key, []).append(index)
        return list(found.values())

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The Example about anchor `index` whose question, names and layout `rng` draws."""
        record = self._anchors[index]
        draft = BUILDERS[self.kind](record, self._world(), rng)
        pictures: tuple[Part, ...] = tuple(map(ImageRef, range(len(draft.images))))
        asked = (draft.question,) if draft.question else ()
        facts = {"flag": record.flag, "concept": record.key, "style": record.style}
        return Example(
            key=f"emoji/{self.kind}/{self.split}/{record.key}-{record.style}",
            source=self.kind,
            images=draft.images,
            turns=(Turn("user", (*pictures, *asked)), Turn("assistant", (draft.answer,))),
            image_texts=draft.image_texts,
            meta={**facts, **draft.meta},
        )
