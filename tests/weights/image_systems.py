"""Tiny systems of transformers whose pictures are tiled, prefixes, or of sizes of their own."""

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.llava_next import modeling_llava_next as llava_next

Arrays = dict[str, NDArray]
_TEXT = {
    "hidden_size": 9,
    "num_hidden_layers": 2,
    "intermediate_size": 14,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "pad_token_id": None,
}
_VISION = {
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 14,
    "patch_size": 2,
    "layer_norm_eps": 1e-3,
}


def prompts(rows: list[list[int]]) -> Arrays:
    """Prompts padded on the left, as generation of transformers wants them."""
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def with_pictures(image: int, counts: tuple[int, int, int]) -> Arrays:
    """Three prompts: with two pictures of so many tokens each, with one, and without."""
    first, second, third = ([image] * count for count in counts)
    return prompts([[5, *first, 7, 9, *second, 11], [4, 6, *third, 8], [3, 5, 7, 9]])


def _noise(rng: np.random.Generator, *shape: int) -> NDArray:
    return rng.normal(size=shape).astype(np.float32)


def _llava_next(vision: dict, text: dict, side: int, **fields):
    """Pictures that are wide, tall and nearly square, one of them smaller than a tile."""
    patch, image = vision["patch_size"], text["vocab_size"] - 1
    shapes = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    pinpoints = [[side * rows, side * columns] for rows, columns in shapes]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.AutoConfig.for_model(**vision, image_size=side),
        text_config=transformers.AutoConfig.for_model(**text),
        image_token_index=image,
        image_grid_pinpoints=pinpoints,
        image_seq_length=(side // patch) ** 2,
        **fields,
    )
    sizes = [(side + 1, 3 * side - 2), (4 * side, side + 3), (side - 2, side - 3)]

    def tokens(size: tuple[int, int]) -> int:
        tiles = llava_next.get_anyres_image_grid_shape(size, pinpoints, side)
        rows, columns = (side // patch * count for count in tiles)
        _, rows, columns = llava_next.unpad_image(torch.zeros(1, rows, columns), size).shape
        return (side // patch) ** 2 + rows * (columns + 1)

    def inputs(rng: np.random.Generator) -> Arrays:
        found = with_pictures(image, tuple(map(tokens, sizes)))
        # Five tiles for each: those that a picture does not have are noise that nothing may see.
        pixels = _noise(rng, 3, 5, 3, side, side)
        return {**found, "pixel_values": pixels, "image_sizes": np.array(sizes)}

    return config, inputs


def _paligemma(text: dict, image: int, typed: bool = True):
    """A prefix that sees both ways and, in two rows, a suffix that does not."""
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.AutoConfig.for_model(
            "siglip_vision_model", **_VISION, image_size=6, vision_use_head=False
        ),
        text_config=transformers.AutoConfig.for_model(**text),
        image_token_index=image,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
    )

    def inputs(rng: np.random.Generator) -> Arrays:
        found = with_pictures(image, (9, 9, 9))
        types = np.zeros_like(found["input_ids"])
        types[0, -3:] = types[2, -1:] = 1
        found["pixel_values"] = _noise(rng, 3, 3, 6, 6)
        return found | ({"token_type_ids": types} if typed else {})

    return config, inputs


def _gemma3():
    """Two pictures side by side are one block, which windows shorter than a picture divide."""
    text = {**_TEXT, "vocab_size": 29, "num_hidden_layers": 3, "query_pre_attn_scalar": 5}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        vision_config=transformers.AutoConfig.for_model(
            "siglip_vision_model", **_VISION, image_size=12, vision_use_head=False
        ),
        text_config={**text, "sliding_window": 4, "layer_types": kinds},
        mm_tokens_per_image=9,
        image_token_index=28,
    )

    def inputs(rng: np.random.Generator) -> Arrays:
        found = prompts([[5, *[28] * 18, 7], [4, *[28] * 9, 7, *[28] * 9, 8], [3, 5, 7, 9]])
        types = (found["input_ids"] == 28).astype(np.int64)
        pixels = _noise(rng, 4, 3, 12, 12)
        return {**found, "token_type_ids": types, "pixel_values": pixels}

    return config, inputs


def _ragged(image: int, tokens: int, size: tuple[int, int], real: list, masked: bool):
    """Pictures [3, 2, 3, H, W], some of them padding.

    Args:
      image: id of the placeholder.
      tokens: visual tokens of a picture.
      size: height and width in pixels.
      real: of three pictures, row and slot, and height and width in pixels that are there.
      masked: whether `pixel_attention_mask` is given.
    """

    def inputs(rng: np.random.Generator) -> Arrays:
        pixels = np.zeros((3, 2, 3, *size), np.float32)
        mask = np.zeros((3, 2, *size), np.int64)
        for row, slot, height, width in real:
            pixels[row, slot] = _noise(rng, 3, *size)
            mask[row, slot, :height, :width] = 1
        found = with_pictures(image, (tokens,) * 3) | {"pixel_values": pixels}
        return found | ({"pixel_attention_mask": mask} if masked else {})

    return inputs


def _idefics2(masked: bool):
    config = transformers.Idefics2Config(
        vision_config={**_VISION, "image_size": 10},
        text_config={
            **_TEXT, "model_type": "mistral", "vocab_size": 37, "sliding_window": 4,
            "rms_norm_eps": 1e-3,
        },
        perceiver_config={
            "hidden_size": 9, "rms_norm_eps": 1e-2, "resampler_n_latents": 3,
            "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 5,
            "num_key_value_heads": 2, "hidden_act": "gelu",
        },
        image_token_id=36,
    )  # fmt: skip
    # 6 x 4 places for patches over a table of 5 x 5; an edge inside a patch drops it.
    real = [(0, 0, 12, 5), (0, 1, 7, 8), (1, 1, 10, 8)]
    return config, _ragged(36, 3, (13, 8), real, masked)


def _idefics3(config_class, side: int, pixels: int, factor: int, masked: bool, **fields):
    """Pictures of so many pixels before a table of positions for `side` pixels."""
    config = config_class(
        vision_config={**_VISION, "image_size": side},
        text_config={**_TEXT, "model_type": "llama", "vocab_size": 41, "rms_norm_eps": 1e-3},
        image_token_id=40,
        scale_factor=factor,
        **fields,
    )
    tokens = (pixels // 2 // factor) ** 2
    # An edge inside a patch keeps it.
    real = [(0, 0, pixels, 5), (0, 1, 7, pixels - 1), (1, 1, pixels, pixels)]
    return config, _ragged(40, tokens, (pixels, pixels), real, masked)


_LLAMA = {**_TEXT, "model_type": "llama", "vocab_size": 37}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model"}
_GEMMA2 = {
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
    "sliding_window": 3,
    "num_hidden_layers": 3,
}
_gemma = {**_TEXT, "model_type": "gemma", "vocab_size": 31, "rms_norm_eps": 1e-2}
_gemma2 = {**_TEXT, "model_type": "gemma2", "vocab_size": 33, **_GEMMA2}

# By name: the config, and what makes inputs from a generator.
MADE = {
    "llava_next": _llava_next({**_VISION, "model_type": "clip_vision_model"}, _LLAMA, 6),
    "llava_next_siglip": _llava_next(
        _SIGLIP,
        {**_LLAMA, "model_type": "mistral", "sliding_window": 5},
        6,
        vision_feature_select_strategy="full",
        vision_feature_layer=1,
        projector_hidden_act="relu",
    ),
    # A placeholder beyond the vocabulary, as none of its rows stands for pictures.
    "paligemma": _paligemma(_gemma, 35),
    "paligemma_causal": _paligemma(_gemma, 30, typed=False),
    "paligemma2": _paligemma(_gemma2, 32),
    "gemma3": _gemma3(),
    "idefics2": _idefics2(masked=True),
    "idefics2_whole": _idefics2(masked=False),
    "idefics3": _idefics3(transformers.Idefics3Config, 12, 18, 3, masked=True),
    "smolvlm": _idefics3(
        transformers.SmolVLMConfig, 8, 8, 2, masked=False, tie_word_embeddings=True
    ),
}
