"""The recipes of `recipe_cases` as a plain torch loop over transformers' models. Needs both.

The loop is the recipes' own: AdamW with decoupled decay of matrices alone, linear warm-up and a
cosine, clipping by the global norm, the loss of answer tokens alone, and parts that stay frozen.
"""

import math
import pathlib

import numpy as np
import recipe_cases
import torch
from recipe_cases import BATCHES, RECIPES, STEPS, TRAIN, Fed, Trained

import published  # isort: skip  # tests/weights, which recipe_cases puts on the path


def batches(case: published.Case) -> list[Fed]:
    """Some batches; pixels are numbers of half precision, so that files of them are small."""
    config = case.config
    image = getattr(config, "image_token_id", None) or config.image_token_index
    made = []
    for seed in range(BATCHES):
        arrays, rng = published.case_inputs(case, seed), np.random.default_rng(seed)
        arrays["pixel_values"] = _rounded(arrays["pixel_values"])
        learned = (arrays["input_ids"] != image) & (arrays["attention_mask"] > 0)
        # A token after padding is the first of its text: nothing comes before it.
        learned[:, 1:] &= arrays["attention_mask"][:, :-1] > 0
        learned[:, 0] = False
        weights = (learned & (rng.random(learned.shape) < 0.7)).astype(np.float32)
        made.append(Fed(arrays, weights))
    return made


def _rounded(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float16).astype(np.float32)


def rate(step: int) -> float:
    """The learning rate of a step, in the words of the papers."""
    if step < TRAIN.warmup_steps:
        return TRAIN.lr * step / TRAIN.warmup_steps
    done = (step - TRAIN.warmup_steps) / (STEPS - TRAIN.warmup_steps)
    floor = TRAIN.lr * TRAIN.end_lr
    return floor + (TRAIN.lr - floor) * (1 + math.cos(math.pi * done)) / 2


def make(name: str, folder: pathlib.Path) -> Trained:
    """Trains theirs."""
    case = published.CASES[name]
    source = recipe_cases.start(name, folder / "source")
    model = case.auto.from_pretrained(source, attn_implementation="eager").float().eval()
    trained = []
    for leaf, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in leaf for part in RECIPES[name].trains))
        if parameter.requires_grad:
            trained.append(parameter)
    fed = batches(case)
    losses, norms = _train(model, trained, fed)
    published.save(folder / "trained", model)
    moved = recipe_cases.changes(source, folder / "trained")
    return Trained(fed, np.asarray(losses), np.asarray(norms), moved)


def _train(model: torch.nn.Module, trained: list, fed: list[Fed]) -> tuple[list, list]:
    """The loss and the gradient's norm of every step."""
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(TRAIN.b1, TRAIN.b2), eps=TRAIN.eps)
    losses, norms = [], []
    for number in range(STEPS):
        arrays, weights = fed[number % len(fed)]
        given = {key: torch.from_numpy(array) for key, array in arrays.items()}
        answers, weights = given["input_ids"][:, 1:], torch.from_numpy(weights)
        logits = model(**given).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
        loss = (nll * weights[:, 1:]).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, TRAIN.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
