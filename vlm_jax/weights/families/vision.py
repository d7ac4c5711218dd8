"""What families of vision transformers share: fields of config.json, names of blocks."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights.fields import ACTIVATIONS, NAMES
from vlm_jax.weights.tables import Row, linear, norm, placed

# Fields of config.json, and ours.
FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp",
    "num_attention_heads": "heads",
    "patch_size": "patch",
    "image_size": "image_size",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
# Modules of a block in CLIP, SigLIP and what grew out of them.
LINEAR = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
# Blocks that a preset does not run, and a norm that it does not apply.
DROPPED = (r"(.*\.)?encoder\.layers?\.\d+\..*", r"(.*\.)?(post_layernorm|layernorm)\..*")


def filled(
    hf: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json with what it leaves out.

    Args:
      hf: its fields; those that neither `defaults` nor `fixed` names are not looked at.
      defaults: of the family.
      fixed: fields of which we compute one value only, that of the family.

    Raises:
      ConfigError: one of them has another value, or an image or patch is no square.
    """
    found = {**defaults, **fixed, **{k: v for k, v in hf.items() if k in {**defaults, **fixed}}}
    for name, value in fixed.items():
        if found[name] != value:
            raise ConfigError(f"{name} of config.json is {found[name]!r}; only {value!r} is known")
    for name in ("image_size", "patch_size"):
        if not isinstance(found.get(name, 0), int):
            raise ConfigError(f"{name} of config.json is {found[name]!r}; expected a whole number")
    return found


def fields(found: Mapping[str, Any], names: Mapping[str, str] = FIELDS) -> dict[str, Any]:
    """Our fields from theirs; the image size is that of its whole patches.

    Raises:
      ConfigError: their activation is none of ours.
    """
    ours = {names[name]: value for name, value in found.items() if name in names}
    if ours["activation"] not in ACTIVATIONS:
        raise ConfigError(
            f"the activation of config.json is {ours['activation']!r}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if "image_size" in ours:
        # A remainder is never looked at: 384 pixels make 27 patches of 14 (SigLIP So400m).
        ours["image_size"] -= ours["image_size"] % ours["patch"]
    return ours | {"activation": ACTIVATIONS[ours["activation"]]}


def written(preset: Encoder, names: Mapping[str, str] = FIELDS) -> dict[str, Any]:
    """Their fields from ours: the image size is that of the table of positions."""
    theirs = {name: getattr(preset, ours) for name, ours in names.items()}
    if "image_size" in theirs:
        theirs["image_size"] = preset.table_grid[0] * preset.patch
    activation = NAMES[preset.activation]
    return {k: activation if names[k] == "activation" else v for k, v in theirs.items()}


def block_rows(
    theirs: str, linears: Mapping[str, str] = LINEAR, norms: Mapping[str, str] = NORMS
) -> list[Row]:
    """Rows of the stacked blocks; `theirs` is the name of a block with {} for its number."""
    rows = [row for ours, name in linears.items() for row in linear(ours, name)]
    rows += [row for ours, name in norms.items() for row in norm(ours, name)]
    return placed(rows, "stack/blocks/", f"{theirs}.")
