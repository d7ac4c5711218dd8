"""How users' own corpora are written: a table from a format's name to what reads it.

`messages` is the one to write oneself, one object per line:

    {"id": "unique", "images": ["a.png"], "messages": [
       {"role": "user", "content": "<image>What is this?"},
       {"role": "assistant", "content": "A cat."}]}

`content` may also be a list of {"type": "text", "text": ...} and {"type": "image"}; both forms name
images in the order in which they stand. `llava` is what LLaVA, ShareGPT4V and most that came after
are published in: `conversations` of `from` and `value`, and `image`, a path or several.
`coco` is the captions' own JSON, e.g. captions_train2017.json beside the folder train2017.

`parquet` is a file, a folder or a pattern of files of tables as Hugging Face has them, images and
all: The Cauldron's and FineVision's `images` and `texts`, or `image` or `images` with `messages`,
`conversations`, `question` and `answer` or `answers`, or `caption` or `text` (`rows.py`).
`tfds` is a data set that TFDS prepared as ArrayRecord files: FOLDER/1.0.0:SPLIT, known likewise.
ArrayRecord files that neither TFDS nor we wrote say nothing of what their records hold: there is no
format for them.

`vqa` is the questions' JSON of VQAv2 or OK-VQA beside that of their annotations; `textvqa` and
`gqa` are these data sets' own. `images` is the folder of COCO's, Open Images' or Visual Genome's
pictures then, and the answer that is given most is learned (`vqa.py`).

`obelics` is a web page per row of parquet or line of JSON: `images` and `texts` of equal length,
one of which is null at each place; an image is bytes or a path, not a URL. `mmc4` is MMC4's lines
of `text_list` and `image_info`. All text is learned in the order it is read (`interleaved.py`).

`webdataset` is what img2dataset makes of CC3M, CC12M or LAION: shards of images and captions.
`pages` is PDFA or OCR-IDL: such shards of PDFs and their text, a page an example (`pdf_pages.py`).
`shards` is a folder that `python -m vlm_jax.prepare run` wrote of any of these.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Corpus
from vlm_jax.data import conversations, interleaved, pdf_pages, rows, shards, tars, vqa
from vlm_jax.data.conversations import Parsed, Record
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.parquet import ParquetRecords
from vlm_jax.data.records import CocoRecords, JsonRecords
from vlm_jax.data.tfds import TfdsRecords
from vlm_jax.errors import ConfigError
from vlm_jax.schema import unknown_key


@dataclasses.dataclass(frozen=True)
class Format:
    """How a corpus is written.

    Attributes:
      open: the records of a path.
      parse: a record's key, its images and its turns.
    """

    open: Callable[[Path], Any]
    parse: Callable[[Any], Parsed]


def coco(record: Record) -> Parsed:
    """An annotation of COCO captions with its image's file name."""
    caption = record.get("caption")
    if not isinstance(caption, str):
        raise BadExample("no_caption", f"caption is {conversations.short(caption)}; expected text")
    return conversations.key_of(record), (record["file_name"],), conversations.shown(caption)


def captioned(sample: tars.Sample) -> Parsed:
    """A picture and its caption."""
    return "", (sample.image,), conversations.shown(sample.caption)


FORMATS = {
    "messages": Format(JsonRecords, conversations.messages),
    "llava": Format(JsonRecords, conversations.llava),
    "coco": Format(CocoRecords, coco),
    "vqa": Format(vqa.VqaRecords, vqa.vqa),
    "textvqa": Format(vqa.TextVqaRecords, vqa.text_vqa),
    "gqa": Format(vqa.GqaRecords, vqa.gqa),
    "parquet": Format(lambda path: ParquetRecords(path, rows.columns), rows.parse),
    "obelics": Format(interleaved.pages, interleaved.obelics),
    "mmc4": Format(JsonRecords, interleaved.mmc4),
    "pages": Format(pdf_pages.PageRecords, captioned),
    "tfds": Format(TfdsRecords, rows.parse),
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
        turns = conversations.numbered(turns, len(images))
        conversations.check(turns)
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


def _inside(folder: Path, path: str) -> Path:
    """The path below the folder; what links there lead to is the owner's business."""
    # The folder is absolute: every path is relative to ".", even "../x".
    whole = os.path.normpath(folder / path)
    if "\0" in path or not Path(whole).is_relative_to(folder):
        raise BadExample("path_outside", f"{path!r} is not below {folder}")
    return Path(whole)
