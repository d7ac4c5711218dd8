"""Small towers with adapters of the `peft` library, and what ours makes of the same arrays.

Arrays of a case, by name: `config` and `adapter_config` (JSON); `base/NAME` and `adapter/NAME`,
tensors by their names in the files; `inputs` of `forward`; `target` of the squared error; and
theirs to compare with: `output`, `losses` of STEPS steps, `gradients/NAME` at the first of them and
`after/NAME`, the adapter after the last. With a network that makes a prefix, which no file of PEFT
holds, names are those of its parameters.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.config import Config, Data, Rule, Train
from vlm_jax.models import adapters, params, prefixes
from vlm_jax.training import adaptation, optimizer
from vlm_jax.training import state as states
from vlm_jax.weights import checking, conversion, files, peft, peft_prefix, store
from vlm_jax.weights.registry import family

STEPS, RANK, ALPHA, LR, DECAY = 20, 3, 7, 1e-3, 0.1
CASES = [f"{tower}_{mode}" for tower in ("llama", "siglip") for mode in ("lora", "dora")]
CASES += ["llama_nf4", "llama_prefix", "llama_projected"]
INPUTS = {"llama": "input_ids", "siglip": "pixel_values"}
LINEARS, KEYS = r".*stack/blocks/.*kernel|decoder/output/kernel", r".*attention/key/kernel"
SHAPED = {"rank": RANK, "alpha": ALPHA}
HIDDEN = 5
RULES = {
    "lora": Rule(LINEARS, "lora", **SHAPED),
    "dora": Rule(LINEARS, "dora", **SHAPED),
    "nf4": Rule(LINEARS, "lora", base="nf4", **SHAPED),
    "prefix": Rule(KEYS, "prefix", rank=RANK),
    "projected": Rule(KEYS, "prefix", rank=RANK, hidden=HIDDEN),
}
TRAIN = Train(steps=STEPS, lr=LR, warmup_steps=4, weight_decay=DECAY, clip=1.0)


@dataclasses.dataclass(frozen=True)
class Made:
    """What ours makes of a case; names are those of PEFT's files."""

    output: np.ndarray
    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    stored: store.Stored
    leaves: dict[str, np.ndarray]


def named(arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, without it."""
    return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}


def write_adapter(folder: pathlib.Path, arrays) -> None:
    """The folder as peft saves it."""
    folder.mkdir()
    (folder / peft.CONFIG).write_text(str(arrays["adapter_config"]))
    tensors = named(arrays, "adapter/")
    files.write(folder / peft.TENSORS, tensors, lambda name: [tensors[name]])


def write_base(folder: pathlib.Path, arrays) -> None:
    """The base model's folder as transformers saves it."""
    folder.mkdir()
    (folder / "config.json").write_text(str(arrays["config"]))
    tensors = named(arrays, "base/")
    files.write(folder / "model.safetensors", tensors, lambda name: [tensors[name]])


def ours(name: str, arrays, folder: pathlib.Path) -> Made:
    """Reads both folders, runs and trains what they hold."""
    write_base(folder / "base", arrays)
    write_adapter(folder / "adapter", arrays)
    stored = conversion.import_folder(folder / "base", folder / "model")
    model = checking.exact(stored.model)
    mode = name.partition("_")[2]
    rules = (RULES[mode], Rule(".*", "frozen"))
    plan = adaptation.of(Config("parity", model, Data({"none": 1.0}), adaptation=rules))
    if mode == "projected":
        adapter = projected(named(arrays, "adapter/"), model.decoder)
    else:
        adapter = peft.read(folder / "adapter", model, stored.family)
    flat = {path: jnp.asarray(stored.parameters.read(path)) for path in stored.parameters.shapes}
    flat = states.hold(plan, flat) | jax.tree.map(jnp.asarray, adapter)
    assert flat.keys() == plan.shapes.keys()
    trainable, frozen = plan.split(flat)
    run = _forward(name, stored, model, arrays["inputs"])
    optimize = optimizer.make(TRAIN, plan)

    def loss(trainable):
        output = run({**frozen, **trainable})
        return jnp.mean(jnp.square(output - arrays["target"])), output

    @jax.jit
    def step(trainable, state):
        (value, output), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, state = optimize.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value, output, gradient

    state, losses, first = optimize.init(trainable), [], None
    for _ in range(STEPS):
        trainable, state, value, output, gradient = step(trainable, state)
        losses.append(float(value))
        first = first or (np.asarray(output), gradient)
    leaves = jax.tree.map(np.asarray, {**frozen, **trainable})
    output, gradient = first
    changes = leaves | jax.tree.map(np.asarray, gradient)
    gradients, after = (
        unprojected(made) if mode == "projected" else written(folder / place, stored, made)
        for place, made in (("gradients", changes), ("after", leaves))
    )
    return Made(output, np.asarray(losses), gradients, after, stored, leaves)


NETWORK = {
    prefixes.EMBEDDING: "embedding.weight",
    prefixes.INNER: "transform.0.weight",
    prefixes.INNER_BIAS: "transform.0.bias",
    prefixes.OUTER: "transform.2.weight",
    prefixes.OUTER_BIAS: "transform.2.bias",
}


def projected(theirs, decoder) -> dict[str, np.ndarray]:
    """Our leaves of the parameters of a network that makes a prefix."""
    shape = decoder.depth, 2, decoder.kv_heads, decoder.head_dim
    found = {name: theirs[their] for name, their in NETWORK.items()}
    outer = found[prefixes.OUTER].reshape(*shape, HIDDEN)
    found |= {
        prefixes.INNER: found[prefixes.INNER].T,
        prefixes.OUTER: np.moveaxis(outer, -1, 1),
        prefixes.OUTER_BIAS: found[prefixes.OUTER_BIAS].reshape(shape),
    }
    return {adapters.beside(peft_prefix.KERNEL, name): leaf for name, leaf in found.items()}


def unprojected(leaves) -> dict[str, np.ndarray]:
    """The inverse."""
    own = {name: leaves[adapters.beside(peft_prefix.KERNEL, name)] for name in NETWORK}
    outer = np.moveaxis(own[prefixes.OUTER], 1, -1).reshape(-1, HIDDEN)
    bias = own[prefixes.OUTER_BIAS].reshape(-1)
    own |= {prefixes.INNER: own[prefixes.INNER].T, prefixes.OUTER: outer, prefixes.OUTER_BIAS: bias}
    return {NETWORK[name]: leaf for name, leaf in own.items()}


def written(folder: pathlib.Path, stored: store.Stored, leaves) -> dict[str, np.ndarray]:
    """Adapters' leaves by the names of the file that holds them."""
    peft.write(folder, stored.model, stored.family, leaves)
    source = files.Safetensors([folder / peft.TENSORS])
    return {name: source.read(name) for name in source.shapes}


def _forward(name: str, stored: store.Stored, model, inputs: np.ndarray):
    tower = name.partition("_")[0]
    if tower == "llama":
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        past = positions[:, None, :, None] >= positions[:, None, None, :]

        def run(flat):
            vlm = params.build(model, flat)
            hidden, _ = vlm.decoder(vlm.decoder.embed(jnp.asarray(inputs)), positions, past)
            return vlm.unembed(hidden)

        return run
    arrays = {INPUTS[tower]: inputs}
    seen = family(stored.family).inputs(model, stored.published, arrays)
    return lambda flat: params.build(model, flat).encoder.tokens(seen.images)


def compare(made: Made, arrays, tolerance: float) -> None:
    """Raises AssertionError where ours and theirs differ by more than a relative tolerance."""

    def near(ours, theirs):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, error

    near(made.output, arrays["output"])
    near(made.losses, arrays["losses"])
    assert made.losses[-1] < made.losses[0]
    gradients, after = named(arrays, "gradients/"), named(arrays, "after/")
    assert made.gradients.keys() == gradients.keys() and made.after.keys() == after.keys()
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name in after:
        change = np.abs(after[name] - arrays[f"adapter/{name}"]).max()
        assert change > 0
        np.testing.assert_allclose(made.gradients[name], gradients[name], atol=tolerance * largest)
        np.testing.assert_allclose(made.after[name], after[name], atol=tolerance)


def settings(arrays) -> dict:
    """Their adapter_config.json."""
    return json.loads(str(arrays["adapter_config"]))
