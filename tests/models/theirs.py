"""The same towers in transformers: outputs and gradients to compare with. Needs torch."""

import numpy as np
import torch
import transformers
from cases import PERCEIVER, Case, cotangent
from transformers.models.idefics2.modeling_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2PerceiverResampler,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def make(case: Case, seed: int = 0) -> torch.nn.Module:
    """Their model of the case's sizes; every weight random, so that none hides a mistake."""
    module = {
        "siglip": _siglip,
        "idefics2": _perceiver,
        "llava": _projector,
        "opt": _opt,
        "mpt": _mpt,
        "gpt_neox": _neox,
    }.get(case.family, _llama)(case)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.3 * rng.normal(size=parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(noise) + (parameter == 1).all())
    return module.float().eval()


def compare(case: Case, module: torch.nn.Module, x: np.ndarray):
    """Their output, weights and gradients of its weighted sum, in numpy, by the tables' names."""
    output = _run(case, module, x)
    module.zero_grad()
    (output * torch.from_numpy(cotangent(tuple(output.shape)))).sum().backward()
    gradients = {
        name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None
    }
    return output.detach().numpy(), weights(case, module), _named(case, gradients)


def weights(case: Case, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Their weights in numpy, by the tables' names."""
    return _named(case, {name: p.detach().numpy() for name, p in module.named_parameters()})


def _run(case: Case, module: torch.nn.Module, x: np.ndarray) -> torch.Tensor:
    if case.tower == "decoder":
        return module(torch.from_numpy(x).long()).logits
    if case.table is PERCEIVER:
        return module(torch.from_numpy(x), attention_mask=torch.ones(x.shape[:2]))
    if case.tower == "connector":
        return module(torch.from_numpy(x))
    output = module(torch.from_numpy(x).permute(0, 3, 1, 2))
    pooled = case.model.encoder.pool == "map"
    return output.pooler_output[:, None] if pooled else output.last_hidden_state


def _named(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the tables' names: fused projections are cut apart, patches' channels come last."""
    named = {}
    for name, array in arrays.items():
        name = name.removeprefix("vision_model.")
        if "in_proj" in name:
            for part, third in zip("qkv", np.split(array, 3)):
                named[name.replace("in_proj_", part + ".")] = third
        elif name.endswith("patch_embedding.weight"):
            named[name] = array.transpose(0, 2, 3, 1)
        else:
            named[name] = array
    return named


def _llama(case: Case) -> torch.nn.Module:
    """A Llama, or one of the families whose configs speak of the same things by the same names."""
    d = case.model.decoder
    fields = {}
    if d.window:
        kinds = {"local": "sliding_attention", "global": "full_attention"}
        fields |= {"sliding_window": d.window, "layer_types": [kinds[k] for k in d.layers]}
    if case.family.startswith("gemma"):
        fields |= {"hidden_activation": ACTIVATIONS[d.activation]}
        fields |= {"query_pre_attn_scalar": int(d.query_scale)}
        fields |= {"attn_logit_softcapping": d.attention_cap or None}
        fields |= {"final_logit_softcapping": d.logit_cap or None}
    if case.family == "mistral":
        fields.pop("layer_types")
    config = transformers.AutoConfig.for_model(
        case.family,
        vocab_size=d.vocab,
        hidden_size=d.width,
        num_hidden_layers=d.depth,
        intermediate_size=d.mlp,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.norm_eps,
        rope_parameters=_rope(case),
        tie_word_embeddings=d.tied,
        attn_implementation="eager",
        pad_token_id=None,
        **fields,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def _rope(case: Case) -> dict:
    d = case.model.decoder
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_original:
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": d.rope_original}
        rope |= {"low_freq_factor": d.rope_low, "high_freq_factor": d.rope_high}
    elif d.rope_factor != 1:
        rope |= {"rope_type": "linear"}
    if d.rope_factor != 1:
        rope |= {"factor": d.rope_factor}
    if d.local_theta:
        local = {"rope_type": "default", "rope_theta": d.local_theta}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _opt(case: Case) -> torch.nn.Module:
    d = case.model.decoder
    config = transformers.OPTConfig(
        vocab_size=d.vocab,
        hidden_size=d.width,
        word_embed_proj_dim=d.width,
        num_hidden_layers=d.depth,
        ffn_dim=d.mlp,
        num_attention_heads=d.heads,
        max_position_embeddings=d.positions - d.position_offset,
        activation_function=d.activation,
        attn_implementation="eager",
        pad_token_id=None,
    )
    return transformers.OPTForCausalLM(config)


def _mpt(case: Case) -> torch.nn.Module:
    d = case.model.decoder
    config = transformers.MptConfig(
        d_model=d.width,
        n_heads=d.heads,
        n_layers=d.depth,
        max_seq_len=32,
        vocab_size=d.vocab,
        layer_norm_epsilon=d.norm_eps,
    )
    return transformers.MptForCausalLM(config)


def _neox(case: Case) -> torch.nn.Module:
    d = case.model.decoder
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    config = transformers.GPTNeoXConfig(
        vocab_size=d.vocab,
        hidden_size=d.width,
        num_hidden_layers=d.depth,
        intermediate_size=d.mlp,
        num_attention_heads=d.heads,
        hidden_act=d.activation,
        layer_norm_eps=d.norm_eps,
        use_parallel_residual=d.parallel,
        rope_parameters=rope | {"partial_rotary_factor": d.rope_share},
        attn_implementation="eager",
    )
    return transformers.GPTNeoXForCausalLM(config)


def _siglip(case: Case) -> torch.nn.Module:
    e = case.model.encoder
    config = transformers.SiglipVisionConfig(
        hidden_size=e.width,
        num_hidden_layers=e.depth,
        intermediate_size=e.mlp,
        num_attention_heads=e.heads,
        patch_size=e.patch,
        image_size=e.image_size,
        hidden_act=ACTIVATIONS[e.activation],
        layer_norm_eps=e.norm_eps,
        attn_implementation="eager",
    )
    return transformers.SiglipVisionModel(config)


def _perceiver(case: Case) -> torch.nn.Module:
    c, width = case.model.connector, case.model.decoder.width
    config = Idefics2PerceiverConfig(
        hidden_size=width,
        rms_norm_eps=c.norm_eps,
        resampler_n_latents=c.queries,
        resampler_depth=c.layers,
        resampler_n_heads=c.heads,
        resampler_head_dim=width // c.heads,
        num_key_value_heads=c.kv_heads,
        attn_implementation="eager",
    )
    return Idefics2PerceiverResampler(config)


def _projector(case: Case) -> torch.nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(hidden_size=case.model.encoder.width),
        text_config=transformers.LlamaConfig(
            hidden_size=case.model.decoder.width, num_attention_heads=1
        ),
        projector_hidden_act="gelu",
    )
    return LlavaMultiModalProjector(config)
