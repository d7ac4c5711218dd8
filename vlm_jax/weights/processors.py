"""Preprocessor configs of exported folders, written from the encoder's preset.

Only where the model came without its own: what was published goes out as it came. A preset that
squashes says no more than that nobody chose: its pictures are prepared as usual in its family.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.config import Model

# PIL's numbers.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def _common(encoder: Any, kind: str) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": FILTERS[encoder.resize.filter],
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def _cropped(encoder: Any, kind: str) -> dict[str, Any]:
    """The shorter side to the encoder's, then the middle."""
    height, width = encoder.resize.size(encoder)
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    shortest = encoder.resize.shortest or min(height, width)
    return _common(encoder, kind) | {"size": {"shortest_edge": shortest}} | crop


def _padded(encoder: Any, kind: str) -> dict[str, Any]:
    """A square of the mean colour to the encoder's size; only LLaVA's processor does so."""
    return _cropped(encoder, "LlavaImageProcessor") | {"do_pad": True}


def _squeezed(encoder: Any, kind: str) -> dict[str, Any]:
    """Both sides to the encoder's."""
    height, width = encoder.resize.size(encoder)
    return _common(encoder, kind) | {"size": {"height": height, "width": width}}


def _patches(encoder: Any, kind: str) -> dict[str, Any]:
    """As many patches as fit."""
    own = {"patch_size": encoder.patch, "max_num_patches": encoder.patches}
    return _common(encoder, kind) | own


def _largest(encoder: Any, kind: str) -> dict[str, Any]:
    """Squares of the encoder's size; splitting is the host's choice."""
    longest = {"longest_edge": max(encoder.size)}
    sizes = {"size": longest, "max_image_size": longest}
    return _common(encoder, kind) | sizes | {"do_image_splitting": False}


def _between(encoder: Any, kind: str) -> dict[str, Any]:
    """Sides between the bounds, or the published ones' shares of the encoder's (378 to 980)."""
    how = encoder.resize
    longest = how.longest or max(encoder.size)
    bounds = {"longest_edge": longest, "shortest_edge": how.shortest or longest * 378 // 980}
    split = how.mode == "quarters"
    return _common(encoder, kind) | {"size": bounds, "do_image_splitting": split}


def _pinpoints(encoder: Any, kind: str) -> dict[str, Any]:
    """The whole picture, and tiles of the resolution that fits it best."""
    resolutions = [list(one) for one in encoder.resize.pinpoints]
    return _cropped(encoder, kind) | {"image_grid_pinpoints": resolutions}


def _grid(encoder: Any, kind: str) -> dict[str, Any]:
    """Tiles of the encoder's size, and the whole picture."""
    tile = encoder.resize.size(encoder)[0]
    return _common(encoder, kind) | {
        "size": {"longest_edge": encoder.resize.longest or tile},
        "max_image_size": {"longest_edge": tile},
        "do_image_splitting": True,
    }


def _clip_or_siglip(encoder: Any, kind: str) -> dict[str, Any]:
    if encoder.class_token:
        return _cropped(encoder, kind)
    return _squeezed(encoder, "SiglipImageProcessor")


# model_type of the folder -> how its pictures are prepared, image processor, processor.
PROCESSORS: Mapping[str, tuple[Callable[[Any, str], dict[str, Any]], str, str]] = {
    "clip": (_cropped, "CLIPImageProcessor", "CLIPProcessor"),
    "clip_vision_model": (_cropped, "CLIPImageProcessor", ""),
    "siglip": (_squeezed, "SiglipImageProcessor", "SiglipProcessor"),
    "siglip_vision_model": (_squeezed, "SiglipImageProcessor", ""),
    "siglip2": (_patches, "Siglip2ImageProcessor", "Siglip2Processor"),
    "siglip2_vision_model": (_patches, "Siglip2ImageProcessor", ""),
    "dinov2": (_cropped, "BitImageProcessor", ""),
    "dinov2_with_registers": (_cropped, "BitImageProcessor", ""),
    "llava": (_clip_or_siglip, "CLIPImageProcessor", "LlavaProcessor"),
    "llava_next": (_cropped, "LlavaNextImageProcessor", "LlavaNextProcessor"),
    "paligemma": (_squeezed, "SiglipImageProcessor", "PaliGemmaProcessor"),
    "blip-2": (_squeezed, "BlipImageProcessor", "Blip2Processor"),
    "instructblip": (_squeezed, "BlipImageProcessor", "InstructBlipProcessor"),
    "idefics2": (_between, "Idefics2ImageProcessor", "Idefics2Processor"),
    "idefics3": (_largest, "Idefics3ImageProcessor", "Idefics3Processor"),
    "smolvlm": (_largest, "SmolVLMImageProcessor", "SmolVLMProcessor"),
}


# The same by resize mode, where the preset says more than "squash"; transformers has no others.
MODES = {
    "crop": _cropped,
    "pad": _padded,
    "patches": _patches,
    "bounds": _between,
    "quarters": _between,
    "pinpoints": _pinpoints,
    "grid": _grid,
}

# Processors that count an image's placeholders themselves, from these fields.
COUNTING = ("LlavaProcessor", "LlavaNextProcessor")


def written(model: Model, model_type: str) -> dict[str, dict[str, Any]]:
    """File name -> content; nothing for families whose pictures have no such config."""
    if model_type not in PROCESSORS:
        return {}
    prepare, kind, processor = PROCESSORS[model_type]
    found, mode = {}, model.encoder.resize.mode
    if mode == "squash" or mode in MODES:
        prepared = MODES.get(mode, prepare)(model.encoder, kind)
        found["preprocessor_config.json"] = prepared
    if processor:
        config: dict[str, Any] = {"processor_class": processor}
        if processor in COUNTING:
            encoder = model.encoder
            dropped = encoder.class_token and not encoder.keep_class
            config |= {
                "patch_size": encoder.patch,
                "vision_feature_select_strategy": "default" if dropped else "full",
                "num_additional_image_tokens": int(encoder.class_token),
            }
        found["processor_config.json"] = config
    return found
