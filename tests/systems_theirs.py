"""Published systems as transformers builds them from the fields of their config.json, on the meta
device: what has which parameters, without any weights. Needs torch."""

import dataclasses
import re

import torch
import transformers as t

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = LLAMA_7B | {"intermediate_size": 14_336, "num_key_value_heads": 8}
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
SIGLIP_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 512,
}


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A published system.

    Attributes:
      auto: its class.
      config: of the published config.json, what decides shapes.
      carried: names of parameters that its forward does not use, or whose values are always zero.
    """

    auto: type
    config: t.PretrainedConfig
    carried: str = "nothing"


# The features are those before the last block.
LLAVA_CARRIED = r".*vision.*(layers\.23\.|post_layernorm).*"


def _llava(text: dict) -> Theirs:
    vision = t.CLIPVisionConfig(**CLIP_L_336)
    language = t.LlamaConfig(vocab_size=32_064, **text)
    config = t.LlavaConfig(vision_config=vision, text_config=language)
    return Theirs(t.LlavaForConditionalGeneration, config, LLAVA_CARRIED)


def _llava_next(text: t.PretrainedConfig) -> Theirs:
    config = t.LlavaNextConfig(vision_config=t.CLIPVisionConfig(**CLIP_L_336), text_config=text)
    return Theirs(t.LlavaNextForConditionalGeneration, config, LLAVA_CARRIED)


def _opt(width: int) -> dict:
    return {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }


def _blip2(width: int) -> Theirs:
    config = t.Blip2Config(vision_config={}, qformer_config={}, text_config=_opt(width))
    return Theirs(t.Blip2ForConditionalGeneration, config)


def _instructblip(text: dict) -> Theirs:
    language = {"model_type": "llama", "vocab_size": 32_001, **text}
    config = t.InstructBlipConfig(
        vision_config={}, qformer_config={"vocab_size": 30_523}, text_config=language
    )
    return Theirs(t.InstructBlipForConditionalGeneration, config)


def _idefics() -> Theirs:
    config = t.IdeficsConfig(
        additional_vocab_size=2,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
        vision_config={"embed_dim": 1280},
    )
    # It norms its class token alone, for an output that the system does not read.
    return Theirs(t.IdeficsForVisionText2Text, config, r".*vision_model\.post_layernorm.*")


def _idefics2() -> Theirs:
    config = t.Idefics2Config(
        vision_config=SO400M | {"image_size": 980},
        perceiver_config={"hidden_size": 4096},
        text_config={"model_type": "mistral", "vocab_size": 32_003, **MISTRAL_7B},
    )
    return Theirs(t.Idefics2ForConditionalGeneration, config)


def _idefics3(vision: dict, factor: int, text: dict, name: str = "Idefics3") -> Theirs:
    config = getattr(t, f"{name}Config")(
        vision_config=vision,
        scale_factor=factor,
        text_config={"model_type": "llama", **text},
    )
    return Theirs(getattr(t, f"{name}ForConditionalGeneration"), config)


def _smollm(width: int, mlp: int, depth: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _paligemma(pixels: int, text: dict) -> Theirs:
    config = t.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": pixels,
            "vision_use_head": False,
            **SO400M,
        },
        text_config={"vocab_size": 257_216, "head_dim": 256, **text},
        projection_dim=text["hidden_size"],
    )
    return Theirs(t.PaliGemmaForConditionalGeneration, config)


def _gemma(version: str, width: int, mlp: int, depth: int, heads: int, kv_heads: int) -> dict:
    sizes = _smollm(width, mlp, depth, heads, kv_heads, vocab=0)
    del sizes["vocab_size"]
    return {"model_type": version, **sizes}


LLAMA3 = MISTRAL_7B | {"vocab_size": 128_259}
GEMMA = _gemma("gemma", 2048, 16_384, 18, 8, 1)
GEMMA2_2B = _gemma("gemma2", 2304, 9216, 26, 8, 4)
GEMMA2_9B = _gemma("gemma2", 3584, 14_336, 42, 16, 8)

SYSTEMS = {
    "llava15:7b": lambda: _llava(LLAMA_7B),
    "llava15:13b": lambda: _llava(LLAMA_13B),
    "llava_next:vicuna-7b": lambda: _llava_next(t.LlamaConfig(vocab_size=32_064, **LLAMA_7B)),
    "llava_next:vicuna-13b": lambda: _llava_next(t.LlamaConfig(vocab_size=32_064, **LLAMA_13B)),
    "llava_next:mistral-7b": lambda: _llava_next(t.MistralConfig(vocab_size=32_064, **MISTRAL_7B)),
    "blip2:opt-2.7b": lambda: _blip2(2560),
    "blip2:opt-6.7b": lambda: _blip2(4096),
    "instructblip:7b": lambda: _instructblip(LLAMA_7B),
    "instructblip:13b": lambda: _instructblip(LLAMA_13B),
    "idefics:9b": _idefics,
    "idefics2:64": _idefics2,
    "idefics3:8b": lambda: _idefics3(SO400M | {"image_size": 364}, 2, LLAMA3),
    "smolvlm:256m": lambda: _idefics3(SIGLIP_B, 4, _smollm(576, 1536, 30, 9, 3, 49_280), "SmolVLM"),
    "smolvlm:500m": lambda: _idefics3(
        SIGLIP_B, 4, _smollm(960, 2560, 32, 15, 5, 49_280), "SmolVLM"
    ),
    "smolvlm:2.2b": lambda: _idefics3(
        SO400M | {"image_size": 384}, 3, _smollm(2048, 8192, 24, 32, 32, 49_155)
    ),
    "paligemma:224": lambda: _paligemma(224, GEMMA),
    "paligemma:448": lambda: _paligemma(448, GEMMA),
    "paligemma:896": lambda: _paligemma(896, GEMMA),
    "paligemma2:3b-224": lambda: _paligemma(224, GEMMA2_2B),
    "paligemma2:10b-448": lambda: _paligemma(448, GEMMA2_9B),
}

# The first that matches a name holds; the rest is the decoder.
PARTS = (
    ("encoder", r"(model\.)?(vision_tower|vision_model)\..*"),
    (
        "connector",
        r"(model\.)?(multi_modal_projector|image_newline|qformer|query_tokens|language_projection"
        r"|perceiver_resampler|connector)\b.*",
    ),
    ("decoder", r".*"),
)


def counts(name: str) -> dict[str, int]:
    """Parameters of a system's parts, those that are carried apart."""
    theirs = SYSTEMS[name]()
    with torch.device("meta"):
        model = theirs.auto(theirs.config)
    model.tie_weights()
    found = dict.fromkeys(("encoder", "connector", "decoder", "carried"), 0)
    for path, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS if re.fullmatch(pattern, path))
        size = parameter.numel()
        if re.fullmatch(theirs.carried, path):
            part = "carried"
        elif path.endswith("qkv.bias"):  # EVA-CLIP's keys have no bias; zeros stand for it
            found["carried"] += size // 3
            size -= size // 3
        found[part] += size
    return found
