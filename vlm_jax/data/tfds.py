"""Data sets of TFDS, prepared as ArrayRecord files, by number; nothing of TensorFlow is loaded.

`tfds build --file_format=array_record` makes them. What a record says is known by its features, as
that of a row of parquet by its columns (`rows.py`). Pictures come as they are stored, undecoded.
"""

import functools
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data import rows
from vlm_jax.data.example import BadExample
from vlm_jax.data.records import digest
from vlm_jax.errors import ConfigError, DataError, StorageError

_OURS = "tensorflow_datasets."


class TfdsRecords:
    """The records of a split of a data set, in `tfds.data_source`'s order.

    Args:
      path: folder of one version of it, then ":" and a split, e.g. coco_captions/2014/1.1.0:train;
        a split may be a part of one, e.g. "train[:90%]". The split may be left out where there is
        one alone.

    Raises:
      ConfigError: tensorflow-datasets is not installed.
      DataError: no such folder or split, other files than ArrayRecord, or features of no record.
    """

    def __init__(self, path: Path):
        name, _, split = path.name.partition(":")
        self.folder = path.with_name(name)
        _check_features(self.folder)
        builder = _builder(self.folder)
        self.split = split or _only(builder, path)
        try:
            self.features = rows.columns(list(builder.info.features))
        except DataError as error:
            raise DataError(f"{self.folder} {error}") from error
        try:
            self._source = builder.as_data_source(self.split, decoders=_undecoded(self.features))
            self._count = len(self._source)
        except Exception as error:  # it raises what its many layers say
            known = ", ".join(builder.info.splits)
            raise DataError(
                f"{self.folder} has no split {self.split!r} of ArrayRecord files; it has {known} "
                f"of {builder.info.file_format}: {error}"
            ) from error
        if not self._count:
            raise DataError(f"{path} holds no record")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`: its features as Python's own values.

        Raises:
          BadExample: it is none of these features.
          StorageError: it cannot be read.
        """
        try:
            raw = self._source.data_source[index]
        except Exception as error:  # the reader raises what its C++ says
            raise StorageError(f"{self.where(index)} cannot be read: {error}") from error
        try:
            features = self._source.dataset_info.features
            found = features.deserialize_example_np(raw, decoders=self._source.decoders)
        except Exception as error:
            raise BadExample("not_a_record", f"{type(error).__name__}: {error}") from error
        return {name: _plain(found[name]) for name in self.features}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the split, its size and blocks of the files."""
        files = sorted(glob.glob(os.path.join(glob.escape(self.folder), "*.array_record-*")))
        named = np.frombuffer(self.split.encode(), np.uint8).astype(np.int64)
        return digest(np.append(named, self._count)[:, None], files)

    def where(self, index: int) -> str:
        """The folder and split of record `index`, and how many-eth it is there."""
        return f"{self.folder}:{self.split}, record {index}"


def _check_features(folder: Path) -> None:
    """Refuses features of other modules than TFDS's own, which it would import by their names."""
    path = folder / "features.json"
    try:
        names = list(_classes(json.loads(path.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; expected the folder of a version of a data set that "
            "`tfds build --file_format=array_record` made, as coco_captions/2014/1.1.0"
        ) from error
    for name in names:
        if not (isinstance(name, str) and name.startswith(_OURS)):
            raise DataError(f"{path} names the class {name!r:.60}; expected one of {_OURS}*")


def _classes(said: Any) -> Iterator[Any]:
    """All classes that a description of features names, in its new and its old form."""
    children = said if isinstance(said, list) else said.values() if isinstance(said, dict) else ()
    if isinstance(said, dict):
        yield from (said[key] for key in ("pythonClassName", "python_class_name") if key in said)
        if "content" in said and isinstance(said.get("type"), str):  # no features of these names
            yield said["type"]
    for child in children:
        yield from _classes(child)


def _builder(folder: Path):
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigError(
            "data sets of TFDS need tensorflow-datasets: install vlm_jax with the extra `tfds`"
        ) from error
    try:
        return tensorflow_datasets.builder_from_directory(folder)
    except Exception as error:
        raise DataError(f"{folder} is no data set of TFDS: {error}") from error


def _only(builder, path: Path) -> str:
    names = list(builder.info.splits)
    if len(names) != 1:
        raise DataError(f"{path} names no split; expected {path}:SPLIT of {', '.join(names)}")
    return names[0]


def _undecoded(features: list[str]) -> dict[str, Any]:
    """What leaves pictures as they are stored."""
    import tensorflow_datasets

    class Stored(tensorflow_datasets.decode.SkipDecoding):
        def decode_batch_example_np(self, serialized_example):  # TFDS lacks it, for sequences
            return serialized_example

    return {name: Stored() for name in features if name in rows.IMAGES}


def _plain(value: Any) -> Any:
    """A feature without numpy."""
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value
