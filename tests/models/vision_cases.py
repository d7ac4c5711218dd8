"""Vision towers that are compared with transformers: their config.json, and what we make of it."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.presets.encoders import Encoder
from vlm_jax.weights import tables


@dataclasses.dataclass(frozen=True)
class Tower:
    """One of our encoders against one of their towers.

    Attributes:
      family: module of `vlm_jax.weights.families`.
      hf: fields of config.json.
      fields: of our preset that config.json does not say.
      grids: rows and columns of images of a tower that takes any; () = all have the tower's size.
      output: which of theirs: "last", "layer" (that of the preset), "normed" or "pooled".
      gradients: whether they are compared too.
    """

    family: str
    hf: dict
    fields: dict = dataclasses.field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] = ()
    output: str = "last"
    gradients: bool = False

    @property
    def module(self):
        """The family's."""
        return importlib.import_module(f"vlm_jax.weights.families.{self.family}")

    @property
    def preset(self) -> Encoder:
        """Ours, in float32."""
        fields = {"dtype": "float32", "remat": False} | self.fields
        return dataclasses.replace(self.module.read(self.hf), **fields)


def sizes(width: int, depth: int, mlp: int, heads: int, patch: int, size: int, **fields) -> dict:
    """Fields of config.json."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": size,
        "layer_norm_eps": 1e-2,
        **fields,
    }


def ratio(*size, mlp_ratio: int, **fields) -> dict:
    """Fields of a DINOv2's config.json."""
    hf = sizes(*size[:2], 0, *size[2:], mlp_ratio=mlp_ratio, **fields)
    return {k: v for k, v in hf.items() if k != "intermediate_size"}


def naflex(*size, patches: int, **fields) -> dict:
    """Fields of a SigLIP 2's config.json."""
    hf = sizes(*size, 0, num_patches=patches, **fields)
    return {k: v for k, v in hf.items() if k != "image_size"}


def pix2struct(width: int, depth: int, mlp: int, heads: int, head_dim: int, patch: int, most: int):
    """Fields of a Pix2Struct's config.json."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "d_ff": mlp,
        "num_attention_heads": heads,
        "d_kv": head_dim,
        "patch_embed_hidden_size": 3 * patch**2,
        "seq_len": most,
        "layer_norm_eps": 1e-2,
    }


# Small enough that weights and outputs lie in the repository: odd head counts, grids that are no
# squares, more patches than entries of the table along one axis and fewer along the other.
ODD = ((3, 2), (5, 3), (2, 7))
SMALL = {
    "clip_llava": Tower(
        "clip_vision_model",
        sizes(12, 3, 14, 3, 3, 9),
        {"layer": -2},
        output="layer",
        gradients=True,
    ),
    "clip_normed": Tower(
        "clip_vision_model",
        sizes(12, 2, 18, 2, 4, 8, hidden_act="gelu", layer_norm_eps=1e-5),
        {"final_norm": True, "keep_class": True},
        output="normed",
    ),
    "clip_resized": Tower(
        "clip_vision_model",
        sizes(12, 1, 18, 3, 4, 16),
        {"image_size": (12, 28), "position_grid": (4, 4), "keep_class": True},
    ),
    "siglip_resized": Tower(
        "siglip_vision_model",
        sizes(12, 2, 20, 3, 4, 12),
        {"image_size": (20, 8), "position_grid": (3, 3), "pool": "map"},
        output="pooled",
    ),
    "naflex": Tower(
        "siglip2_vision_model",
        naflex(12, 2, 14, 3, 3, patches=16),
        {"remat": True},
        grids=ODD,
        gradients=True,
    ),
    "naflex_pooled": Tower(
        "siglip2_vision_model",
        naflex(8, 1, 12, 2, 2, patches=25),
        {"pool": "map", "max_patches": 18},
        grids=ODD,
        output="pooled",
    ),
    "idefics2": Tower(
        "idefics2_vision",
        sizes(12, 2, 20, 3, 4, 20),
        {"max_patches": 16},
        grids=ODD,
    ),
    "dinov2_gated": Tower(
        "dinov2",
        ratio(12, 2, 3, 4, 12, mlp_ratio=3, use_swiglu_ffn=True),
        gradients=True,
    ),
    "dinov2_resized": Tower(
        "dinov2",
        ratio(12, 2, 2, 4, 16, mlp_ratio=2, qkv_bias=False),
        {"image_size": (8, 20), "position_grid": (4, 4), "keep_class": True},
    ),
    "dinov2_registers": Tower(
        "dinov2_with_registers",
        ratio(12, 2, 3, 4, 16, mlp_ratio=2, num_register_tokens=3),
        {"image_size": (8, 20), "position_grid": (4, 4), "keep_class": True},
        gradients=True,
    ),
    "blip2": Tower(
        "blip_2_vision_model",
        sizes(12, 2, 20, 3, 4, 12),
        {"image_size": (8, 16), "position_grid": (3, 3)},
    ),
    "pix2struct": Tower(
        "pix2struct_vision_model",
        pix2struct(12, 2, 20, 3, 6, 4, most=9),
        {"max_patches": 17},
        grids=ODD,
    ),
}
LARGER = {
    "clip": Tower(
        "clip_vision_model", sizes(60, 4, 110, 5, 6, 24), {"layer": -3}, (), "layer", True
    ),
    "siglip": Tower(
        "siglip_vision_model", sizes(56, 3, 90, 7, 6, 30), {"pool": "map"}, (), "pooled", True
    ),
    "naflex": Tower(
        "siglip2_vision_model",
        naflex(54, 3, 90, 6, 4, patches=49),
        grids=((7, 7), (3, 13), (12, 4), (1, 1)),
        gradients=True,
    ),
    "idefics2": Tower(
        "idefics2_vision", sizes(48, 2, 70, 3, 4, 40), {}, ((10, 10), (3, 7), (9, 11)), "last", True
    ),
    "idefics3": Tower("idefics3_vision", sizes(42, 2, 70, 3, 4, 28), {}, ((7, 7), (3, 6))),
    "smolvlm": Tower("smolvlm_vision", sizes(40, 2, 70, 5, 4, 32), {}, ((8, 8), (5, 6))),
    "dinov2": Tower(
        "dinov2", ratio(60, 3, 5, 6, 30, mlp_ratio=4, use_swiglu_ffn=True), {}, (), "last", True
    ),
    "dinov2_registers": Tower(
        "dinov2_with_registers",
        ratio(42, 3, 3, 6, 30, mlp_ratio=3),
        {"image_size": (18, 42), "position_grid": (5, 5)},
        (),
        "last",
        True,
    ),
    "blip2": Tower("blip_2_vision_model", sizes(55, 3, 90, 5, 6, 24), {}, (), "last", True),
    "pix2struct": Tower(
        "pix2struct_vision_model",
        pix2struct(50, 3, 80, 5, 8, 4, most=15),
        {"max_patches": 40},
        ((3, 12), (6, 6), (2, 1)),
        "last",
        True,
    ),
}


def inputs(tower: Tower, seed: int = 0) -> np.ndarray:
    """Pixels [2, H, W, 3], or flattened patches [n, P, patch * patch * 3], padding's too."""
    rng, preset = np.random.default_rng(seed), tower.preset
    if tower.grids:
        shape = (len(tower.grids), preset.patches, 3 * preset.patch**2)
    else:
        shape = (2, *preset.size, 3)
    return rng.normal(size=shape).astype(np.float32)


def images(tower: Tower, x: np.ndarray) -> Images:
    """What the encoder reads: one row of the batch for all images."""
    preset = tower.preset
    if not tower.grids:
        n, rows, columns = len(x), *preset.grid
        x = x.reshape(n, rows, preset.patch, columns, preset.patch, 3).swapaxes(2, 3)
        grids = np.full((1, n, 2), preset.grid, np.int32)
        return Images(grids, patches=x.reshape(1, n * preset.patches, -1))
    at = np.zeros((*x.shape[:2], 2), np.int32)
    owner = np.full(x.shape[:2], -1, np.int32)
    for i, (rows, columns) in enumerate(tower.grids):
        at[i, : rows * columns] = np.indices((rows, columns)).reshape(2, -1).T
        owner[i, : rows * columns] = i
    return Images(
        np.asarray([tower.grids], np.int32),
        patches=x.reshape(1, -1, x.shape[-1]),
        patch_positions=at.reshape(1, -1, 2),
        patch_images=owner.reshape(1, -1),
    )


def shapes(preset: Encoder) -> dict[str, tuple[int, ...]]:
    """Our leaves, by path below the tower."""
    flat = params.abstract(Model(preset))
    return {path.removeprefix("encoder/"): leaf.shape for path, leaf in flat.items()}


def leaves(tower: Tower, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors, or gradients of them, as ours."""
    return tables.gather(tower.module.rows(tower.preset), shapes(tower.preset), tensors)


def run(tower: Tower, ours: dict, seen: Images):
    """Our features; of images with grids of their own, those of all patches one after another."""
    flat = {f"encoder/{path}": jnp.asarray(leaf) for path, leaf in ours.items()}
    features = params.build(Model(tower.preset), flat).encoder(seen)
    if features.mask is None:
        return features.x
    counts = [rows * columns for rows, columns in tower.grids]
    return jnp.concatenate([x[:count] for x, count in zip(features.x, counts)])
