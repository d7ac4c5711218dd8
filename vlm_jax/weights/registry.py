"""Families by the model_type of their config.json."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights import inputs, pictures, towers
from vlm_jax.weights.families import (
    big_vision,
    blip_2,
    blip_2_retrieval,
    clip,
    convnext,
    efficientnet_lite,
    gemma3,
    idefics,
    idefics2,
    idefics3,
    instructblip,
    llava,
    llava_next,
    paligemma,
    pix2struct_vision_model,
    sam_vision_model,
    siglip,
    siglip2,
    smolvlm,
)
from vlm_jax.weights.tables import Row, placed


@dataclasses.dataclass(frozen=True)
class Family:
    """Between the published folders of one model_type and our models.

    Attributes:
      architecture: the class of transformers that loads them.
      read: config.json -> model.
      write: model -> fields of config.json.
      rows: model -> table of names.
      carried: model -> patterns of names whose tensors are kept but not computed with.
      ignored: patterns of names that are no weights.
      inputs: model, config.json and arrays of `forward` -> prompts, or pictures where there is no
        decoder.
      renames: model -> patterns and replacements, applied in order to names of other folders.
      fitted: model, arrays of `forward` -> the model for pictures of the size that they have.
      loaded: the same from names of folders to those of the class in memory, where they differ.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], Model]
    write: Callable[[Model], dict[str, Any]]
    rows: Callable[[Model], list[Row]]
    carried: Callable[[Model], tuple[str, ...]]
    inputs: Callable[[Model, Mapping[str, Any], inputs.Arrays], inputs.Prompts | pictures.Seen]
    ignored: tuple[str, ...] = ()
    renames: Callable[[Model], tuple[tuple[str, str], ...]] = lambda model: ()
    fitted: Callable[[Model, inputs.Arrays], Model] = lambda model, arrays: model
    loaded: Callable[[Model], tuple[tuple[str, str], ...]] = lambda model: ()


# Buffers that older versions of transformers stored.
BUFFERS = (r".*rotary_emb\.inv_freq", r".*position_ids", r".*attention\.(masked_)?bias")


def _text(model: Model, hf: Mapping[str, Any], arrays: inputs.Arrays) -> inputs.Prompts:
    return inputs.text(arrays)


# A base class saves its tensors without the name that the class with an output gives it.
_BASE = ((r"^(layers|embed_tokens|norm)\.", r"model.\1."),)


def _decoder(model_type: str, architecture: str, renames=_BASE) -> Family:
    """A family whose folders hold a decoder alone."""
    module = towers.DECODERS[model_type]
    return Family(
        architecture,
        read=lambda hf: Model(decoder=module.read({"model_type": model_type} | dict(hf))),
        write=lambda model: module.write(model.decoder, model_type),
        rows=lambda model: placed(module.rows(model.decoder), "decoder/"),
        carried=lambda model: module.CARRIED,
        inputs=_text,
        ignored=BUFFERS,
        renames=lambda model: renames,
    )


def _encoder(
    model_type: str, architecture: str, module: ModuleType, way: pictures.Way, trunk: str, renames
) -> Family:
    """A family whose folders hold an encoder alone, with all its features.

    `trunk` is what the class with a classifier, which is carried, puts before the module's names.
    """
    several = module.write.__code__.co_argcount > 1
    write = module.write if several else lambda encoder, _: module.write(encoder)
    carried = module.CARRIED
    if trunk:
        carried = (*(re.escape(trunk) + name for name in carried), r"classifier\..*")
    return Family(
        architecture,
        read=lambda hf: Model(encoder=module.read({"model_type": model_type} | dict(hf))),
        write=lambda model: write(model.encoder, model_type),
        rows=lambda model: placed(module.rows(model.encoder), "encoder/", trunk),
        carried=lambda model: carried,
        inputs=lambda model, hf, arrays: pictures.alone(way, model.encoder, arrays),
        ignored=BUFFERS,
        renames=lambda model: renames,
        loaded=lambda model: _ALONE if renames is VISION else (),
    )


def _system(module: ModuleType) -> Family:
    """A family whose folders hold a whole system, described by a module."""
    return Family(
        module.ARCHITECTURE,
        read=module.read,
        write=module.write,
        rows=module.rows,
        carried=module.carried,
        inputs=module.inputs,
        ignored=BUFFERS,
        renames=getattr(module, "renames", lambda model: ()),
        fitted=getattr(module, "fitted", lambda model, arrays: model),
        loaded=getattr(module, "loaded", lambda model: ()),
    )


FAMILIES = {
    "llama": _decoder("llama", "LlamaForCausalLM"),
    "mistral": _decoder("mistral", "MistralForCausalLM"),
    "qwen2": _decoder("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _decoder("qwen3", "Qwen3ForCausalLM"),
    "gemma": _decoder("gemma", "GemmaForCausalLM"),
    "gemma2": _decoder("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": _decoder("gemma3_text", "Gemma3ForCausalLM"),
    "opt": _decoder("opt", "OPTForCausalLM", ((r"^decoder\.", "model.decoder."),)),
    "mpt": _decoder("mpt", "MptForCausalLM"),
    "gpt_neox": _decoder("gpt_neox", "GPTNeoXForCausalLM", ((r"^embed_out\.", "lm_head."),)),
    "llava": _system(llava),
    "llava_next": _system(llava_next),
    "paligemma": _system(paligemma),
    "gemma3": _system(gemma3),
    "idefics2": _system(idefics2),
    "idefics3": _system(idefics3),
    "smolvlm": _system(smolvlm),
    "clip": _system(clip),
    "siglip": _system(siglip),
    "siglip2": _system(siglip2),
    "blip-2": _system(blip_2),
    "blip-2-retrieval": _system(blip_2_retrieval),
    "instructblip": _system(instructblip),
    "idefics": _system(idefics),
}
# transformers 5 saves these without the prefix of published files.
_ALONE = ((r"^vision_model\.", ""),)
VISION = ((r"^(?!vision_model\.|visual_projection\.)", "vision_model."),)


def _trunk(name: str) -> tuple[tuple[str, str], ...]:
    """The base class's names as those of the class with a classifier."""
    return ((rf"^(?!{name}\.|classifier\.)", f"{name}."),)


_ON_DEMAND = pictures.RESIZED_ON_DEMAND
# Encoders alone: class of transformers, how it is given pictures, renames.
ENCODERS = {
    "clip_vision_model": ("CLIPVisionModel", _ON_DEMAND, VISION),
    "siglip_vision_model": ("SiglipVisionModel", _ON_DEMAND, VISION),
    "siglip2_vision_model": ("Siglip2VisionModel", pictures.NAFLEX, VISION),
    "dinov2": ("Dinov2Model", pictures.RESIZED, _trunk("dinov2")),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        pictures.RESIZED,
        _trunk("dinov2_with_registers"),
    ),
    "blip_2_vision_model": ("Blip2VisionModel", _ON_DEMAND, ()),
    "idefics2_vision": ("Idefics2VisionTransformer", pictures.PADDED, ()),
    "idefics3_vision": ("Idefics3VisionTransformer", pictures.PADDED, ()),
    "smolvlm_vision": ("SmolVLMVisionTransformer", pictures.PADDED, ()),
    "pix2struct_vision_model": ("Pix2StructVisionModel", pictures.FLATTENED, ()),
    "convnext": ("ConvNextModel", pictures.ANY_SIZE, _trunk("convnext")),
    "convnextv2": ("ConvNextV2Model", pictures.ANY_SIZE, _trunk("convnextv2")),
    "sam_vision_model": ("SamVisionModel", pictures.WHOLE, ()),
}
# What comes before the names of their tables.
TRUNKS = {"dinov2": "dinov2.", "dinov2_with_registers": "dinov2_with_registers."}
_MODULES = towers.ENCODERS | {
    "pix2struct_vision_model": pix2struct_vision_model,
    "convnext": convnext,
    "convnextv2": convnext,
    "sam_vision_model": sam_vision_model,
}
FAMILIES |= {
    name: _encoder(name, architecture, _MODULES[name], way, TRUNKS.get(name, ""), renames)
    for name, (architecture, way, renames) in ENCODERS.items()
}
FAMILIES["pix2struct"] = dataclasses.replace(
    FAMILIES["pix2struct_vision_model"],
    architecture="Pix2StructForConditionalGeneration",
    read=lambda hf: Model(encoder=pix2struct_vision_model.read(hf.get("vision_config") or {})),
    write=lambda model: {
        "model_type": "pix2struct",
        "vision_config": pix2struct_vision_model.write(model.encoder),
    },
    rows=lambda model: placed(pix2struct_vision_model.rows(model.encoder), "encoder/", "encoder."),
    carried=lambda model: (r"decoder\..*",),
)
# Published files of Segment Anything hold its other parts too, which are carried.
FAMILIES["sam"] = dataclasses.replace(
    FAMILIES["sam_vision_model"],
    architecture="SamModel",
    write=lambda model: {
        "model_type": "sam",
        "vision_config": sam_vision_model.write(model.encoder),
    },
)


def _whole_or_text(model: Model, hf: Mapping[str, Any], arrays: inputs.Arrays):
    if model.decoder is None:
        return pictures.alone(pictures.WHOLE, model.encoder, arrays)
    return inputs.text(arrays)


def big_vision_family(root: str) -> Family:
    """Checkpoints of big_vision, whose encoder's names begin with `root`; they have no config."""
    return Family(
        "",
        read=big_vision.read,
        write=lambda model: {},
        rows=lambda model: big_vision.rows(model, root),
        carried=lambda model: big_vision.CARRIED,
        inputs=_whole_or_text,
    )


# State dictionaries of an EfficientNet-Lite; they have no config and go out to nowhere.
EFFICIENTNET_LITE = Family(
    "",
    read=lambda hf: Model(encoder=efficientnet_lite.read(hf)),
    write=lambda model: efficientnet_lite.write(model.encoder),
    rows=lambda model: placed(efficientnet_lite.rows(model.encoder), "encoder/"),
    carried=lambda model: (efficientnet_lite.COUNTERS,),
    inputs=_whole_or_text,
)
# What files without a config.json are of.
CONFIGLESS = {
    big_vision.FAMILY: big_vision_family(""),
    efficientnet_lite.FAMILY: EFFICIENTNET_LITE,
}


# Families by classes of transformers that have the model_type of another one.
SHARED_TYPES = {blip_2_retrieval.ARCHITECTURE: "blip-2-retrieval"}


def kind_of(hf: Mapping[str, Any]) -> Any:
    """Which family the folder with this config.json is of: its model_type as a rule."""
    named = hf.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return SHARED_TYPES.get(first, hf.get("model_type"))


def family(model_type: Any) -> Family:
    """The family of a model_type.

    Raises:
      ConfigError: it is not known; names the nearest.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(
            f"unknown model_type {model_type!r}; expected one of {', '.join(FAMILIES)}.{hint}"
        )
    return FAMILIES[model_type]
