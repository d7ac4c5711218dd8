"""Questions about images in the official files of VQAv2, OK-VQA, TextVQA and GQA.

Of a question's ten answers the one given most is learned (`rows.answer`): VQAv2 and OK-VQA call it
`multiple_choice_answer`. Of GQA's two it is `answer`, the one that is scored, not the sentence.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm_jax.data import conversations, rows
from vlm_jax.data.conversations import Parsed, Record, short
from vlm_jax.data.example import BadExample
from vlm_jax.data.records import JsonRecords, digest, parse
from vlm_jax.data.scanning import entries, members
from vlm_jax.errors import DataError


class VqaRecords(JsonRecords):
    """The questions of a file of VQAv2 or OK-VQA, each with its answers from the file beside it.

    Args:
      path: of the questions, e.g. v2_OpenEnded_mscoco_train2014_questions.json, whose answers are
        v2_mscoco_train2014_annotations.json.

    Raises:
      DataError: one of the two cannot be read, or is none of these.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._answers = _Annotations(_annotations_of(path))

    def _index(self) -> Int[np.ndarray, "n 2"]:
        arrays, others = members(self._file, self.path)
        if "questions" not in arrays:
            raise DataError(f"{self.path} has no list 'questions'; expected a file of VQA's")
        raw = self._read(*others["data_subtype"]) if "data_subtype" in others else b""
        named = re.search(
            r"(train|val|test)\d{4}", raw.decode("utf-8", "replace") or self.path.name
        )
        if not named:
            raise DataError(f"{self.path} says no data_subtype; expected train2014, say")
        self._subset = named.group()
        return arrays["questions"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Question `index` with its answers, and `image`, the name of its file.

        Raises:
          BadExample: it is none, or has none.
        """
        question = super().__getitem__(index)
        image = question.get("image_id")
        if not isinstance(image, int):
            raise BadExample("bad_image_id", f"image_id is {short(image)}; expected a number")
        name = f"COCO_{self._subset}_{image:012d}.jpg"
        return self._answers.of(index, question.get("question_id")) | question | {"image": name}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of both files."""
        spans = np.concatenate([self.spans, self._answers.spans])
        return digest(spans, [self.path, self._answers.path])


class _Annotations(JsonRecords):
    """The answers to questions, found by the questions' ids."""

    def _index(self) -> Int[np.ndarray, "n 2"]:
        arrays, _ = members(self._file, self.path)
        if "annotations" not in arrays:
            raise DataError(f"{self.path} has no list 'annotations'; expected a file of VQA's")
        return arrays["annotations"]

    def of(self, index: int, question: Any) -> dict[str, Any]:
        """The answers to a question, which are at the question's own place in official files."""
        if index < len(self):
            found = self[index]
            if found.get("question_id") == question:
                return found
        ids, order = self._ids
        at = np.searchsorted(ids, question) if isinstance(question, int) else len(ids)
        if at == len(ids) or ids[at] != question:
            expected = f"an annotation with that id in {self.path}"
            raise BadExample(
                "no_annotation", f"question_id is {short(question)}; expected {expected}"
            )
        return self[order[at]]

    @functools.cached_property
    def _ids(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """All ids in order, and where each stands: read once a question is not at its place."""
        ids = np.array([self._id(i) for i in range(len(self))])
        order = np.argsort(ids, kind="stable")
        return ids[order], order

    def _id(self, index: int) -> int:
        try:
            found = self[index].get("question_id")
        except BadExample:
            found = None
        return found if isinstance(found, int) else -1


class TextVqaRecords(JsonRecords):
    """The questions of a file of TextVQA, e.g. TextVQA_0.5.1_train.json."""

    def _index(self) -> Int[np.ndarray, "n 2"]:
        arrays, _ = members(self._file, self.path)
        if "data" not in arrays:
            raise DataError(f"{self.path} has no list 'data'; expected a file of TextVQA's")
        return arrays["data"]


class GqaRecords(JsonRecords):
    """The questions of a file of GQA, e.g. train_balanced_questions.json: members of one object."""

    def _index(self) -> Int[np.ndarray, "n 2"]:
        return entries(self._file, self.path)

    def _parse(self, data: bytes) -> dict[str, Any]:
        ((key, question),) = parse(b"{" + data + b"}").items()
        if not isinstance(question, dict):
            raise BadExample("not_an_object", f"a {type(question).__name__}; expected an object")
        return question | {"question_id": key}


def vqa(record: Record) -> Parsed:
    """A question about an image of COCO."""
    return _asked(record, record["image"])


def text_vqa(record: Record) -> Parsed:
    """A question about an image of Open Images that shows text."""
    return _asked(record, _file(record, "image_id"))


def gqa(record: Record) -> Parsed:
    """A question about an image of Visual Genome."""
    return _asked(record, _file(record, "imageId"))


def _asked(record: Record, image: str) -> Parsed:
    question = rows.text(record, "question", "no_question")
    turns = conversations.shown(rows.answer(record), question)
    return conversations.key_of({"id": record.get("question_id", "")}), (image,), turns


def _file(record: Record, name: str) -> str:
    image = record.get(name)
    if not isinstance(image, (str, int)) or image == "":
        raise BadExample("bad_image_id", f"{name} is {short(image)}; expected text or a number")
    return f"{image}.jpg"


def _annotations_of(path: Path) -> Path:
    """The file of answers, as those who made both named it."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    if name == path.name:
        raise DataError(f"{path} is not named as files of questions are; expected *questions*.json")
    return path.with_name(name)
