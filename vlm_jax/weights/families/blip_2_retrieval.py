"""BLIP-2's first stage: names of published Blip2ForImageTextRetrieval folders.

They have the model_type of those before a decoder. The head that generates texts and the learned
temperature are in no such folder: similarities are cosines.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.presets.matching import Matching
from vlm_jax.presets.qformer import QFormer
from vlm_jax.weights import fields, pictures
from vlm_jax.weights import inputs as inputs_
from vlm_jax.weights.families import blip_2, blip_2_qformer, blip_2_vision_model
from vlm_jax.weights.tables import Row, linear, norm, placed

ARCHITECTURE = "Blip2ForImageTextRetrieval"


def read(hf: Mapping[str, Any]) -> Model:
    """The encoder, the Q-Former and the heads of a config.json.

    Raises:
      ConfigError: it says what no preset does.
    """
    own = fields.part(hf, "qformer_config")
    fields.setting(own, "use_qformer_text_input", False, {True: True})
    positions = own.get("max_position_embeddings", 512)
    vocab = own.get("vocab_size", 30_522)
    qformer = QFormer(**blip_2_qformer.sizes(hf), vocab=vocab, positions=positions)
    vision = {"model_type": "blip_2_vision_model"} | dict(hf.get("vision_config") or {})
    out = hf.get("image_text_hidden_size", 256)
    heads = Matching(length=positions, out=out, temperature=0.0, generates=False)
    return Model(blip_2_vision_model.read(vision), qformer, text=heads)


def write(model: Model) -> dict[str, Any]:
    """Fields of config.json: the inverse of `read`."""
    found = blip_2_qformer.write(model.connector)
    own = {
        "vocab_size": model.connector.vocab,
        "max_position_embeddings": model.connector.positions,
        "use_qformer_text_input": True,
    }
    return {
        "model_type": "blip-2",
        "vision_config": blip_2_vision_model.write(model.encoder),
        **found,
        "qformer_config": found["qformer_config"] | own,
        "image_text_hidden_size": model.text.out,
    }


def rows(model: Model) -> list[Row]:
    """Where our leaves are."""
    qformer = [
        Row("queries", "query_tokens", "first"),
        Row("embedding", "embeddings.word_embeddings.weight"),
        Row("positions", "embeddings.position_embeddings.weight"),
        *norm("norm", "qformer.layernorm"),
        *blip_2_qformer.layers(model.connector),
    ]
    return [
        *placed(blip_2_vision_model.rows(model.encoder), "encoder/", blip_2.VISION),
        *placed(qformer, "connector/"),
        *linear("text/project", "text_projection"),
        *linear("text/image_project", "vision_projection"),
        *linear("text/match", "itm_head"),
    ]


def carried(model: Model) -> tuple[str, ...]:
    """Everything is computed."""
    return ()


def inputs(model: Model, hf: Mapping[str, Any], arrays: inputs_.Arrays) -> pictures.Seen:
    """Pictures and texts, before which placeholders stand where config.json knows one."""
    seen = pictures.with_texts(pictures.RESIZED_ON_DEMAND, model.encoder, arrays)
    before = 0 if fields.image_token(hf) is None else model.connector.queries
    return seen._replace(tokens=np.asarray(seen.tokens)[:, before:], mask=seen.mask[:, before:])
