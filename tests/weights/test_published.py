"""Published folders in and out, against what transformers made of them (see make_published.py)."""

import json

import goldens
import numpy as np
import pytest

from vlm_jax.weights import checking, conversion, store


@pytest.mark.parametrize("name", goldens.names())
def test_an_imported_model_gives_what_transformers_gave_and_goes_out_as_it_came(name, tmp_path):
    golden = goldens.read(name)
    source = goldens.publish(golden, tmp_path / "source", shards=2)
    stored = conversion.import_folder(source, tmp_path / "model")

    wanted = golden.outputs
    found = checking.run(stored, golden.inputs, wanted.get("tokens", np.zeros((0, 0))).shape[1])
    for output in wanted.keys() - {"tokens", "beams"}:
        error = goldens.relative_error(found[output], wanted[output], golden.inputs)
        assert error <= 1e-4, f"{output} differs by {error}"
    if "tokens" in wanted:
        np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
        beams = checking.run(stored, golden.inputs, wanted["beams"].shape[1], beams=goldens.BEAMS)
        np.testing.assert_array_equal(beams["tokens"], wanted["beams"])

    conversion.export_folder(stored, tmp_path / "exported")
    again = conversion.import_folder(tmp_path / "exported", tmp_path / "again")
    assert again.model == stored.model
    for file in (store.PARAMETERS, store.CARRIED):
        first, second = tmp_path / "model" / file, tmp_path / "again" / file
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert {key: config.get(key) for key in golden.config} == golden.config
