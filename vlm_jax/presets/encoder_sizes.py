"""Published vision transformers by name, each a row of fields of `presets.encoders.Encoder`."""

import dataclasses
import math

from vlm_jax.presets.encoders import Encoder, vit
from vlm_jax.presets.resizing import Resize

CLIP_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# CLIP (Radford et al. 2021; OpenCLIP's model configs for H, g and bigG): features of the last
# block without its norm, as LLaVA's and others' recipes start from.
CLIP = {
    "class_token": True,
    "pre_norm": True,
    "unbiased": ("patch",),
    "norm_eps": 1e-5,
    "final_norm": False,
    "resize": Resize("crop"),
    **CLIP_PIXELS,
}
OPENAI = CLIP | {"activation": "quick_gelu"}
OPENCLIP = CLIP | {"activation": "gelu"}

# DINOv2 (Oquab et al. 2024): tables of 37 x 37 positions, resized to the 16 x 16 of 224 pixels.
DINOV2 = {
    "patch": 14,
    "activation": "gelu",
    "class_token": True,
    "layer_scale": 1e-5,
    "position_grid": (37, 37),
    "resize": Resize("crop", shortest=256),
    **IMAGENET_PIXELS,
}
DINOV2_GATED = DINOV2 | {"activation": "silu", "gated": True}
REGISTERS = {"registers": 4, "position_resize": "bicubic_antialias"}

# EVA-CLIP (Sun et al. 2023; timm's models/eva.py): no bias on keys, all features normed.
EVA = {
    "patch": 14,
    "activation": "gelu",
    "class_token": True,
    "unbiased": ("key",),
    **CLIP_PIXELS,
}
EVA02 = EVA | {
    "activation": "silu",
    "gated": True,
    "inner_norm": True,
    "rotary_grid": (16, 16),
}

# SigLIP 2 (Tschannen et al. 2025): as many patches as 256 pixels a side have.
NAFLEX = {
    "image_size": 256,
    "max_patches": 256,
    "position_resize": "bilinear_antialias",
    "resize": Resize("patches", filter="bilinear"),
}

PIX2STRUCT = {
    "patch": 16,
    "image_size": 16 * math.isqrt(2048),
    "max_patches": 2048,
    "position": "row_column",
    "position_grid": (4096, 4096),
    "head_dim": 64,
    "norm": "rms",
    "gated": True,
    "attention_scale": 1.0,
    "unbiased": ("query", "key", "value", "out", "mlp"),
}

# Width, depth, feed-forward width and heads.
B, L, H = (768, 12, 3072, 12), (1024, 24, 4096, 16), (1280, 32, 5120, 16)
GIANT, BIG_G = (1408, 40, 6144, 16), (1664, 48, 8192, 16)

PUBLISHED = {
    "clip-b32": Encoder(*B, patch=32, **OPENAI),
    "clip-b16": Encoder(*B, patch=16, **OPENAI),
    "clip-l14": Encoder(*L, patch=14, **OPENAI),
    "clip-l14-336": Encoder(*L, patch=14, image_size=336, **OPENAI),
    "openclip-b32": Encoder(*B, patch=32, **OPENCLIP),
    "openclip-b16": Encoder(*B, patch=16, **OPENCLIP),
    "openclip-l14": Encoder(*L, patch=14, **OPENCLIP),
    "openclip-h14": Encoder(*H, patch=14, **OPENCLIP),
    "openclip-g14": Encoder(*GIANT, patch=14, **OPENCLIP),
    "openclip-bigg14": Encoder(*BIG_G, patch=14, **OPENCLIP),
    "siglip-b16": vit("B/16"),
    "siglip-l16-256": vit("L/16", image_size=256),
    "siglip-so400m14": vit("So400m/14"),
    "siglip-so400m14-378": vit("So400m/14", image_size=378, resize=Resize(side=384)),
    "siglip2-naflex-b16": vit("B/16", **NAFLEX),
    "siglip2-naflex-so400m16": vit("So400m/16", **NAFLEX),
    "idefics2": vit(
        "So400m/14",
        image_size=980,
        max_patches=4900,
        position_resize="bucket",
        resize=Resize("bounds", filter="bilinear", shortest=378),
    ),
    "dinov2-s14": Encoder(384, 12, 1536, 6, **DINOV2),
    "dinov2-b14": Encoder(*B, **DINOV2),
    "dinov2-l14": Encoder(*L, **DINOV2),
    "dinov2-g14": Encoder(1536, 40, 4096, 24, **DINOV2_GATED),
    "dinov2-reg-s14": Encoder(384, 12, 1536, 6, **DINOV2, **REGISTERS),
    "dinov2-reg-b14": Encoder(*B, **DINOV2, **REGISTERS),
    "dinov2-reg-l14": Encoder(*L, **DINOV2, **REGISTERS),
    "dinov2-reg-g14": Encoder(1536, 40, 4096, 24, **DINOV2_GATED, **REGISTERS),
    "eva-clip-g14": Encoder(*GIANT, **EVA),
    # BLIP-2's in LAVIS: the same tower without its last block, whose features are normed again.
    "blip2-g14": Encoder(1408, 39, 6144, 16, **EVA, keep_class=True),
    "eva02-clip-l14": Encoder(1024, 24, 2730, 16, **EVA02),
    "eva02-clip-l14-336": Encoder(1024, 24, 2730, 16, image_size=336, **EVA02),
    "eva02-clip-e14": Encoder(1792, 64, 15360, 16, post_norm=True, **EVA),
    "pix2struct-base": Encoder(768, 12, 2048, 12, **PIX2STRUCT),
    "pix2struct-large": Encoder(1536, 18, 3968, 24, **PIX2STRUCT),
}


def published(name: str, **fields) -> Encoder:
    """The encoder published under a name of PUBLISHED, with these fields changed.

    Raises:
      ValueError: the name is not in the table.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown encoder {name!r}: expected one of {', '.join(PUBLISHED)}")
    return dataclasses.replace(PUBLISHED[name], **fields)
