"""The same encoders in torch: transformers, and EfficientNet-Lite written out here."""

import functools
import re

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from convnet_cases import Case, cotangent, weights
from torch.nn.utils import parametrize

from vlm_jax.presets.convnets import ConvNet
from vlm_jax.weights import tables
from vlm_jax.weights.families import sam_vision_model


def compare(case: Case, x: np.ndarray):
    """Over our weights: their output, gradients of its weighted sum by name, and all names."""
    preset, images = case.preset, torch.from_numpy(x).permute(0, 3, 1, 2)
    if case.family is sam_vision_model:
        module, apply = _sam(preset)
    elif preset.kind == "convnext":
        module, apply = _convnext(preset, case.family)
    else:
        module, apply = _EfficientNet(preset), lambda module, x: module(x)
    module.float().eval()
    _load(case, module)
    output = apply(module, images)
    (output * torch.from_numpy(cotangent(tuple(output.shape)))).sum().backward()
    gradients = {
        _name(name): p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None
    }
    return output.detach().numpy(), gradients, sorted(map(_name, module.state_dict()))


def _load(case: Case, module: torch.nn.Module) -> None:
    """Our weights by their names; every name and shape must be theirs."""
    named = tables.scatter(case.family.rows(case.preset), weights(case))
    names = {_name(name): name for name in module.state_dict()}
    tensors = {names[name]: torch.from_numpy(array) for name, array in named.items()}
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    carried = [n for n in missing if any(re.fullmatch(p, n) for p in case.family.CARRIED)]
    assert (missing, unexpected) == (carried, [])


def _name(name: str) -> str:
    return name.replace("parametrizations.pos_embed.original", "pos_embed")


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[n, C, h, w] as [n, h * w, C]."""
    return x.flatten(2).transpose(1, 2)


def _convnext(preset: ConvNet, family):
    fields = family.write(preset) | {"num_labels": preset.classes or 2}
    config = transformers.AutoConfig.for_model(**fields)
    module = transformers.AutoModelForImageClassification.from_config(config)
    return module, functools.partial(_convnext_output, preset)


def _convnext_output(preset: ConvNet, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if preset.classes:
        return module(x).logits
    trunk = getattr(module, module.base_model_prefix)
    output = trunk(x, output_hidden_states=True)
    if preset.pool == "mean":
        return output.pooler_output[:, None]
    # The first of the hidden states is the stem's, where transformers gives it.
    stages = output.hidden_states[-len(preset.stages) :]
    torch.testing.assert_close(stages[-1], output.last_hidden_state)
    if preset.resize_to is None:
        return _flat(stages[preset.taps[0]])
    resize = functools.partial(F.interpolate, size=preset.grid, mode="bilinear")
    return _flat(torch.cat([resize(stages[tap]) for tap in preset.taps], dim=1))


class _Resized(torch.nn.Module):
    """Positions brought to another grid, as pictures are."""

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        x = positions.permute(0, 3, 1, 2)
        x = F.interpolate(x, size=self.grid, mode="bicubic", antialias=True)
        return x.permute(0, 2, 3, 1)


def _sam(preset):
    fields = sam_vision_model.write(preset)
    config = transformers.SamVisionConfig(**fields, attn_implementation="eager")
    module = transformers.SamVisionModel(config)
    encoder = module.vision_encoder
    if preset.grid != preset.trained_grid:
        # transformers resizes relative positions only, and refuses other images.
        encoder.patch_embed.image_size = preset.size
        parametrize.register_parametrization(
            encoder, "pos_embed", _Resized(preset.grid), unsafe=True
        )
    return module, lambda module, x: _flat(module(x).last_hidden_state)


def _same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Padded as TensorFlow's SAME: the smaller half before, the larger after."""
    short = [max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x.shape[2:]]
    (top, left), (bottom, right) = ([s // 2 for s in short], [s - s // 2 for s in short])
    return F.pad(x, (left, right, top, bottom))


class _Block(torch.nn.Module):
    def __init__(self, channels: int, stage: tuple, stride: int, eps: float):
        super().__init__()
        _, width, self.kernel, _, expand = stage
        inner, norm = channels * expand, functools.partial(torch.nn.BatchNorm2d, eps=eps)
        conv = functools.partial(torch.nn.Conv2d, bias=False)
        if expand > 1:
            self._expand_conv, self._bn0 = conv(channels, inner, 1), norm(inner)
        self._depthwise_conv = conv(inner, inner, self.kernel, stride=stride, groups=inner)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = conv(inner, width, 1), norm(width)
        self.stride, self.skip = stride, stride == 1 and channels == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._depthwise_conv(_same(y, self.kernel, self.stride))
        y = self._bn2(self._project_conv(F.relu6(self._bn1(y))))
        return x + y if self.skip else y


class _EfficientNet(torch.nn.Module):
    """EfficientNet-Lite with the names of its published weights."""

    def __init__(self, preset: ConvNet):
        super().__init__()
        self.preset, width, eps = preset, preset.stem_width, preset.norm_eps
        norm = functools.partial(torch.nn.BatchNorm2d, eps=eps)
        self._conv_stem = torch.nn.Conv2d(3, width, 3, stride=preset.stem_stride, bias=False)
        self._bn0 = norm(width)
        blocks = []
        for stage in preset.stages:
            for i in range(stage[0]):
                blocks.append(_Block(width, stage, 1 if i else stage[3], eps))
                width = stage[1]
        self._blocks = torch.nn.ModuleList(blocks)
        if preset.head:
            self._conv_head = torch.nn.Conv2d(width, preset.head, 1, bias=False)
            self._bn1 = norm(preset.head)
        if preset.classes:
            self._fc = torch.nn.Linear(preset.head, preset.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self._bn0(self._conv_stem(_same(x, 3, self.preset.stem_stride))))
        for block in self._blocks:
            x = block(x)
        if not self.preset.head:
            return _flat(x)
        x = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return self._fc(x) if self.preset.classes else x[:, None]
