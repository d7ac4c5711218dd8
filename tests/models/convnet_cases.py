"""Convolutional and windowed encoders of odd sizes, and what they are compared on."""

import dataclasses
import types
from collections.abc import Mapping

import numpy as np

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets.convnets import ConvNet, convnext_stages
from vlm_jax.presets.sam import Sam
from vlm_jax.weights import tables
from vlm_jax.weights.families import convnext, efficientnet_lite, sam_vision_model

F32 = {"dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """An encoder and the module of its family."""

    preset: ConvNet | Sam
    family: types.ModuleType


def _convnext(depths: tuple, widths: tuple, **fields) -> Case:
    stages = convnext_stages(depths, widths)
    return Case(ConvNet(stages, widths[0], **F32 | fields), convnext)


def _efficientnet(*stages: tuple, **fields) -> Case:
    fields = {
        "stem_stride": 2,
        "layer_scale": 0.0,
        "activation": "relu6",
        "norm_eps": 1e-2,
    } | fields
    return Case(ConvNet(stages, kind="efficientnet", **F32 | fields), efficientnet_lite)


def _sam(*sizes, **fields) -> Case:
    return Case(Sam(*sizes, **F32 | fields), sam_vision_model)


# Small enough that weights and outputs lie in the repository.
GOLDENS = {
    # An odd row is dropped at every stage; grids are no squares; one is resized up, another down.
    "convnext_taps": _convnext(
        (1, 2, 2), (4, 6, 8), image_size=(38, 54), taps=(0, 1, 2), resize_to=(5, 3), remat=True
    ),
    "convnext_pooled": _convnext(
        (2, 1),
        (5, 9),
        stem_stride=2,
        image_size=16,
        pool="mean",
        layer_scale=0.0,
        activation="gelu_tanh",
        final_norm_eps=1e-2,
    ),
    "convnextv2": _convnext(
        (1, 2),
        (4, 6),
        image_size=(26, 20),
        classes=7,
        response_norm=True,
        layer_scale=0.0,
        remat=False,
    ),
    "efficientnet": _efficientnet(
        (1, 4, 3, 1, 1),
        (2, 6, 5, 2, 3),
        (3, 6, 3, 1, 2),
        (1, 5, 5, 2, 6),
        stem_width=6,
        image_size=(34, 19),
    ),
    "efficientnet_head": _efficientnet(
        (2, 4, 3, 1, 1), (1, 6, 3, 2, 6), stem_width=4, image_size=15, head=11, classes=7
    ),
    # Windows of 3 over 7 x 7 patches, three times (window, window, whole).
    "sam": _sam(12, 6, 10, 3, (2, 5), window=3, patch=2, image_size=14, out=7, norm_eps=1e-2),
    # Layers in no period, tables for another size than the image's, a window larger than the grid.
    "sam_resized": _sam(
        12,
        4,
        10,
        2,
        (0, 3),
        window=6,
        patch=4,
        image_size=(20, 32),
        trained_size=28,
        out=5,
        qkv_bias=False,
        activation="gelu_tanh",
        remat=False,
    ),
    "sam_plain": _sam(
        8, 2, 10, 2, (1,), window=2, patch=4, image_size=20, out=6, absolute=False, relative=False
    ),
}

LARGER = {
    "convnext": _convnext(
        (1, 2, 3, 1), (16, 24, 40, 48), image_size=(132, 100), taps=(0, 1, 2, 3), resize_to=9
    ),
    "convnextv2": _convnext(
        (2, 3),
        (16, 24),
        image_size=40,
        pool="mean",
        response_norm=True,
        layer_scale=0.0,
    ),
    "efficientnet": _efficientnet(
        (1, 8, 3, 1, 1),
        (2, 16, 3, 2, 6),
        (3, 24, 5, 2, 6),
        (2, 24, 5, 1, 4),
        stem_width=12,
        image_size=(97, 64),
        head=40,
        pool="mean",
        norm_eps=1e-3,
    ),
    "sam": _sam(60, 8, 110, 5, (3, 7), window=5, patch=8, image_size=96, out=24),
    "sam_resized": _sam(
        48, 5, 90, 3, (1, 2), window=4, patch=8, image_size=(56, 104), trained_size=128, out=16
    ),
}


def pixels(case: Case) -> np.ndarray:
    """Two images."""
    shape = (2, *case.preset.size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def shapes(preset: ConvNet | Sam) -> dict[str, tuple[int, ...]]:
    """Of the leaves, by paths relative to the tower."""
    found = params.abstract(Model(preset))
    return {path.removeprefix("encoder/"): leaf.shape for path, leaf in found.items()}


def weights(case: Case) -> dict[str, np.ndarray]:
    """Our leaves, by paths relative to the tower: all random, so that none hides a mistake."""
    rng, found = np.random.default_rng(2), {}
    for path, shape in sorted(shapes(case.preset).items()):
        if path.endswith("/variance"):
            leaf = rng.uniform(0.3, 3.0, shape)
        else:
            leaf = 0.3 * rng.normal(size=shape) + path.endswith("/scale")
        found[path] = leaf.astype(np.float32)
    return found


def leaves(case: Case, theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their arrays as our leaves, by paths relative to the tower."""
    return tables.gather(case.family.rows(case.preset), shapes(case.preset), theirs)


def run(case: Case, compared: Mapping[str, np.ndarray], x: np.ndarray):
    """Logits of a classifier, or features."""
    flat = {f"encoder/{path}": leaf for path, leaf in compared.items()}
    encoder = params.build(Model(case.preset), flat).encoder
    images = Images(np.full((1, len(x), 2), case.preset.grid, np.int32), pixels=x[None])
    return encoder.logits(images) if getattr(case.preset, "classes", 0) else encoder(images).x


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the output is weighted with to make the scalar whose gradients are compared."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)
