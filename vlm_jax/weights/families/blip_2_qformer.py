"""BLIP-2's Q-Former with its queries and projection: names as in the state_dict of transformers'
`Blip2ForConditionalGeneration`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.qformer import QFormer
from vlm_jax.weights import fields
from vlm_jax.weights.tables import Row, linear, norm, placed

CARRIED: tuple[str, ...] = ()


def rows(preset: QFormer) -> list[Row]:
    """The table of a Q-Former without text."""
    return [
        Row("queries", "query_tokens", "first"),
        *norm("norm", "qformer.layernorm"),
        *layers(preset),
        *linear("project", "language_projection"),
    ]


def layers(preset: QFormer) -> list[Row]:
    """The rows of the layers: the k-th of a period is each `every`-th of theirs from the k-th."""
    found = []
    for k in range(preset.every):
        block = _attention("attention", "attended", "attention")
        if k == 0:
            block += _attention("cross_attention", "cross_attended", "crossattention")
        block += _feed_forward("mlp", "fed", "_query")
        if preset.vocab:
            block += _feed_forward("text_mlp", "text_fed", "")
        names = f"stack/blocks/layers/{k}/", "qformer.encoder.layer.{}."
        found += [row._replace(first=k, every=preset.every) for row in placed(block, *names)]
    return found


def _attention(ours: str, branch: str, theirs: str) -> list[Row]:
    found = linear(f"{ours}/out", f"{theirs}.output.dense")
    for name in ("query", "key", "value"):
        found += linear(f"{ours}/{name}", f"{theirs}.attention.{name}")
    return found + norm(f"{branch}/norm", f"{theirs}.output.LayerNorm")


def _feed_forward(ours: str, branch: str, suffix: str) -> list[Row]:
    found = linear(f"{ours}/up", f"intermediate{suffix}.dense")
    found += linear(f"{ours}/down", f"output{suffix}.dense")
    return found + norm(f"{branch}/norm", f"output{suffix}.LayerNorm")


def read(hf: Mapping[str, Any]) -> QFormer:
    """The Q-Former of a config.json.

    Raises:
      ConfigError: a setting that we do not have.
    """
    own = fields.part(hf, "qformer_config")
    # With it (image-text retrieval) every layer has a second feed-forward part.
    fields.setting(own, "use_qformer_text_input", False, {False: False})
    return QFormer(**sizes(hf))


def sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that BLIP-2's and InstructBLIP's have in common."""
    own = fields.part(hf, "qformer_config")
    fields.setting(own, "position_embedding_type", "absolute", {"absolute": "absolute"})
    return {
        "queries": hf.get("num_query_tokens", 32),
        "width": own.get("hidden_size", 768),
        "depth": own.get("num_hidden_layers", 12),
        "mlp": own.get("intermediate_size", 3072),
        "heads": own.get("num_attention_heads", 12),
        "every": own.get("cross_attention_frequency", 2),
        "activation": fields.setting(own, "hidden_act", "gelu", fields.ACTIVATIONS),
        "norm_eps": own.get("layer_norm_eps", 1e-12),
    }


def write(preset: QFormer) -> dict[str, Any]:
    """The fields of config.json that speak of the Q-Former."""
    own = {
        "hidden_size": preset.width,
        "num_hidden_layers": preset.depth,
        "intermediate_size": preset.mlp,
        "num_attention_heads": preset.heads,
        "cross_attention_frequency": preset.every,
        "hidden_act": fields.NAMES[preset.activation],
        "layer_norm_eps": preset.norm_eps,
    }
    return {"num_query_tokens": preset.queries, "qformer_config": own}
