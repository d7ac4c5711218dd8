"""Tiny models of transformers with unusual sizes, and what they make of random inputs. Needs torch.

A golden file holds all of it: config.json, tensors, inputs and outputs, so that the quick tests
can write the published folder themselves and compare without torch.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable

import alone_cases
import goldens
import image_systems
import numpy as np
import published_fused as fused
import torch
import transformers
from numpy.typing import NDArray

Arrays = dict[str, NDArray]
NEW_TOKENS = 5
MARGIN = 1e-3  # between the two best logits, or greedy tokens would hang on rounding


@dataclasses.dataclass(frozen=True)
class Case:
    """One published model.

    Attributes:
      config: its config.
      inputs: arrays for `forward` by keyword, from a generator.
      auto: the class that makes and loads it.
      generates: whether greedy tokens are compared.
      output: which output is compared.
      unsaid: fields of config.json that our presets say nothing of, but loading needs.
    """

    config: transformers.PretrainedConfig
    inputs: Callable[[np.random.Generator], Arrays]
    auto: type = transformers.AutoModelForCausalLM
    generates: bool = True
    output: str = "logits"
    unsaid: tuple[str, ...] = ()


def make(case: Case, seed: int = 0) -> torch.nn.Module:
    """The model with random weights, none of them a plain zero or one."""
    # A class of its own, where no Auto class knows it, has the same under another name.
    build = getattr(case.auto, "from_config", None) or case.auto._from_config
    model = build(case.config, attn_implementation="eager")
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = np.asarray(0.3 * rng.normal(size=parameter.shape).astype(np.float32))
            parameter.copy_(torch.from_numpy(noise) + (parameter == 1).all())
    return model.float().eval()


def outputs(case: Case, model: torch.nn.Module, arrays: Arrays) -> Arrays:
    """What the model makes of the arrays: logits and greedy tokens, or features.

    Raises:
      ValueError: the two best logits of a greedy step are too close to compare tokens.
    """
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        found = {case.output: getattr(model(**given), case.output).numpy()}
        if case.generates:
            made = model.generate(
                **given,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(made.logits).topk(2).values
            if (best[..., 0] - best[..., 1]).min() < MARGIN:
                raise ValueError("greedy tokens would hang on rounding: choose another seed")
            found["tokens"] = made.sequences[:, -NEW_TOKENS:].numpy()
            found["beams"] = _beams(model, given)
    return found


def _beams(model: torch.nn.Module, given: dict) -> NDArray:
    """The best of a beam search, clearly better than the second."""
    made = model.generate(
        **given,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        num_beams=goldens.BEAMS,
        num_return_sequences=2,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = made.sequences_scores.reshape(-1, 2)
    if (scores[:, 0] - scores[:, 1]).min() < MARGIN:
        raise ValueError("the best beam would hang on rounding: choose another seed")
    return made.sequences[::2, -NEW_TOKENS:].numpy()


def clear(case: Case) -> tuple[torch.nn.Module, Arrays, Arrays]:
    """Model, inputs and outputs of the first seed whose greedy tokens do not hang on rounding."""
    for seed in range(100):
        model, inputs = make(case, seed), case_inputs(case, seed)
        with contextlib.suppress(ValueError):
            return model, inputs, outputs(case, model, inputs)
    raise ValueError("no seed gives a clear margin")


def case_inputs(case: Case, seed: int = 0) -> Arrays:
    """The arrays of a case."""
    return case.inputs(np.random.default_rng(seed))


def save(path: pathlib.Path, model: torch.nn.Module) -> None:
    """Writes the folder as transformers publishes it."""
    model.save_pretrained(path)


def config_text(folder: pathlib.Path) -> str:
    """config.json without the version of transformers, which would change for no reason."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    return json.dumps(config, sort_keys=True)


def text(rng: np.random.Generator, vocab: int, left: bool = True) -> Arrays:
    """Three prompts of unequal length; generation of transformers wants them padded on the left."""
    tokens = rng.integers(3, vocab, (3, 9))
    mask = np.ones_like(tokens)
    for row, pad in ((0, 3), (2, 1)):
        mask[row, slice(0, pad) if left else slice(-pad, None)] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _text(model_type: str, vocab: int, seed_left: bool = True, **fields) -> Case:
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=vocab, pad_token_id=None, **fields
    )
    return Case(config, lambda rng: text(rng, vocab, seed_left))


_SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 5.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 0.5,
    "high_freq_factor": 3.0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 20,
    "beta_fast": 3.0,
    "beta_slow": 0.25,
}
_GEMMA2 = {
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
    "sliding_window": 3,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


def with_pictures(
    rng: np.random.Generator, vocab: int, image: int, tokens: int, size: tuple[int, int]
) -> Arrays:
    """Three prompts of unequal length, padded on the left: with two pictures, one, and none."""
    rows = [
        [5, *[image] * tokens, 7, 9, *[image] * tokens, 11],
        [4, 6, *[image] * tokens, 8],
        [3, 5, 7, 9],
    ]
    length = max(map(len, rows))
    ids = np.zeros((3, length), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    pixels = rng.normal(size=(3, 3, *size)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def _llava(vision: dict, text: dict, tokens: int, size: int, **fields) -> Case:
    config = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.for_model(**vision),
        text_config=transformers.AutoConfig.for_model(**text),
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=tokens,
        **fields,
    )
    vocab = text["vocab_size"]
    inputs = lambda rng: with_pictures(rng, vocab, vocab - 1, tokens, (size, size))  # noqa: E731
    return Case(config, inputs, transformers.AutoModelForImageTextToText)


def _blip(config: transformers.PretrainedConfig, more: Callable) -> Case:
    vocab = config.text_config.vocab_size
    pictures = lambda rng: with_pictures(rng, vocab, vocab - 1, fused.QUERIES, (12, 12))  # noqa: E731
    inputs = lambda rng: pictures(rng) | more(rng)  # noqa: E731
    return Case(config, inputs, transformers.AutoModelForImageTextToText)


def _idefics(**fields) -> Case:
    config = fused.idefics(**fields)
    vocab = config.vocab_size + config.additional_vocab_size
    inputs = lambda rng: fused.shown(rng, vocab)  # noqa: E731
    return Case(config, inputs, transformers.AutoModelForImageTextToText)


_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "layer_norm_eps": 1e-3,
}
_LLAMA = {"model_type": "llama", "vocab_size": 37, "pad_token_id": None, **_SIZES}

CASES = {
    **{
        name: Case(config, inputs, transformers.AutoModelForImageTextToText)
        for name, (config, inputs) in image_systems.MADE.items()
    },
    "llava": _llava(_CLIP, _LLAMA, 9, 12),
    "llava_full": _llava(
        _CLIP,
        _LLAMA | {"model_type": "qwen2", "head_dim": 4},
        10,
        12,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    ),
    # Features of several layers, and a decoder whose cap on logits LLaVA's class does not apply.
    "llava_taps": _llava(
        _CLIP,
        _LLAMA | {"model_type": "gemma2", **_GEMMA2},
        9,
        12,
        vision_feature_layer=[-2, 0, 1],
    ),
    "blip_2": _blip(fused.blip_2(), lambda rng: {}),
    "blip_2_retrieval": Case(
        fused.blip_2_retrieval(),
        fused.captioned,
        transformers.Blip2ForImageTextRetrieval,
        generates=False,
        output="logits_per_image",
    ),
    "minigpt4": _blip(fused.minigpt4(), lambda rng: {}),
    "instructblip": _blip(fused.instructblip(), fused.instructions),
    "idefics": _idefics(**fused.RESAMPLED),
    "idefics_plain": _idefics(additional_vocab_size=2, tie_word_embeddings=True),
    "llama": _text(
        "llama", 41, **_SIZES, rms_norm_eps=1e-2, attention_bias=True, mlp_bias=True
    ),
    "llama_scaled": _text(
        "llama", 37, **_SIZES, rope_parameters=_LLAMA3, tie_word_embeddings=True
    ),
    "mistral": _text("mistral", 39, **_SIZES, sliding_window=4, rms_norm_eps=1e-3),
    "qwen2": _text(
        "qwen2", 35, **{k: v for k, v in _SIZES.items() if k != "head_dim"},
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=3, max_window_layers=1,
    ),
    "qwen2_yarn": _text(
        "qwen2", 35, **_SIZES | {"num_hidden_layers": 1, "head_dim": 12}, rope_parameters=_YARN
    ),
    "qwen3": _text("qwen3", 33, **_SIZES, rms_norm_eps=1e-2),
    "gemma": _text("gemma", 31, **_SIZES, rms_norm_eps=1e-2),
    "gemma2": _text("gemma2", 43, **_SIZES | {"num_hidden_layers": 3}, **_GEMMA2),
    "gemma3_text": _text(
        "gemma3_text", 29, **_SIZES | {"num_hidden_layers": 4}, query_pre_attn_scalar=5,
        sliding_window=4, rope_parameters=_GEMMA3_ROPE,
        layer_types=[*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
    ),
    "opt": _text(
        "opt", 45, hidden_size=12, word_embed_proj_dim=12, num_hidden_layers=2, ffn_dim=22,
        num_attention_heads=3, max_position_embeddings=19,
    ),
    "opt_350m": _text(
        "opt", 45, hidden_size=12, word_embed_proj_dim=7, num_hidden_layers=2, ffn_dim=22,
        num_attention_heads=3, max_position_embeddings=19, do_layer_norm_before=False,
    ),
    "opt_bare": _text(
        "opt", 45, hidden_size=12, num_hidden_layers=2, ffn_dim=22, num_attention_heads=3,
        max_position_embeddings=19, enable_bias=False, layer_norm_elementwise_affine=False,
        activation_function="gelu", tie_word_embeddings=False,
    ),
    "mpt_untied": _text("mpt", 47, d_model=12, n_heads=3, n_layers=1, tie_word_embeddings=False),
    "mpt": _text("mpt", 47, d_model=18, n_heads=6, n_layers=2, layer_norm_epsilon=1e-2),
    "gpt_neox": _text(
        "gpt_neox", 27, hidden_size=24, num_hidden_layers=2, intermediate_size=20,
        num_attention_heads=3, layer_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox_unbiased": _text(
        "gpt_neox", 27, hidden_size=24, num_hidden_layers=1, intermediate_size=20,
        num_attention_heads=3, hidden_act="gelu_pytorch_tanh", attention_bias=False,
        rope_parameters={
            "rope_type": "linear", "factor": 3.0, "rope_theta": 50.0, "partial_rotary_factor": 0.5,
        },
    ),
}  # fmt: skip
CASES |= {
    name: Case(**fields, generates=False, output="last_hidden_state")
    for name, fields in alone_cases.CASES.items()
} | {
    name: Case(**fields, generates=False, output="logits_per_image")
    for name, fields in alone_cases.PAIRS.items()
}
