"""A hundred steps of the recipes of small published systems, as ours takes them.

What theirs is compared by, a `Trained`, comes from the golden files recipes_*.npz or from
`recipe_theirs`. Both start from the weights in published_*.npz.
"""

import dataclasses
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "weights"))

import goldens

from vlm_jax import config as c
from vlm_jax.models import params
from vlm_jax.parallel import mesh as meshes
from vlm_jax.training import adaptation, step
from vlm_jax.training import state as states
from vlm_jax.weights import checking, conversion, files, registry

STEPS, BATCHES = 100, 3
TRAIN = c.Train(
    steps=STEPS, lr=2e-3, warmup_steps=7, end_lr=0.1, weight_decay=0.1, b2=0.98, clip=1.0, eps=1e-6
)
FROZEN = c.Rule(r"encoder/.*", mode="frozen")
BOTH_FROZEN = FROZEN, c.Rule(r"decoder/.*", mode="frozen")
# Seen with jax 0.10 and 0.12: 2e-6 and 4e-4, nearly all of it from changes in half precision.
LOSS, CHANGE = 1e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A stage of a published system.

    Attributes:
      rules: what trains and how.
      trains: whether a parameter of theirs does, by its name.
      dead: parts of names of leaves whose true gradient is zero: a bias that all keys share moves
        all scores of a query alike.
    """

    rules: tuple[c.Rule, ...]
    trains: tuple[str, ...]
    dead: tuple[str, ...] = ()


RECIPES = {
    # LLaVA's second stage: connector and decoder; its first: the connector alone.
    "llava": Recipe((FROZEN, *c.FULL), ("multi_modal_projector", "language_model", "lm_head")),
    "llava_full": Recipe((*BOTH_FROZEN, c.Rule(r".*")), ("multi_modal_projector",)),
    # Idefics2 with all of it trained.
    "idefics2": Recipe(c.FULL, ("",), ("k_proj.bias",)),
    # BLIP-2's second stage: the Q-Former before a frozen decoder.
    "blip_2": Recipe(
        (*BOTH_FROZEN, *c.FULL),
        ("qformer", "language_projection", "query_tokens"),
        ("key.bias",),
    ),
}


class Fed(NamedTuple):
    """A batch: arrays for their `forward` by keyword, and the weight of every token."""

    arrays: dict[str, np.ndarray]
    weights: np.ndarray


class Trained(NamedTuple):
    """What came of a hundred steps.

    Attributes:
      batches: fed one after the other, again and again.
      losses: of every step, before it is taken.
      norms: of the gradient of all that trains, before it is clipped.
      changes: what was added to a tensor, by its published name; what stayed is left out.
    """

    batches: list[Fed]
    losses: np.ndarray
    norms: np.ndarray
    changes: dict[str, np.ndarray]


def start(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes the published folder that both start from."""
    return goldens.publish(goldens.read(name), folder)


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a published folder by name."""
    source = files.Safetensors([folder / "model.safetensors"])
    # Releases of transformers differ in the name of CLIP's tower.
    names = {
        name.replace("vision_tower.vision_model.", "vision_tower."): name for name in source.shapes
    }
    return {name: source.read(stored) for name, stored in names.items()}


def changes(before: pathlib.Path, after: pathlib.Path) -> dict[str, np.ndarray]:
    """What training added to the tensors of a folder, where it added anything."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    moved = {name: new[name] - old[name] for name in old}
    return {name: change for name, change in moved.items() if change.any()}


def ours(name: str, batches: list[Fed], folder: pathlib.Path) -> Trained:
    """Trains ours."""
    source = start(name, folder / "source")
    stored = conversion.import_folder(source, folder / "model")
    known = registry.family(stored.family)
    model = known.fitted(checking.exact(stored.model), batches[0].arrays)
    prepared = []
    for arrays, weights in batches:
        prompts = known.inputs(model, stored.published, arrays)
        prepared.append(prompts.batch._replace(loss_weights=prompts.moved(weights)))
    config = c.Config(
        "parity",
        model,
        c.Data({"none": 1.0}, rows=len(prepared[0].tokens)),
        train=TRAIN,
        init=(c.Init(str(stored.path)),),
        adaptation=RECIPES[name].rules,
    )
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    plan = adaptation.plan(params.abstract(config.model), config.adaptation)
    run, state = step.make_step(config, plan, mesh), states.create(config, plan, mesh)
    losses, norms = [], []
    for number in range(STEPS):
        state, sums = run(state, step.place(prepared[number % len(prepared)], mesh))
        losses.append(float(sums["loss"]))
        norms.append(float(sums["grad_norm"]))
    trained = dataclasses.replace(stored, trained=state.evaluated())
    conversion.export_folder(trained, folder / "trained")
    moved = changes(source, folder / "trained")
    return Trained(batches, np.asarray(losses), np.asarray(norms), moved)


def compare(name: str, found: Trained, wanted: Trained) -> None:
    """Raises AssertionError where a loss, a norm or what a tensor learned is not theirs."""
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=LOSS)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=LOSS)
    assert wanted.losses[-1] < wanted.losses[0]
    off = {}
    for leaf in found.changes.keys() | wanted.changes.keys():
        if not any(part in leaf for part in RECIPES[name].dead):
            theirs = wanted.changes[leaf].astype(np.float32)
            gap = np.linalg.norm(found.changes[leaf] - theirs)
            off[leaf] = float(gap / np.linalg.norm(theirs))
    assert off and not {leaf: gap for leaf, gap in off.items() if gap > CHANGE}


def path(name: str) -> pathlib.Path:
    """Where a golden file lies."""
    return goldens.FOLDER / f"recipes_{name}.npz"


def write(name: str, trained: Trained) -> None:
    """Writes a golden file: changes in half precision, those of dead leaves left out."""
    arrays = {"losses": trained.losses, "norms": trained.norms}
    for number, (inputs, weights) in enumerate(trained.batches):
        arrays[f"weights/{number}"] = weights
        arrays |= {f"inputs/{number}/{key}": array for key, array in inputs.items()}
    for leaf, change in trained.changes.items():
        if not any(part in leaf for part in RECIPES[name].dead):
            arrays[f"changes/{leaf}"] = change.astype(np.float16)
    np.savez_compressed(path(name), **arrays)


def read(name: str) -> Trained:
    """A golden file."""
    with np.load(path(name)) as file:
        arrays = dict(file)

    def below(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}

    batches = [Fed(below(f"inputs/{n}/"), arrays[f"weights/{n}"]) for n in range(BATCHES)]
    return Trained(batches, arrays["losses"], arrays["norms"], below("changes/"))
