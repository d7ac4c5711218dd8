"""The same numbers in transformers' SiglipVisionModel and Gemma, by the rules of its converters.

convert_siglip_to_hf.py and convert_paligemma_weights_to_hf.py of transformers 4 state them: dense
kernels are transposed, kernels with heads are flattened first. Needs torch.
"""

import numpy as np
import torch
import transformers
from npz_cases import (
    CASES,
    DEPTH,
    GEMMA_DEPTH,
    GEMMA_MLP,
    GEMMA_WIDTH,
    HEAD_DIM,
    HEADS,
    MLP,
    PATCH,
    PIXELS,
    SIDE,
    TOKENS,
    VOCAB,
    WIDTH,
    arrays,
    layer,
)


def outputs(name: str) -> dict[str, np.ndarray]:
    """`features` of PIXELS, and `logits` of TOKENS where the case has a Gemma."""
    prefix, shapes, _ = CASES[name]
    params = {n.removeprefix(prefix): a for n, a in arrays(name).items()}
    image = {n.removeprefix("img/"): a for n, a in params.items() if not n.startswith("llm/")}
    found = {"features": _vision(image)}
    if "llm/final_norm/scale" in shapes:
        # The connector is a matrix, and no converter is needed to say so.
        found["features"] = found["features"] @ image["head/kernel"] + image["head/bias"]
        language = {n.removeprefix("llm/"): a for n, a in params.items() if n.startswith("llm/")}
        found["logits"] = _language(language)
    return found


def _load(model: torch.nn.Module, state: dict[str, np.ndarray]) -> torch.nn.Module:
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in state.items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    assert not missing.unexpected_keys, missing
    return model.float().eval()


def _linear(theirs: str, kernel: np.ndarray, bias: np.ndarray, out: bool = False) -> dict:
    matrix = kernel.reshape(-1, WIDTH) if out else kernel.reshape(kernel.shape[0], -1)
    return {f"{theirs}.weight": matrix.T, f"{theirs}.bias": bias.reshape(-1)}


def _norm(theirs: str, p: dict, ours: str) -> dict:
    return {f"{theirs}.weight": p[ours + "/scale"], f"{theirs}.bias": p[ours + "/bias"]}


def _mlp(theirs: str, p: dict) -> dict:
    return {
        key: value
        for i in (0, 1)
        for key, value in _linear(
            f"{theirs}.fc{i + 1}",
            p[f"MlpBlock_0/Dense_{i}/kernel"],
            p[f"MlpBlock_0/Dense_{i}/bias"],
        ).items()
    }


def _vision(p: dict[str, np.ndarray]) -> np.ndarray:
    pooled = "MAPHead_0/probe" in p
    state = {
        "embeddings.patch_embedding.weight": p["embedding/kernel"].transpose(3, 2, 0, 1),
        "embeddings.patch_embedding.bias": p["embedding/bias"],
        "embeddings.position_embedding.weight": p["pos_embedding"].reshape(-1, WIDTH),
        **_norm("post_layernorm", p, "Transformer/encoder_norm"),
    }
    for i in range(DEPTH):
        block, to = layer(p, "Transformer/", "encoderblock", i), f"encoder.layers.{i}"
        state |= _norm(f"{to}.layer_norm1", block, "LayerNorm_0")
        state |= _norm(f"{to}.layer_norm2", block, "LayerNorm_1") | _mlp(f"{to}.mlp", block)
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "out"}.items():
            whole = f"MultiHeadDotProductAttention_0/{ours}"
            numbers = block[whole + "/kernel"], block[whole + "/bias"]
            state |= _linear(f"{to}.self_attn.{theirs}_proj", *numbers, out=ours == "out")
    if pooled:
        head = {n.removeprefix("MAPHead_0/"): a for n, a in p.items() if n.startswith("MAPHead_0/")}
        attention = "MultiHeadDotProductAttention_0/"
        names = [attention + n for n in ("query", "key", "value")]
        kernels = [head[n + "/kernel"].reshape(WIDTH, WIDTH).T for n in names]
        state |= {
            "head.probe": head["probe"],
            "head.attention.in_proj_weight": np.concatenate(kernels),
            "head.attention.in_proj_bias": np.concatenate(
                [head[n + "/bias"].reshape(-1) for n in names]
            ),
            **_linear(
                "head.attention.out_proj",
                head[attention + "out/kernel"],
                head[attention + "out/bias"],
                out=True,
            ),
            **_norm("head.layernorm", head, "LayerNorm_0"),
            **_mlp("head.mlp", head),
        }
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=SIDE,
        vision_use_head=pooled,
        attn_implementation="eager",
    )
    model = transformers.SiglipVisionModel(config)
    own = next(iter(model.state_dict()))
    root = "vision_model." if own.startswith("vision_model.") else ""
    model = _load(model, {root + name: array for name, array in state.items()})
    with torch.no_grad():
        seen = model(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    found = seen.pooler_output[:, None] if pooled else seen.last_hidden_state
    return found.numpy()


def _language(p: dict[str, np.ndarray]) -> np.ndarray:
    first = layer(p, "", "layers", 0)
    heads = first["attn/attn_vec_einsum/w"].shape[0]
    together = "attn/qkv_einsum/w" in first
    kv_heads = heads if together else first["attn/kv_einsum/w"].shape[1]
    second = "post_ffw_norm/scale" in first
    state = {
        "model.embed_tokens.weight": p["embedder/input_embedding"],
        "model.norm.weight": p["final_norm/scale"],
    }
    flat = lambda x: x.transpose(0, 2, 1).reshape(-1, GEMMA_WIDTH)  # noqa: E731
    for i in range(GEMMA_DEPTH):
        block, to = layer(p, "", "layers", i), f"model.layers.{i}."
        if together:
            query, key, value = block["attn/qkv_einsum/w"]
        else:
            query, (key, value) = block["attn/q_einsum/w"], block["attn/kv_einsum/w"]
        out = block["attn/attn_vec_einsum/w"].transpose(2, 0, 1).reshape(GEMMA_WIDTH, -1)
        gate, up = block["mlp/gating_einsum"]
        state |= {
            to + "self_attn.q_proj.weight": flat(query),
            to + "self_attn.k_proj.weight": flat(key),
            to + "self_attn.v_proj.weight": flat(value),
            to + "self_attn.o_proj.weight": out,
            to + "mlp.gate_proj.weight": gate.T,
            to + "mlp.up_proj.weight": up.T,
            to + "mlp.down_proj.weight": block["mlp/linear"].T,
            to + "input_layernorm.weight": block["pre_attention_norm/scale"],
        }
        names = {"pre_ffw_norm": "post_attention_layernorm"}
        if second:
            names = {
                "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
        state |= {f"{to}{theirs}.weight": block[f"{n}/scale"] for n, theirs in names.items()}
    fields = {}
    if second:  # big_vision looks back without a window
        fields = {"query_pre_attn_scalar": HEAD_DIM, "layer_types": ["full_attention"] * 2}
    config = transformers.AutoConfig.for_model(
        "gemma2" if second else "gemma",
        vocab_size=VOCAB,
        hidden_size=GEMMA_WIDTH,
        num_hidden_layers=GEMMA_DEPTH,
        intermediate_size=GEMMA_MLP,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
        pad_token_id=None,
        **fields,
    )
    model = _load(transformers.AutoModelForCausalLM.from_config(config), state)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()
