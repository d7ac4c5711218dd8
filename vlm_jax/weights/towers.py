"""Towers by model_type: how systems read, write and name the parts they are made of."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights.families import (
    blip_2_vision_model,
    clip_vision_model,
    dinov2,
    dinov2_with_registers,
    gpt_neox,
    idefics2_vision,
    idefics3_vision,
    llama,
    mpt,
    opt,
    siglip2_vision_model,
    siglip_vision_model,
    smolvlm_vision,
)

ENCODERS = {
    "clip_vision_model": clip_vision_model,
    "siglip_vision_model": siglip_vision_model,
    "siglip2_vision_model": siglip2_vision_model,
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2_with_registers,
    "blip_2_vision_model": blip_2_vision_model,
    "instructblip_vision_model": blip_2_vision_model,
    "idefics2_vision": idefics2_vision,
    "idefics3_vision": idefics3_vision,
    "smolvlm_vision": smolvlm_vision,
}
# Later names of one module win: a plain preset is called by the first that describes it.
DECODERS = {
    **dict.fromkeys(llama.TRAITS, llama),
    "opt": opt,
    "mpt": mpt,
    "gpt_neox": gpt_neox,
}
# Fields that config.json says nothing of: which features a system takes, and how we compute.
FREE = (
    "layer",
    "taps",
    "final_norm",
    "keep_class",
    "pool",
    "max_patches",
    "mean",
    "std",
    "resize",
    "dropout",
    "drop_path",
    "window_in_blocks",
    "dtype",
    "remat",
)
# Those of them that change nothing but how we compute and train.
OURS = ("mean", "std", "resize", "dropout", "drop_path", "dtype", "remat")


def decoder_rows(decoder: Any) -> list:
    """The table of a decoder, whatever its family."""
    return DECODERS[kind(DECODERS, decoder)].rows(decoder)


def read(towers: Mapping[str, ModuleType], hf: Mapping[str, Any], default: str) -> Any:
    """The preset of a nested config.

    Args:
      towers: ENCODERS or DECODERS.
      hf: a vision_config or text_config.
      default: its model_type where it does not say.

    Raises:
      ConfigError: its model_type is none of these, or it says what no preset does.
    """
    hf = {"model_type": default} | dict(hf)
    if hf["model_type"] not in towers:
        raise ConfigError(
            f"unknown model_type {hf['model_type']!r} of a tower; expected one of "
            f"{', '.join(towers)}"
        )
    return towers[hf["model_type"]].read(hf)


def uncapped(decoder: Any) -> Any:
    """A decoder below an output matrix of the system's own: transformers caps logits in the class
    of a decoder alone (Gemma 2 and 3) and in PaliGemma's, whatever text_config says."""
    return dataclasses.replace(decoder, logit_cap=0.0)


def kind(towers: Mapping[str, ModuleType], preset: Any) -> str:
    """The model_type whose config.json describes a preset; the first where several do.

    Raises:
      ConfigError: none does.
    """
    for name, module in towers.items():
        if _describes(module, name, preset):
            return name
    raise ConfigError(f"no family of transformers has such a tower: {preset}")


def write(towers: Mapping[str, ModuleType], preset: Any, name: str = "") -> dict[str, Any]:
    """The nested config of a preset, by default of the first family that describes it."""
    name = name if name and _describes(towers[name], name, preset) else kind(towers, preset)
    return {"model_type": name} | _written(towers[name], name, preset)


def _written(module: ModuleType, name: str, preset: Any) -> dict[str, Any]:
    several = module.write.__code__.co_argcount > 1
    return module.write(preset, name) if several else module.write(preset)


def refuse_unlike(model: Model, again: Model, system: str) -> None:
    """Refuses to write a config.json that says something else than the model.

    Args:
      model: what is written.
      again: what the config.json says.
      system: the name of its family.

    Raises:
      ConfigError: they differ; names the first field.
    """
    for part in ("encoder", "connector", "decoder", "extra_encoders", "fusion"):
        ours, theirs = getattr(model, part), getattr(again, part)
        if type(ours) is not type(theirs) or (isinstance(ours, tuple) and ours != theirs):
            raise ConfigError(f"{part} of a {system} is {ours}; expected one like {theirs}")
        fields = vars(ours) if dataclasses.is_dataclass(ours) else {}
        for name, value in fields.items():
            said = getattr(theirs, name)
            if value != said and name not in OURS:
                raise ConfigError(
                    f"{part}.{name} of a {system} is {value!r}; its config.json can only "
                    f"say {said!r}"
                )


def _describes(module: ModuleType, name: str, preset: Any) -> bool:
    try:
        again = module.read({"model_type": name} | _written(module, name, preset))
    except (ConfigError, KeyError, AttributeError, TypeError, ZeroDivisionError):
        return False
    free = {f: getattr(preset, f) for f in FREE if hasattr(preset, f) and hasattr(again, f)}
    return type(again) is type(preset) and dataclasses.replace(again, **free) == preset
