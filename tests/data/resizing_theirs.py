"""Published image processors, each beside the preset that says the same; pixels as they come out.

`theirs(picture) -> views` as uint8 or float [h, w, 3] before normalisation, in the order in which
the model gets them.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.resizing import Resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
RAW = {"do_rescale": False, "do_normalize": False}
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def encoder(side: int, resize: Resize, patch: int = 4, room: int = 0) -> Encoder:
    return Encoder(
        16, 1, 32, 2, patch=patch, image_size=side, max_patches=room, mean=CLIP_MEAN, resize=resize
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A preset, and what makes the processor that does the same."""

    encoder: Encoder
    theirs: Callable[[], Callable[[Image.Image], list[np.ndarray]]]


def processor(module: str, name: str, **options):
    """An image processor of transformers that uses Pillow."""
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, name)(**RAW | options)


def _plain(module: str, name: str, **options):
    made = processor(module, name, **options)
    return lambda picture: _last(made(picture, return_tensors="np")["pixel_values"])


def _last(views) -> list[np.ndarray]:
    return [np.moveaxis(view, 0, -1) for view in views]


def _seen(made, side: int):
    return lambda picture: [view[:side, :side] for view in made(picture)]


def _tiled(module: str, name: str, **options):
    made = processor(module, name, **options)
    return lambda picture: _last(made(picture, return_tensors="np")["pixel_values"][0])


def _masked(patch: int, **options):
    made = processor("idefics2", "Idefics2ImageProcessorPil", **options)

    def run(picture):
        found = made([[picture]], return_tensors="np")
        views = []
        for view, mask in zip(found["pixel_values"][0], found["pixel_attention_mask"][0]):
            height, width = mask[:, 0].sum(), mask[0].sum()
            # The model looks at whole patches.
            views.append(view[:, : height // patch * patch, : width // patch * patch])
        return _last(views)

    return run


def _naflex(patch: int, room: int):
    made = processor("siglip2", "Siglip2ImageProcessorPil", patch_size=patch, max_num_patches=room)

    def run(picture):
        found = made(picture, return_tensors="np")
        return [_joined(found["pixel_values"][0], *found["spatial_shapes"][0], patch)]

    return run


def _pix2struct(patch: int, room: int):
    made = processor(
        "pix2struct",
        "Pix2StructImageProcessorPil",
        patch_size={"height": patch, "width": patch},
        max_patches=room,
    )

    def run(picture):
        found = np.asarray(made(picture, return_tensors="pt")["flattened_patches"][0])
        rows, columns = found[:, :2].max(axis=0).astype(int)
        return [_joined(found[:, 2:], rows, columns, patch)]

    return run


def _joined(patches, rows: int, columns: int, patch: int) -> np.ndarray:
    grid = patches[: rows * columns].reshape(rows, columns, patch, patch, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)


def _torchvision():
    """By name, as no requirement of ours has it: only goldens are made with it."""
    return importlib.import_module("torchvision.transforms.functional")


def _letterbox(side: int):
    """Prismatic's LetterboxPad, and timm's Resize and CenterCrop."""
    functional = _torchvision()
    fill = tuple(int(255 * mean) for mean in CLIP_MEAN)

    def run(picture):
        width, height = picture.size
        across, down = (int((max(picture.size) - x) / 2) for x in (width, height))
        x = functional.pad(picture, (across, down, across, down), fill=fill)
        x = functional.resize(x, side, functional.InterpolationMode.BICUBIC)
        return [np.asarray(functional.center_crop(x, (side, side)))]

    return run


def _nanovlm(side: int, longest: int, enlarge: bool):
    """nanoVLM's DynamicResize, ToTensor and GlobalAndSplitImages."""
    functional = _torchvision()

    def run(picture):
        width, height = picture.size
        longer = max(width, height)
        target = longest if enlarge else min(longest, math.ceil(longer / side) * side)
        short = max(side, math.ceil(min(width, height) * (target / longer) / side) * side)
        size = [short, target] if width >= height else [target, short]
        x = functional.resize(picture, size, functional.InterpolationMode.BICUBIC)
        x = functional.to_tensor(x)
        tiles = [
            x[:, top : top + side, left : left + side]
            for top in range(0, size[0], side)
            for left in range(0, size[1], side)
        ]
        whole = [functional.resize(x, [side, side])] if len(tiles) > 1 else []
        return [255 * view.numpy().transpose(1, 2, 0) for view in (*whole, *tiles)]

    return run


def _lanczos(module: str, name: str, side: int, longest: int):
    size = {"longest_edge": longest}
    return _tiled(module, name, size=size, max_image_size={"longest_edge": side})


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _cropped(module: str, name: str, side: int, shortest: int = 0, **options):
    size = {"shortest_edge": shortest or side}
    return _plain(module, name, size=size, crop_size=square(side), **options)


def table(patch: int = 2) -> dict[str, Row]:
    """All rows, for encoders with patches of so many pixels, three a side where that is fixed."""
    side = 3 * patch
    longest, shortest = 8 * patch, 3 * patch - 1
    fixed = lambda mode, **fields: encoder(side, Resize(mode, **fields), patch)  # noqa: E731
    native = lambda mode, room, **fields: encoder(  # noqa: E731
        longest, Resize(mode, filter="bilinear", **fields), patch, room
    )
    bounds = {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    pinpoints = tuple((side * down, side * across) for down, across in PINPOINTS)
    return {
        "siglip": Row(
            fixed("squash"),
            lambda: _plain("siglip", "SiglipImageProcessorPil", size=square(side)),
        ),
        # Of patches that do not divide it, the last pixels are not seen.
        "siglip_384": Row(
            fixed("squash", side=side + 1),
            lambda: _seen(_plain("siglip", "SiglipImageProcessorPil", size=square(side + 1)), side),
        ),
        "clip": Row(fixed("crop"), lambda: _cropped("clip", "CLIPImageProcessorPil", side)),
        "dinov2": Row(
            fixed("crop", shortest=side * 8 // 7 + 1),
            lambda: _cropped("bit", "BitImageProcessorPil", side, side * 8 // 7 + 1),
        ),
        "llava15": Row(
            fixed("pad"), lambda: _cropped("llava", "LlavaImageProcessorPil", side, do_pad=True)
        ),
        "prismatic": Row(fixed("letterbox"), lambda: _letterbox(side)),
        "siglip2": Row(native("patches", 21), lambda: _naflex(patch, 21)),
        "pix2struct": Row(native("whole_patches", 21), lambda: _pix2struct(patch, 21)),
        "idefics2": Row(native("bounds", 64, shortest=shortest), lambda: _masked(patch, **bounds)),
        "idefics2_split": Row(
            native("quarters", 64, shortest=shortest),
            lambda: _masked(patch, do_image_splitting=True, **bounds),
        ),
        "llava_next": Row(
            fixed("pinpoints", pinpoints=pinpoints),
            lambda: _tiled(
                "llava_next",
                "LlavaNextImageProcessorPil",
                size={"shortest_edge": side},
                crop_size=square(side),
                image_grid_pinpoints=list(map(list, pinpoints)),
            ),
        ),
        "idefics3": Row(
            fixed("grid", filter="lanczos", longest=4 * side),
            lambda: _lanczos("idefics3", "Idefics3ImageProcessorPil", side, 4 * side),
        ),
        "smolvlm": Row(
            fixed("grid", filter="lanczos", longest=side),
            lambda: _lanczos("smolvlm", "SmolVLMImageProcessorPil", side, side),
        ),
        "nanovlm": Row(
            fixed("whole_and_grid", longest=3 * side), lambda: _nanovlm(side, 3 * side, True)
        ),
        "nanovlm_not_enlarged": Row(
            fixed("whole_and_grid", longest=3 * side, enlarge=False),
            lambda: _nanovlm(side, 3 * side, False),
        ),
    }


TORCHVISION = ("prismatic", "nanovlm", "nanovlm_not_enlarged")


def picture(height: int, width: int, grain: float = 1.0) -> Image.Image:
    """Edges, slopes and noise, always the same."""
    rng = np.random.default_rng(height * 10_007 + width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    slopes = np.stack([x, y, 1 - x], axis=-1) * 160
    edges = 60 * (np.sin(9 * x + 14 * y) > 0)[..., None]
    noise = grain * rng.integers(-90, 90, (height, width, 3))
    return Image.fromarray(np.clip(slopes + edges + noise, 0, 255).astype(np.uint8))
