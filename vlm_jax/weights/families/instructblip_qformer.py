"""InstructBLIP's Q-Former, which reads the instruction: names as in the state_dict of transformers'
`InstructBlipForConditionalGeneration`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.qformer import QFormer
from vlm_jax.weights import fields
from vlm_jax.weights.families import blip_2_qformer
from vlm_jax.weights.tables import Row, linear, norm

CARRIED: tuple[str, ...] = ()


def rows(preset: QFormer) -> list[Row]:
    """The table of a Q-Former with text."""
    embeddings = "qformer.embeddings."
    return [
        Row("queries", "query_tokens", "first"),
        Row("embedding", embeddings + "word_embeddings.weight"),
        Row("positions", embeddings + "position_embeddings.weight"),
        *norm("norm", embeddings + "layernorm"),
        *blip_2_qformer.layers(preset),
        *linear("project", "language_projection"),
    ]


def read(hf: Mapping[str, Any]) -> QFormer:
    """The Q-Former of a config.json.

    Raises:
      ConfigError: a setting that we do not have.
    """
    own = fields.part(hf, "qformer_config")
    return QFormer(
        **blip_2_qformer.sizes(hf),
        vocab=own.get("vocab_size", 30_522),
        positions=own.get("max_position_embeddings", 512),
    )


def write(preset: QFormer) -> dict[str, Any]:
    """The fields of config.json that speak of the Q-Former."""
    fields = blip_2_qformer.write(preset)
    own = {"vocab_size": preset.vocab, "max_position_embeddings": preset.positions}
    return fields | {"qformer_config": fields["qformer_config"] | own}
