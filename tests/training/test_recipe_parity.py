"""A hundred steps of ours beside a plain torch loop over transformers' models, weights the same.

The loop is the recipes' own: AdamW with decoupled decay of matrices alone, linear warm-up and a
cosine, clipping by the global norm, the loss of answer tokens alone, and parts that stay frozen.
"""

import dataclasses
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "weights"))

import published  # noqa: E402

from vlm_jax import config as c  # noqa: E402
from vlm_jax.models import params  # noqa: E402
from vlm_jax.parallel import mesh as meshes  # noqa: E402
from vlm_jax.training import adaptation, step  # noqa: E402
from vlm_jax.training import state as states  # noqa: E402
from vlm_jax.weights import checking, conversion, registry  # noqa: E402

pytestmark = pytest.mark.slow

STEPS, BATCHES = 100, 3
TRAIN = c.Train(
    steps=STEPS, lr=2e-3, warmup_steps=7, end_lr=0.1, weight_decay=0.1, b2=0.98, clip=1.0, eps=1e-6
)
FROZEN = c.Rule(r"encoder/.*", mode="frozen")
BOTH_FROZEN = FROZEN, c.Rule(r"decoder/.*", mode="frozen")


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


def batches(case: published.Case):
    """Arrays for `forward` and the weight of every token of theirs."""
    config = case.config
    image = getattr(config, "image_token_id", None) or config.image_token_index
    for seed in range(BATCHES):
        arrays, rng = published.case_inputs(case, seed), np.random.default_rng(seed)
        learned = (arrays["input_ids"] != image) & (arrays["attention_mask"] > 0)
        # A token after padding is the first of its text: nothing comes before it.
        learned[:, 1:] &= arrays["attention_mask"][:, :-1] > 0
        learned[:, 0] = False
        yield arrays, (learned & (rng.random(learned.shape) < 0.7)).astype(np.float32)


def rate(step: int) -> float:
    """The learning rate of a step, in the words of the papers."""
    if step < TRAIN.warmup_steps:
        return TRAIN.lr * step / TRAIN.warmup_steps
    done = (step - TRAIN.warmup_steps) / (STEPS - TRAIN.warmup_steps)
    floor = TRAIN.lr * TRAIN.end_lr
    return floor + (TRAIN.lr - floor) * (1 + math.cos(math.pi * done)) / 2


def theirs(case: published.Case, recipe: Recipe, model) -> list[float]:
    """Trains their model; the loss of every step."""
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in recipe.trains))
        if parameter.requires_grad:
            trained.append(parameter)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(TRAIN.b1, TRAIN.b2), eps=TRAIN.eps)
    given = [
        ({k: torch.from_numpy(v) for k, v in arrays.items()}, torch.from_numpy(weights))
        for arrays, weights in batches(case)
    ]
    losses = []
    for number in range(STEPS):
        arrays, weights = given[number % BATCHES]
        logits = model(**arrays).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), arrays["input_ids"][:, 1:], reduction="none"
        )
        loss = (nll * weights[:, 1:]).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, TRAIN.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(case: published.Case, recipe: Recipe, folder: pathlib.Path):
    """Trains ours from the folder; the loss of every step, and theirs with what it learned."""
    stored = conversion.import_folder(folder, folder.with_name("model"))
    known = registry.family(stored.family)
    given = list(batches(case))
    model = known.fitted(checking.exact(stored.model), given[0][0])
    prepared = []
    for arrays, weights in given:
        prompts = known.inputs(model, stored.published, arrays)
        prepared.append(prompts.batch._replace(loss_weights=prompts.moved(weights)))
    config = c.Config(
        "parity",
        model,
        c.Data({"none": 1.0}, rows=len(prepared[0].tokens)),
        train=TRAIN,
        init=(c.Init(str(stored.path)),),
        adaptation=recipe.rules,
    )
    mesh = meshes.make(config.parallel, jax.devices()[:1])
    plan = adaptation.plan(params.abstract(config.model), config.adaptation)
    run, state = step.make_step(config, plan, mesh), states.create(config, plan, mesh)
    losses = []
    for number in range(STEPS):
        state, sums = run(state, step.place(prepared[number % BATCHES], mesh))
        losses.append(float(sums["loss"]))
    trained = dataclasses.replace(stored, trained=state.evaluated())
    conversion.export_folder(trained, folder.with_name("trained"))
    return losses, leaves(case.auto.from_pretrained(folder.with_name("trained")))


def leaves(model) -> dict[str, np.ndarray]:
    """What a model holds, by name."""
    return {name: leaf.detach().numpy().copy() for name, leaf in model.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
def test_losses_and_what_every_leaf_learned_are_theirs(name, tmp_path):
    case, recipe = published.CASES[name], RECIPES[name]
    model = published.make(case, seed=1)
    published.save(tmp_path / "source", model)
    start = leaves(model)
    wanted = theirs(case, recipe, model)
    after = leaves(model)
    losses, trained = ours(case, recipe, tmp_path / "source")
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    assert wanted[-1] < wanted[0]
    off = {}
    for leaf, before in start.items():
        moved = after[leaf] - before
        if any(part in leaf for part in recipe.dead):
            continue
        if not moved.any():
            np.testing.assert_array_equal(trained[leaf], before)
        else:
            gap = np.linalg.norm(trained[leaf] - after[leaf])
            off[leaf] = float(gap / np.linalg.norm(moved))
    assert off and not {leaf: size for leaf, size in off.items() if size > 1e-2}
