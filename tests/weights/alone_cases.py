"""Tiny towers of transformers that are published without a decoder, alone or in pairs.

Fields of cases of published.py.
"""

from collections.abc import Callable

import numpy as np
import transformers
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

Arrays = dict[str, np.ndarray]
SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 14,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-2,
}
RATIO = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
GRIDS = ((3, 2), (5, 3), (2, 7))
STAGES = {
    "num_stages": 2,
    "hidden_sizes": [5, 7],
    "depths": [1, 2],
    "patch_size": 3,
    "layer_norm_eps": 1e-3,
}


def pictures(height: int, width: int, **others) -> Callable[[np.random.Generator], Arrays]:
    """Two pictures."""
    shape = (2, 3, height, width)
    return lambda rng: {"pixel_values": rng.normal(size=shape).astype(np.float32), **others}


def naflex(patch: int, count: int) -> Callable[[np.random.Generator], Arrays]:
    """Patches of images with grids of their own, and padding."""

    def make(rng: np.random.Generator) -> Arrays:
        patches = rng.normal(size=(len(GRIDS), count, 3 * patch**2)).astype(np.float32)
        shapes = np.asarray(GRIDS)
        there = np.arange(count) < shapes.prod(axis=1)[:, None]
        return {
            "pixel_values": patches,
            "pixel_attention_mask": there.astype(np.int64),
            "spatial_shapes": shapes,
        }

    return make


def flattened(patch: int, count: int) -> Callable[[np.random.Generator], Arrays]:
    """The same with row and column before each patch, counted from 1."""

    def make(rng: np.random.Generator) -> Arrays:
        plain = naflex(patch, count)(rng)
        places = np.zeros((len(GRIDS), count, 2), np.float32)
        for i, (rows, columns) in enumerate(GRIDS):
            places[i, : rows * columns] = np.indices((rows, columns)).reshape(2, -1).T + 1
        mask = plain["pixel_attention_mask"]
        patches = np.concatenate([places, plain["pixel_values"]], axis=-1)
        return {"flattened_patches": patches, "attention_mask": mask.astype(np.float32)}

    return make


def padded(patch: int) -> Callable[[np.random.Generator], Arrays]:
    """Whole images, padded to the largest."""

    def make(rng: np.random.Generator) -> Arrays:
        rows, columns = np.max(GRIDS, axis=0)
        there = np.zeros((len(GRIDS), rows, columns), bool)
        for i, grid in enumerate(GRIDS):
            there[i, : grid[0], : grid[1]] = True
        shape = (len(GRIDS), 3, rows * patch, columns * patch)
        pixels = rng.normal(size=shape).astype(np.float32)
        return {"pixel_values": pixels, "patch_attention_mask": there}

    return make


def _case(config, inputs, auto=transformers.AutoModel, unsaid=()) -> dict:
    return {"config": config, "inputs": inputs, "auto": auto, "unsaid": unsaid}


_RESIZE = {"interpolate_pos_encoding": np.asarray(True)}
CASES = {
    "clip_vision": _case(
        transformers.CLIPVisionConfig(**SIZES, image_size=12, patch_size=4), pictures(12, 12)
    ),
    "clip_vision_resized": _case(
        transformers.CLIPVisionConfig(
            **SIZES, image_size=12, patch_size=4, projection_dim=7, hidden_act="gelu"
        ),
        pictures(9, 22, **_RESIZE),
        transformers.CLIPVisionModelWithProjection,
        ("projection_dim",),
    ),
    "siglip_vision": _case(
        transformers.SiglipVisionConfig(**SIZES, image_size=12, patch_size=4),
        pictures(8, 21, **_RESIZE),
    ),
    "siglip_vision_headless": _case(
        transformers.SiglipVisionConfig(
            **SIZES, image_size=12, patch_size=4, vision_use_head=False
        ),
        pictures(12, 12),
        unsaid=("vision_use_head",),
    ),
    "siglip2_vision": _case(
        transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=3), naflex(3, 17)
    ),
    "dinov2": _case(
        transformers.Dinov2Config(
            **RATIO, image_size=12, patch_size=3, qkv_bias=False, layerscale_value=0.5
        ),
        pictures(10, 15),
    ),
    "dinov2_with_registers": _case(
        transformers.Dinov2WithRegistersConfig(
            **RATIO, image_size=12, patch_size=3, num_register_tokens=3, use_swiglu_ffn=True
        ),
        pictures(9, 14),
    ),
    "blip_2_vision": _case(
        transformers.Blip2VisionConfig(**SIZES, image_size=9, patch_size=3),
        pictures(6, 12, **_RESIZE),
        transformers.Blip2VisionModel,
    ),
    "idefics2_vision": _case(
        transformers.models.idefics2.configuration_idefics2.Idefics2VisionConfig(
            **SIZES, image_size=16, patch_size=4
        ),
        padded(4),
        Idefics2VisionTransformer,
    ),
    "idefics3_vision": _case(
        transformers.models.idefics3.configuration_idefics3.Idefics3VisionConfig(
            **SIZES, image_size=12, patch_size=3
        ),
        padded(3),
    ),
    "smolvlm_vision": _case(
        transformers.models.smolvlm.configuration_smolvlm.SmolVLMVisionConfig(
            **SIZES, image_size=12, patch_size=3
        ),
        padded(3),
        SmolVLMVisionTransformer,
    ),
    "pix2struct_vision": _case(
        transformers.Pix2StructVisionConfig(
            hidden_size=12, num_hidden_layers=2, d_ff=14, num_attention_heads=3, d_kv=6,
            patch_embed_hidden_size=48, seq_len=9, layer_norm_eps=1e-2,
        ),
        flattened(4, 17),
        transformers.Pix2StructVisionModel,
    ),
    "convnext": _case(
        transformers.ConvNextConfig(**STAGES, layer_scale_init_value=0.3), pictures(14, 21)
    ),
    "convnextv2": _case(transformers.ConvNextV2Config(**STAGES), pictures(13, 19)),
    "sam_vision": _case(
        transformers.SamVisionConfig(
            hidden_size=12, num_hidden_layers=3, num_attention_heads=3, image_size=20,
            patch_size=4, window_size=2, global_attn_indexes=[1], mlp_dim=14, output_channels=5,
            layer_norm_eps=1e-2,
        ),
        pictures(20, 20),
    ),
}  # fmt: skip


def with_texts(
    seen: Callable[[np.random.Generator], Arrays], vocab: int, end: int, mask: bool = True
) -> Callable[[np.random.Generator], Arrays]:
    """Three texts of unequal length beside pictures; what follows an end is padding."""

    def make(rng: np.random.Generator) -> Arrays:
        tokens = rng.integers(3, vocab - 2, (3, 7))
        length = np.asarray([7, 4, 5])
        tokens[np.arange(3), length - 1] = end
        there = np.arange(7) < length[:, None]
        tokens[~there] = end  # CLIP pads so: it is the first that counts
        masks = {"attention_mask": there.astype(np.int64)} if mask else {}
        return {"input_ids": tokens, **masks, **seen(rng)}

    return make


_TEXT = SIZES | {"hidden_size": 10, "num_attention_heads": 5, "intermediate_size": 17}
_TEXT |= {"vocab_size": 23, "max_position_embeddings": 9}
_VISION = SIZES | {"image_size": 12, "patch_size": 4}


def _clip(end: int, inputs, **fields) -> dict:
    text = _TEXT | {"eos_token_id": end, "bos_token_id": 1, **fields}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=7)
    return _case(config, inputs)


def _siglip(config: type, vision: dict, inputs, **fields) -> dict:
    text = _TEXT | {"eos_token_id": 1, "bos_token_id": 1, **fields}
    return _case(config(text_config=text, vision_config=vision), inputs)


PAIRS = {
    "clip": _clip(21, with_texts(pictures(12, 12), 23, 21)),
    "clip_legacy": _clip(
        2, with_texts(pictures(9, 18, **_RESIZE), 23, 22, mask=False), hidden_act="gelu"
    ),
    "siglip": _siglip(
        transformers.SiglipConfig,
        _VISION,
        with_texts(pictures(8, 16, **_RESIZE), 23, 1, mask=False),
        projection_size=12,
    ),
    "siglip2": _siglip(
        transformers.Siglip2Config,
        SIZES | {"num_patches": 16, "patch_size": 3},
        with_texts(naflex(3, 17), 23, 1),
        hidden_size=12,
        num_attention_heads=2,
    ),
}
