"""configs/forkme.py: a folder of one's own becomes batches and held-out questions."""

import dataclasses
import importlib
import json

import numpy as np
import PIL.Image
import pytest

from vlm_jax import config as configs
from vlm_jax.data import heldout, pipeline

SHOWN = 3  # of the conversations have a picture


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.png")
    rows = [
        {
            "images": ["a.png"] * (i < SHOWN),
            "messages": [
                {"role": "user", "content": "<image>" * (i < SHOWN) + f"What is number {i}?"},
                {"role": "assistant", "content": f"Red, for the {i}th time."},
            ],
        }
        for i in range(6)
    ]
    for split in ("train", "validation"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return tmp_path


def resolved(folder) -> configs.Config:
    """The config, with the embedded tokenizer for the one of the imported decoder."""
    config = configs.resolve(importlib.import_module("configs.forkme").get_config(str(folder)))
    data = dataclasses.replace(config.data, tokenizer="embedded", template="tiny", rows=2)
    return dataclasses.replace(config, data=data)


def test_a_folder_of_ones_own_is_trained_and_evaluated_on(folder):
    config = resolved(folder)
    with pipeline.train_stream(config) as stream:
        batch, info = next(stream)
    assert batch.images.pixels.shape == (2, 8, 224, 224, 3)
    assert {source for row in info.documents for _, source in row} == {"mine"}
    assert batch.loss_weights.sum() > 0 and not info.rejects
    # An image takes sixteen places, each once.
    seen = batch.visual_index[batch.visual_index >= 0]
    shown = np.sum(batch.images.grids[..., 0] > 0)
    assert shown > 0 and len(seen) == 16 * shown
    examples = heldout.eval_examples(config, "validation", "mine")
    assert len(examples) == 6 and sum(len(e.images) for e in examples) == SHOWN
