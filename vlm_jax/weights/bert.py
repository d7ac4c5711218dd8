"""BERT as what a Q-Former begins by: LAVIS's `init_Qformer` (Qformer.py, blip2.py).

BERT's layers give the Q-Former its attention among queries and text, and both of its feed-forward
parts: queries begin as they read text. Its tables give those of the text, its head that of
generating. What looks at images, the queries and the heads of comparing are nowhere in it; its
token types, its pooler and its next-sentence head have no place in a Q-Former.
"""

import re
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params
from vlm_jax.presets.qformer import QFormer
from vlm_jax.weights import files, tables
from vlm_jax.weights.families import blip_2_qformer
from vlm_jax.weights.tables import Row, linear, norm, placed

DEVIATION = 0.02  # of rows that its vocabulary lacks, as BERT draws its tables
EMBEDDING, BIAS = "connector/embedding", "text/output_bias"  # leaves with a row per token
# Names of its folders, old ones too, as a Q-Former's: patterns and replacements, in order.
RENAMES = (
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"\.attention\.self\.", ".attention.attention."),
)


def is_folder(path: Path) -> bool:
    """Whether a folder holds one, as transformers writes it."""
    try:
        return files.read_json(path / "config.json").get("model_type") == "bert"
    except DataError:
        return False


class Bert:
    """The leaves that a published BERT gives a model with a Q-Former.

    Args:
      path: its folder.
      model: must have a Q-Former that reads text, of BERT's sizes.
      seed: of the rows that its vocabulary lacks ([DEC]).

    Attributes:
      shapes: of the leaves, by path.

    Raises:
      ConfigError: the model has no such Q-Former.
      DataError: the folder is damaged.
    """

    def __init__(self, path: Path, model: Model, seed: int):
        folder = files.Folder(path)
        self._vocab = _check(path, folder, model.connector)
        self._source, self._seed = folder, seed
        self._names = {_renamed(name): name for name in folder.shapes}
        wanted, self._rows = params.abstract(model), {}
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for row in _rows(model.connector):
            if row.ours not in wanted or not (names := self._tensors(row, wanted[row.ours].shape)):
                continue
            dtype = folder.dtypes[self._names[names[0]]]
            self.shapes[row.ours] = jax.ShapeDtypeStruct(wanted[row.ours].shape, dtype)
            self._rows[row.ours] = row

    def read(self, paths: Collection[str]) -> dict[str, np.ndarray]:
        """Some of the leaves.

        Raises:
          DataError: a tensor has another size than config.json says.
        """
        return {path: self._leaf(path) for path in paths}

    def _leaf(self, path: str) -> np.ndarray:
        row, leaf = self._rows[path], self.shapes[path]
        shape = (self._vocab, *leaf.shape[1:]) if path in (EMBEDDING, BIAS) else leaf.shape
        names = self._tensors(row, leaf.shape)
        tensors = {name: self._source.read(self._names[name]) for name in names}
        found = tables.gather([row], {path: shape}, tensors)[path]
        if found.shape == leaf.shape:
            return found
        # Tokens that BERT does not have: their rows are drawn, their biases 0.
        new = np.zeros((leaf.shape[0] - self._vocab, *leaf.shape[1:]))
        if path == EMBEDDING:
            new = DEVIATION * np.random.default_rng(self._seed).standard_normal(new.shape)
        return np.concatenate([found, new.astype(leaf.dtype)])

    def _tensors(self, row: Row, shape: tuple[int, ...]) -> list[str]:
        """Names of a row's tensors, which are all there, or none of them (the head may lack)."""
        names = row.names(tables.layers_of(row.ours, shape))
        missing = [name for name in names if name not in self._names]
        if missing and not row.ours.startswith("text/"):
            raise DataError(f"{self._source.path} lacks the tensor {missing[0]} of a BERT")
        return [] if missing else names


def _rows(preset: QFormer) -> list[Row]:
    """The table of names; queries take what text takes."""
    layers = [
        row._replace(theirs=row.theirs.removeprefix("qformer.").replace("_query", ""))
        for row in blip_2_qformer.layers(preset)
        if "crossattention" not in row.theirs
    ]
    reader = [
        Row("embedding", "embeddings.word_embeddings.weight"),
        Row("positions", "embeddings.position_embeddings.weight"),
        *norm("norm", "embeddings.LayerNorm"),
        *layers,
    ]
    return [
        *placed(reader, "connector/"),
        *linear("text/transform", "cls.predictions.transform.dense"),
        *norm("text/transform_norm", "cls.predictions.transform.LayerNorm"),
        Row(BIAS, "cls.predictions.bias"),
    ]


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check(path: Path, folder: files.Folder, preset: object) -> int:
    """That a Q-Former has BERT's sizes; returns BERT's own vocabulary."""
    hf = folder.config
    vocab = hf.get("vocab_size", 30_522)
    if type(vocab) is not int or not isinstance(preset, QFormer) or preset.vocab < vocab:
        raise ConfigError(
            f"config.init: {path} is a BERT; expected a model with a Q-Former that reads its "
            f"{vocab!r} tokens"
        )
    sizes = blip_2_qformer.sizes({"qformer_config": hf, "num_query_tokens": preset.queries})
    sizes |= {"every": preset.every, "positions": hf.get("max_position_embeddings", 512)}
    for name, value in sizes.items():
        if getattr(preset, name) != value:
            raise ConfigError(
                f"config.init: {path} is a BERT of {name} {value}; the model's Q-Former has "
                f"{getattr(preset, name)}"
            )
    return vocab
