"""The same towers in transformers: outputs and gradients to compare with. Needs torch."""

import numpy as np
import torch
import transformers
from cases import LLAMA, PERCEIVER, PROJECTOR, Case, cotangent
from transformers.models.idefics2.modeling_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2PerceiverResampler,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def make(case: Case, seed: int = 0) -> torch.nn.Module:
    """Their model of the case's sizes; every weight random, so that none hides a mistake."""
    if case.table is LLAMA:
        module = _llama(case)
    elif case.table is PERCEIVER:
        module = _perceiver(case)
    elif case.table is PROJECTOR:
        module = _projector(case)
    else:
        module = _siglip(case)
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
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    gradients = {
        name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None
    }
    return output.detach().numpy(), _named(weights), _named(gradients)


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


def _named(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    d = case.model.decoder
    config = transformers.LlamaConfig(
        vocab_size=d.vocab,
        hidden_size=d.width,
        num_hidden_layers=d.depth,
        intermediate_size=d.mlp,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        tie_word_embeddings=d.tied,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


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
