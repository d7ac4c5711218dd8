"""Logits of transformers for the tiny GGUF files, which it reads itself. Needs torch."""

import pathlib

import numpy as np
import torch
import transformers
from gguf_cases import CASES, TOKENS, Case, tensors, write
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

MODEL_TYPES = {"mistral": "mistral", "gemma3": "gemma3_text"}
KINDS = {"local": "sliding_attention", "global": "full_attention"}


def logits(name: str, folder: pathlib.Path) -> np.ndarray:
    """Of the case's file for TOKENS."""
    case = CASES[name]
    write(folder / "model.gguf", case)
    config = _config(case, MODEL_TYPES.get(name, case.architecture))
    if case.architecture == "gemma":
        model = _gemma(case, config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
        named = model
        if name == "mistral":  # its names are Llama's, under which it is stored
            named = transformers.AutoModelForCausalLM.from_config(_config(case, "llama"))
        file = str(folder / "model.gguf")
        read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=named)
        missing = model.load_state_dict(read["tensors"], strict=False)
        assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def _config(case: Case, model_type: str):
    d = case.decoder
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_original:
        rope |= {
            "rope_type": "llama3",
            "factor": d.rope_factor,
            "original_max_position_embeddings": d.rope_original,
            "low_freq_factor": d.rope_low,
            "high_freq_factor": d.rope_high,
        }
    elif d.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": d.rope_factor}
    if d.local_theta:
        local = {"rope_type": "default", "rope_theta": d.local_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    fields = {}
    if d.window and model_type != "mistral":
        fields["layer_types"] = [KINDS[kind] for kind in d.layers]
    if model_type.startswith("gemma"):
        fields |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": d.head_dim}
        fields |= {"attn_logit_softcapping": d.attention_cap or None}
        fields |= {"final_logit_softcapping": d.logit_cap or None}
    return transformers.AutoConfig.for_model(
        model_type,
        vocab_size=d.vocab,
        max_position_embeddings=131_072,
        hidden_size=d.width,
        num_hidden_layers=d.depth,
        intermediate_size=d.mlp,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.norm_eps,
        rope_parameters=rope,
        sliding_window=d.window or None,
        tie_word_embeddings=d.tied,
        attn_implementation="eager",
        pad_token_id=None,
        **fields,
    )


def _gemma(case: Case, config) -> torch.nn.Module:
    """The first Gemma, whose files transformers does not read, by its own names."""
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for i in range(case.decoder.depth):
        for ours, theirs in parts.items():
            names[f"blk.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    state = {
        names[name]: torch.from_numpy(array - 1 if name.endswith("norm.weight") else array)
        for name, array in tensors(case).items()
    }
    model = transformers.AutoModelForCausalLM.from_config(config)
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    return model.float()
