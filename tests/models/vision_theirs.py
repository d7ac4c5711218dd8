"""The towers of vision_cases.py in transformers. Needs torch."""

import pathlib
import tempfile

import numpy as np
import torch
import transformers
from cases import cotangent
from safetensors.numpy import load_file
from transformers.models.idefics2 import modeling_idefics2 as idefics2
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.smolvlm import modeling_smolvlm as smolvlm
from vision_cases import Tower

# Their class and its config's. In published files of the first three, names begin so.
CLASSES = {
    "clip_vision_model": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "siglip_vision_model": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "siglip2_vision_model": (transformers.Siglip2VisionModel, transformers.Siglip2VisionConfig),
    "idefics2_vision": (idefics2.Idefics2VisionTransformer, idefics2.Idefics2VisionConfig),
    "idefics3_vision": (idefics3.Idefics3VisionTransformer, idefics3.Idefics3VisionConfig),
    "smolvlm_vision": (smolvlm.SmolVLMVisionTransformer, smolvlm.SmolVLMVisionConfig),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
    ),
    "blip_2_vision_model": (transformers.Blip2VisionModel, transformers.Blip2VisionConfig),
    "pix2struct_vision_model": (
        transformers.Pix2StructVisionModel,
        transformers.Pix2StructVisionConfig,
    ),
}
PREFIXED = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")


def make(tower: Tower, seed: int = 0) -> torch.nn.Module:
    """Their model; every weight random, so that none hides a mistake."""
    kind, config = CLASSES[tower.family]
    module = kind(config(**tower.hf, attn_implementation="eager"))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.3 * rng.normal(size=parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(noise) + (parameter == 1).all())
    return module.float().eval()


def compare(tower: Tower, x: np.ndarray):
    """Their output, weights and gradients of its weighted sum, by the names of published files."""
    module = make(tower)
    weights = tensors(tower, module)
    output = RUN.get(tower.family, _fixed)(tower, module, torch.from_numpy(x))
    (output * torch.from_numpy(cotangent(tuple(output.shape)))).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    return output.detach().numpy(), weights, tensors(tower, module)


def tensors(tower: Tower, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """What transformers would publish of a module."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        found = load_file(pathlib.Path(folder) / "model.safetensors")
    prefix = "vision_model." if tower.family in PREFIXED else ""
    return {prefix + name: array for name, array in found.items()}


def _fixed(tower: Tower, module, x: torch.Tensor) -> torch.Tensor:
    preset, pixels = tower.preset, x.permute(0, 3, 1, 2)
    flag = {} if tower.family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    found = module(pixels, output_hidden_states=True, **flag)
    if tower.output == "pooled":
        return found.pooler_output[:, None]
    y = found.hidden_states[preset.layer] if tower.output == "layer" else found.last_hidden_state
    y = module.post_layernorm(y) if tower.output == "normed" else y
    before = int(preset.class_token) + preset.registers
    return torch.cat([y[:, : int(preset.keep_class)], y[:, before:]], dim=1)


def _naflex(tower: Tower, module, x: torch.Tensor) -> torch.Tensor:
    mask = _mask(tower)
    found = module(x, pixel_attention_mask=mask.long(), spatial_shapes=torch.tensor(tower.grids))
    return found.pooler_output[:, None] if tower.output == "pooled" else found[0][mask]


def _padded_squares(tower: Tower, module, x: torch.Tensor) -> torch.Tensor:
    """Idefics's: whole images, padded to the largest."""
    patch, grids = tower.preset.patch, torch.tensor(tower.grids)
    most = grids.max(0).values
    mask = torch.zeros((len(grids), *most), dtype=torch.bool)
    squares = torch.full((len(grids), *most, patch, patch, 3), 7.0)
    for i, (rows, columns) in enumerate(tower.grids):
        mask[i, :rows, :columns] = True
        whole = x[i, : rows * columns].reshape(rows, columns, patch, patch, 3)
        squares[i, :rows, :columns] = whole
    pixels = squares.permute(0, 5, 1, 3, 2, 4)
    pixels = pixels.reshape(len(grids), 3, most[0] * patch, most[1] * patch)
    return module(pixels, patch_attention_mask=mask)[0][mask.flatten(1)]


def _pix2struct(tower: Tower, module, x: torch.Tensor) -> torch.Tensor:
    """Row and column stand before each patch, counted from 1."""
    mask, places = _mask(tower), torch.zeros(*x.shape[:2], 2)
    for i, (rows, columns) in enumerate(tower.grids):
        at = np.indices((rows, columns)).reshape(2, -1).T + 1
        places[i, : rows * columns] = torch.from_numpy(at).float()
    return module(torch.cat([places, x], dim=-1), attention_mask=mask.float())[0][mask]


def _mask(tower: Tower) -> torch.Tensor:
    counts = torch.tensor(tower.grids).prod(1)
    return torch.arange(tower.preset.patches) < counts[:, None]


RUN = {
    "siglip2_vision_model": _naflex,
    "idefics2_vision": _padded_squares,
    "idefics3_vision": _padded_squares,
    "smolvlm_vision": _padded_squares,
    "pix2struct_vision_model": _pix2struct,
}
