"""Tiny configs of BLIP-2, InstructBLIP and Idefics1 with unusual sizes, and arrays they take."""

import numpy as np
import transformers
from numpy.typing import NDArray

Arrays = dict[str, NDArray]
QUERIES = 5
INSTRUCTIONS = 23  # vocabulary of the instructions

_VISION = {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "layer_norm_eps": 1e-3,
}
_QFORMER = {
    "hidden_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "layer_norm_eps": 1e-2,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 45,
    "hidden_size": 9,
    "word_embed_proj_dim": 9,
    "num_hidden_layers": 2,
    "ffn_dim": 22,
    "num_attention_heads": 3,
    "max_position_embeddings": 31,
    "pad_token_id": None,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
}
_IDEFICS = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
}


def blip_2() -> transformers.PretrainedConfig:
    """BLIP-2 before an OPT, whose output matrix is its embedding table."""
    return transformers.Blip2Config(
        vision_config={"hidden_size": 12, **_VISION, "num_hidden_layers": 1},
        qformer_config=_QFORMER | {"hidden_act": "relu"},
        text_config=_OPT,
        num_query_tokens=QUERIES,
        image_token_index=_OPT["vocab_size"] - 1,
    )


def blip_2_retrieval(**fields) -> transformers.PretrainedConfig:
    """BLIP-2's first stage: a Q-Former that reads texts, and what compares them with images."""
    return transformers.Blip2Config(
        vision_config={"hidden_size": 12, **_VISION, "num_hidden_layers": 1},
        qformer_config=_QFORMER
        | {
            "vocab_size": INSTRUCTIONS,
            "max_position_embeddings": 8,
            "use_qformer_text_input": True,
        },
        text_config=_OPT,
        num_query_tokens=QUERIES,
        image_token_index=None,
        image_text_hidden_size=7,
        **fields,
    )


def captioned(rng: np.random.Generator) -> Arrays:
    """Three pictures and as many texts of other lengths."""
    tokens = rng.integers(1, INSTRUCTIONS, (3, 6))
    mask = np.arange(6) < np.array([[6], [2], [4]])
    return {
        "pixel_values": rng.normal(size=(3, 3, 12, 12)).astype(np.float32),
        "input_ids": np.where(mask, tokens, 0),
        "attention_mask": mask.astype(np.int64),
    }


def minigpt4() -> transformers.PretrainedConfig:
    """MiniGPT-4, as its authors define it: BLIP-2's parts and one linear layer before a Llama."""
    return transformers.Blip2Config(
        vision_config={"hidden_size": 9, **_VISION},
        qformer_config=_QFORMER | {"cross_attention_frequency": 1, "num_hidden_layers": 3},
        text_config=_LLAMA,
        num_query_tokens=QUERIES,
        image_token_index=_LLAMA["vocab_size"] - 1,
    )


def instructblip() -> transformers.PretrainedConfig:
    """InstructBLIP before a Llama; its tower has no biases on queries, keys and values."""
    return transformers.InstructBlipConfig(
        vision_config={"hidden_size": 12, "qkv_bias": False, **_VISION},
        qformer_config=_QFORMER
        | {
            "vocab_size": INSTRUCTIONS,
            "max_position_embeddings": 8,
            "num_hidden_layers": 2,
        },
        text_config=_LLAMA,
        num_query_tokens=QUERIES,
        image_token_index=_LLAMA["vocab_size"] - 1,
    )


def instructions(rng: np.random.Generator) -> Arrays:
    """What the Q-Former reads of three pictures, padded on the right as BERT's tokenizer does."""
    tokens = rng.integers(1, INSTRUCTIONS, (3, 6))
    mask = np.arange(6) < np.array([[6], [2], [4]])
    return {
        "qformer_input_ids": np.where(mask, tokens, 0),
        "qformer_attention_mask": mask.astype(np.int64),
    }


def idefics(**fields) -> transformers.PretrainedConfig:
    """Idefics1."""
    return transformers.IdeficsConfig(
        vision_config={"embed_dim": 9, **_VISION}, **_IDEFICS | fields
    )


RESAMPLED = {
    "additional_vocab_size": 3,
    "alpha_type": "vector",
    "cross_layer_interval": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "perceiver_config": {
        "use_resampler": True,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 5,
        "resampler_head_dim": 3,
        "qk_layer_norms_perceiver": True,
    },
}


def shown(rng: np.random.Generator, vocab: int) -> Arrays:
    """Prompts padded on the left, with two pictures, one and an empty slot, and none; tokens see
    the last picture before them."""
    lengths, length = (9, 7, 5), 9
    tokens = rng.integers(3, vocab, (3, length))
    mask = (np.arange(length) >= length - np.array(lengths)[:, None]).astype(np.int64)
    seen = np.zeros((3, length, 2), np.int64)
    seen[0, 2:5, 0] = seen[0, 5:, 1] = seen[1, 4:, 0] = 1
    pixels = rng.normal(size=(3, 2, 3, 12, 12)).astype(np.float32)
    pixels[1, 1] = pixels[2] = 0
    return {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_attention_mask": seen,
    }
