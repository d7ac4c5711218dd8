"""Families by the model_type of their config.json."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.weights.families import big_vision, gpt_neox, llama, mpt, opt
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
      renames: pattern and replacement, applied in order to names of older folders.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], Model]
    write: Callable[[Model], dict[str, Any]]
    rows: Callable[[Model], list[Row]]
    carried: Callable[[Model], tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


# Buffers that older versions of transformers stored.
BUFFERS = (r".*rotary_emb\.inv_freq", r".*position_ids", r".*attention\.(masked_)?bias")
TIED = ("lm_head.weight",)


def _decoder(module, model_type: str, architecture: str, **fields) -> Family:
    """A family whose folders hold a decoder alone."""
    return Family(
        architecture,
        read=lambda hf: Model(decoder=module.read({"model_type": model_type} | dict(hf))),
        write=lambda model: module.write(model.decoder, model_type),
        rows=lambda model: placed(module.rows(model.decoder), "decoder/"),
        carried=lambda model: module.CARRIED,
        ignored=BUFFERS,
        **fields,
    )


FAMILIES = {
    "llama": _decoder(llama, "llama", "LlamaForCausalLM"),
    "mistral": _decoder(llama, "mistral", "MistralForCausalLM"),
    "qwen2": _decoder(llama, "qwen2", "Qwen2ForCausalLM"),
    "qwen3": _decoder(llama, "qwen3", "Qwen3ForCausalLM"),
    "gemma": _decoder(llama, "gemma", "GemmaForCausalLM"),
    "gemma2": _decoder(llama, "gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": _decoder(llama, "gemma3_text", "Gemma3ForCausalLM"),
    "opt": _decoder(opt, "opt", "OPTForCausalLM", renames=((r"^decoder\.", "model.decoder."),)),
    "mpt": _decoder(mpt, "mpt", "MptForCausalLM"),
    "gpt_neox": _decoder(
        gpt_neox, "gpt_neox", "GPTNeoXForCausalLM", renames=((r"^embed_out\.", "lm_head."),)
    ),
}


def big_vision_family(root: str) -> Family:
    """Checkpoints of big_vision, whose encoder's names begin with `root`; they have no config."""
    return Family(
        "",
        read=big_vision.read,
        write=lambda model: {},
        rows=lambda model: big_vision.rows(model, root),
        carried=lambda model: big_vision.CARRIED,
    )


def family(model_type: Any) -> Family:
    """The family of a model_type.

    Raises:
      ConfigError: it is not known; names the nearest.
    """
    if model_type not in FAMILIES:
        nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(
            f"unknown model_type {model_type!r}; expected one of {', '.join(FAMILIES)}.{hint}"
        )
    return FAMILIES[model_type]
