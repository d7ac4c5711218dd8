"""LoRA and DoRA as the peft library trains them: stored goldens, and the same made afresh."""

import pathlib

import adapter_cases
import numpy as np
import pytest

from vlm_jax.models import adapters, params
from vlm_jax.presets.generation import Generation
from vlm_jax.weights import checking, peft, store
from vlm_jax.weights.registry import family

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", adapter_cases.CASES)
def test_twenty_steps_are_those_of_peft(name, tmp_path):
    arrays = np.load(FOLDER / f"adapters_{name}.npz")
    adapter_cases.compare(adapter_cases.ours(name, arrays, tmp_path), arrays, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", adapter_cases.CASES)
def test_adapters_come_from_peft_and_go_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    import adapter_theirs

    arrays = adapter_theirs.make(name)
    made = adapter_cases.ours(name, arrays, tmp_path)
    adapter_cases.compare(made, arrays, TOLERANCE)

    tower, _, mode = name.partition("_")
    plain = adapter_theirs.base(name)
    if mode == "nf4":
        adapter_theirs.through_nf4(plain)
    if mode == "projected":  # PEFT's file has what it makes
        adapter_cases.written(tmp_path / "after", made.stored, made.leaves)
    loaded = theirs.PeftModel.from_pretrained(plain, tmp_path / "after")
    with torch.no_grad():
        wanted = merged = adapter_theirs.run(loaded, tower, arrays["inputs"]).numpy()
        if mode not in ("prefix", "projected"):
            merged = adapter_theirs.run(loaded.merge_and_unload(), tower, arrays["inputs"]).numpy()
    assert np.abs(wanted - arrays["output"]).max() > 0.01
    model = checking.exact(made.stored.model)
    ours = [made.leaves]
    if mode not in ("prefix", "projected"):
        ours.append(adapters.merged(params.restored(model, made.leaves)))
    for leaves in ours:
        run = adapter_cases._forward(name, made.stored, model, arrays["inputs"])
        for output in (wanted, merged):
            error = np.abs(np.asarray(run(leaves)) - output).max() / np.abs(output).max()
            assert error <= TOLERANCE
    if mode in ("prefix", "projected"):
        tokens = torch.from_numpy(arrays["inputs"])
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6}
        theirs_say = loaded.generate(input_ids=tokens, do_sample=False, **options).numpy()
        asked = {"input_ids": arrays["inputs"]}
        prompts = family("llama").inputs(model, made.stored.published, asked)
        found = checking._answers(model, made.leaves, prompts, Generation(max_new_tokens=6))
        np.testing.assert_array_equal(found["tokens"], theirs_say[:, tokens.shape[1] :])
    again = peft.read(tmp_path / "after", made.stored.model, made.stored.family)
    for path, leaf in again.items():
        if mode != "projected":
            np.testing.assert_array_equal(leaf, made.leaves[path])
    assert store.is_model(tmp_path / "model")
