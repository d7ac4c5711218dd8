"""The cases of `adapter_cases` in the `peft` library. Needs torch, transformers and peft."""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import optax
import peft
import torch
import transformers
from adapter_cases import ALPHA, DECAY, HIDDEN, INPUTS, LR, RANK, STEPS, TRAIN

from vlm_jax.training import schedules
from vlm_jax.weights import files
from vlm_jax.weights import peft as format

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "models"))
import nf4_statements

ENCODER = "prompt_encoder.default."
TARGETS = {
    "llama": r".*(q|k|v|o|gate|up|down)_proj|lm_head",
    "siglip": r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}


def base(name: str) -> torch.nn.Module:
    """The model alone, every weight random."""
    if name.startswith("llama"):
        config = transformers.LlamaConfig(
            vocab_size=67,
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=6,
            attention_bias=True,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.SiglipVisionConfig(
            hidden_size=20,
            intermediate_size=33,
            num_hidden_layers=2,
            num_attention_heads=5,
            image_size=21,
            patch_size=7,
            vision_use_head=False,
        )
        model = transformers.SiglipVisionModel(config)
    randomise(model.named_parameters(), 0)
    return model.float().eval()


def randomise(parameters, seed: int) -> None:
    """So that no zero or one hides a mistake."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = 0.3 * rng.normal(size=parameter.shape).astype(np.float32)
            same = "magnitude" in name or (parameter == 1).all()
            parameter.copy_(torch.from_numpy(noise) + (parameter if same else 0))


def make(name: str) -> dict[str, np.ndarray]:
    """All arrays of a case."""
    tower, _, mode = name.partition("_")
    rng, plain = np.random.default_rng(1), base(name)
    shapes = {"llama": (2, 11), "siglip": (3, 3, 21, 21)}
    inputs = rng.integers(0, 67, shapes["llama"])
    if tower == "siglip":
        inputs = rng.normal(size=shapes[tower]).astype(np.float32)
    prefix = mode in ("prefix", "projected")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        plain.save_pretrained(folder / "base")
        arrays = {f"base/{n}": a for n, a in _read(folder / "base" / "model.safetensors").items()}
        arrays["config"] = np.asarray((folder / "base" / "config.json").read_text())
        if mode == "nf4":
            through_nf4(plain)
        model = peft.get_peft_model(plain, settings(tower, mode))
        own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        randomise(own, 2)
        saved = _network if mode == "projected" else _saved
        arrays |= {f"adapter/{n}": a for n, a in saved(model, folder / "adapter").items()}
        stored = json.loads((folder / "adapter" / format.CONFIG).read_text())
        arrays["adapter_config"] = np.asarray(json.dumps(stored, sort_keys=True))
        output = run(model, tower, inputs)
        target = rng.normal(size=output.shape).astype(np.float32)
        arrays |= {"inputs": inputs, "target": target, "output": output.detach().numpy()}
        losses, gradients = _train(model, tower, inputs, target)
        arrays["losses"] = np.asarray(losses, np.float32)
        arrays |= {f"after/{n}": a for n, a in saved(model, folder / "after").items()}
    for name, gradient in gradients.items():
        filed = name.removeprefix(ENCODER) if prefix else _filed(name)
        filed = "prompt_embeddings" if mode == "prefix" else filed
        arrays[f"gradients/{filed}"] = gradient
    return arrays


def settings(tower: str, mode: str) -> peft.PeftConfig:
    """The adapter of a case."""
    if mode in ("prefix", "projected"):
        return peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=RANK,
            prefix_projection=mode == "projected",
            encoder_hidden_size=HIDDEN,
        )
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[tower], use_dora=mode == "dora"
    )


def through_nf4(model: torch.nn.Module) -> None:
    """Puts what NF4 makes of them in the place of the adapted weights."""
    for name, module in model.named_modules():
        if re.fullmatch(TARGETS["llama"], name):
            held = nf4_statements.held(module.weight.detach().numpy())
            module.weight.data = torch.from_numpy(held)


def _network(model: torch.nn.Module, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters of the network that makes a prefix; the folder is that of what it makes."""
    _saved(model, folder)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n.removeprefix(ENCODER): p.detach().numpy().copy() for n, p in own.items()}


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    source = files.Safetensors([path])
    return {name: source.read(name) for name in source.shapes}


def _saved(model: torch.nn.Module, folder: pathlib.Path) -> dict[str, np.ndarray]:
    model.save_pretrained(folder, save_embedding_layers=False)
    return _read(folder / format.TENSORS)


def _filed(name: str) -> str:
    """The name that a parameter has in the file."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def run(model: torch.nn.Module, tower: str, inputs: np.ndarray) -> torch.Tensor:
    """Logits, or hidden states after the last norm."""
    found = model(**{INPUTS[tower]: torch.from_numpy(inputs)})
    return found.logits if tower == "llama" else found.last_hidden_state


def _train(model: torch.nn.Module, tower: str, inputs: np.ndarray, target: np.ndarray):
    """AdamW at our schedule; losses, and the gradients of the first step."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rates: optax.Schedule = schedules.make(TRAIN)
    biases = [p for n, p in own.items() if n.endswith(".bias")]  # which our table does not decay
    groups = [{"params": [p for n, p in own.items() if not n.endswith(".bias")]}]
    groups += [{"params": biases, "weight_decay": 0.0}] if biases else []
    adamw = torch.optim.AdamW(
        groups, LR, betas=(TRAIN.b1, TRAIN.b2), eps=TRAIN.eps, weight_decay=DECAY
    )
    losses, first = [], None
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = float(rates(step))
        adamw.zero_grad()
        loss = torch.square(run(model, tower, inputs) - torch.from_numpy(target)).mean()
        loss.backward()
        first = first or {n: p.grad.numpy().copy() for n, p in own.items()}
        torch.nn.utils.clip_grad_norm_(own.values(), TRAIN.clip)
        adamw.step()
        losses.append(loss.item())
    return losses, first
