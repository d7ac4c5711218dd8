"""Rotary frequencies of a config.json, from either generation of it, as fields of a decoder."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.decoders import Decoder
from vlm_jax.weights import fields

# Ramps between frequencies that stay and those that are divided, by the rope_type that has them;
# with what marks the slow and the fast ones, and transformers' default.
RAMPS = {
    "llama3": ("turns", {"rope_low": ("low_freq_factor", 1), "rope_high": ("high_freq_factor", 4)}),
    "yarn": ("dimensions", {"rope_low": ("beta_slow", 1), "rope_high": ("beta_fast", 32)}),
}


def read(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a decoder.

    Args:
      rope: its rope_parameters, or the rope_scaling of older files.
      hf: the config.json, whose `rope_theta` and `max_position_embeddings` are set.

    Raises:
      ConfigError: they are scaled in a way that no field says.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields.expect({"rope_type": kind}, rope_type=("default", "linear", *RAMPS))
    found = {"rope_theta": float(rope.get("rope_theta") or hf["rope_theta"])}
    if kind == "linear":
        found["rope_factor"] = float(rope["factor"])
    if kind in RAMPS:
        fields.expect(rope, truncate=True)
        ramp, marks = RAMPS[kind]
        original = rope.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        factor = rope.get("factor") or hf["max_position_embeddings"] / original
        found |= {"rope_ramp": ramp, "rope_original": original, "rope_factor": float(factor)}
        found |= {ours: float(rope.get(key) or usual) for ours, (key, usual) in marks.items()}
    if kind == "yarn":
        found["rope_scale"] = _scale(rope, found["rope_factor"])
    return found


def _scale(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on rotated queries and keys (Peng et al. 2023, equation 22)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    grown = lambda by: 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1.0)


def write(decoder: Decoder) -> dict[str, Any]:
    """rope_parameters: the inverse of `read`."""
    d = decoder
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": d.rope_factor}
    if d.rope_original:
        kind, marks = next((k, marks) for k, (ramp, marks) in RAMPS.items() if ramp == d.rope_ramp)
        rope |= {
            "rope_type": kind,
            "factor": d.rope_factor,
            "original_max_position_embeddings": d.rope_original,
            **{key: getattr(d, ours) for ours, (key, _) in marks.items()},
        }
        if kind == "yarn":
            rope["attention_factor"] = d.rope_scale
    return rope
