"""The same models made afresh by transformers: in, compared, out, and loaded by it again."""

import dataclasses
import pathlib

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import published  # noqa: E402

from vlm_jax.weights import checking, conversion, store  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", published.CASES)
def test_transformers_loads_what_we_export_and_gives_the_same(name, tmp_path):
    case = published.CASES[name]
    model, inputs = published.make(case, seed=1), published.case_inputs(case, seed=1)
    published.save(tmp_path / "source", model)
    stored = conversion.import_folder(tmp_path / "source", tmp_path / "model")
    wanted = _outputs(case, model, inputs)[case.output]
    found = checking.run(stored, inputs)[case.output]
    assert goldens.relative_error(found, wanted, inputs) <= 1e-4

    # From the presets alone: of the config.json that came with the weights, only ids of tokens and
    # what is the host's matter.
    host = ("image_grid_pinpoints", *case.unsaid)
    ids = {k: v for k, v in stored.published.items() if "token" in k or k in host}
    bare = dataclasses.replace(stored, published=ids)
    conversion.export_folder(bare, tmp_path / "exported")
    loaded, report = case.auto.from_pretrained(
        tmp_path / "exported", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(_outputs(case, loaded.eval(), inputs)[case.output], wanted)
    conversion.import_folder(tmp_path / "exported", tmp_path / "again")
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "model")


def _outputs(case, model, inputs):
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        return {case.output: getattr(model(**given), case.output).numpy()}


def _bytes(folder: pathlib.Path) -> list[bytes]:
    paths = (folder / store.PARAMETERS, folder / store.CARRIED)
    return [path.read_bytes() for path in paths if path.exists()]
