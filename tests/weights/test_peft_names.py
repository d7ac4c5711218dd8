"""Adapters of published systems in PEFT's format: names, whole modules, and the way back."""

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")

import published  # noqa: E402

from vlm_jax.config import Config, Data, Rule  # noqa: E402
from vlm_jax.models import adapters  # noqa: E402
from vlm_jax.presets.generation import Generation  # noqa: E402
from vlm_jax.training import adaptation  # noqa: E402
from vlm_jax.weights import checking, conversion, files, peft, store  # noqa: E402
from vlm_jax.weights.registry import family  # noqa: E402

pytestmark = pytest.mark.slow

# Adapted kernels and what trains as a whole, by the case of `published`.
SYSTEMS = {
    "llama": (r"decoder/.*", r"decoder/norm/.*"),
    "siglip_vision": (r"encoder/stack/.*", r"encoder/norm/.*"),
    "clip_vision": (r"encoder/stack/.*", r"nothing"),
    "llava": (r"(encoder|decoder)/stack/.*", r"connector/.*"),
    "paligemma": (r"decoder/.*", r"connector/.*"),
    "idefics2": (r"(encoder|decoder|connector)/stack/.*", r"connector/embed_mlp/.*"),
    "idefics3": (r"(encoder|decoder)/stack/.*", r"connector/.*"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_peft_loads_our_adapters_and_gives_the_same(name, tmp_path):
    case = published.CASES[name]
    module, inputs = published.make(case, seed=1), published.case_inputs(case, seed=1)
    published.save(tmp_path / "source", module)
    stored = conversion.import_folder(tmp_path / "source", tmp_path / "model")
    adapted, whole = SYSTEMS[name]
    rules = (Rule(adapted, "lora", rank=2, alpha=3.0), Rule(whole), Rule(".*", "frozen"))
    rules = tuple(rule for rule in rules if rule.pattern != "nothing")
    plan = adaptation.of(Config("x", stored.model, Data({"none": 1.0}), adaptation=rules))
    rng = np.random.default_rng(2)
    leaves = {path: stored.parameters.read(path) for path in stored.parameters.shapes}
    for path, shape in plan.shapes.items():
        if plan.trains(path):
            leaves[path] = 0.3 * rng.normal(size=shape.shape).astype(np.float32)
        elif adapters.is_leaf(path):
            leaves[path] = np.full(shape.shape, 1.5, np.float32)
    trained = [path for path in plan.lr if not adapters.is_leaf(path)]
    peft.write(tmp_path / "adapter", stored.model, stored.family, leaves, trained)

    merged = {path: np.asarray(leaf) for path, leaf in adapters.merged(leaves).items()}
    files.write(stored.path / store.PARAMETERS, merged, lambda path: [merged[path]])
    ours = checking.run(stored, inputs)[case.output]
    loaded = peft_library.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    given = {key: torch.from_numpy(array) for key, array in inputs.items()}
    with torch.no_grad():
        wanted = getattr(loaded(**given), case.output).numpy()
    assert goldens.relative_error(ours, wanted, inputs) <= 1e-4

    loaded.save_pretrained(tmp_path / "theirs")
    again = peft.read(tmp_path / "theirs", stored.model, stored.family)
    assert {path for path in plan.lr if adapters.is_leaf(path)} <= again.keys()
    assert set(trained) <= again.keys()
    for path, leaf in again.items():
        np.testing.assert_array_equal(leaf, leaves[path])


def test_peft_gives_a_whole_system_our_prefix(tmp_path):
    """Positions as `generate` counts them; else their padding would lie between prefix and text."""
    case = published.CASES["llava"]
    module, inputs = published.make(case, seed=1), published.case_inputs(case, seed=1)
    published.save(tmp_path / "source", module)
    stored = conversion.import_folder(tmp_path / "source", tmp_path / "model")
    rules = Rule(r"decoder/.*", "prefix", rank=3), Rule(".*", "frozen")
    plan = adaptation.of(Config("x", stored.model, Data({"none": 1.0}), adaptation=rules))
    rng = np.random.default_rng(2)
    leaves = {path: stored.parameters.read(path) for path in stored.parameters.shapes}
    for path in plan.lr:
        leaves[path] = rng.normal(size=plan.shapes[path].shape).astype(np.float32)
    peft.write(tmp_path / "prefix", stored.model, stored.family, leaves)
    prompts = family(stored.family).inputs(stored.model, stored.published, inputs)
    model = checking.exact(stored.model)
    ours = checking._answers(model, leaves, prompts, Generation(max_new_tokens=0))["logits"]

    loaded = peft_library.PeftModel.from_pretrained(module, tmp_path / "prefix").eval()
    there = inputs["attention_mask"]
    given = {key: torch.from_numpy(array) for key, array in inputs.items()}
    given["position_ids"] = torch.from_numpy(np.maximum(there.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        theirs = loaded(**given).logits.numpy()
    np.testing.assert_allclose(ours[there > 0], theirs[there > 0], rtol=1e-4, atol=1e-4)
