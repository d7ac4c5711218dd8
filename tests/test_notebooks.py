"""Notebooks are kept without outputs and run from the first cell to the last."""

import json
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_a_notebook_is_kept_without_outputs(notebook):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_a_notebook_runs_from_the_first_cell_to_the_last(notebook, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.delenv("XLA_FLAGS")  # a reader has neither simulated devices nor slow programs

    # A copy beside the sources: what the notebook writes under runs/ goes with the copy.
    for name in ("vlm_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    copy = pathlib.Path(shutil.copy(notebook, tmp_path / "notebooks"))
    contents = nbformat.read(copy, as_version=4)
    resources = {"metadata": {"path": str(copy.parent)}}
    nbclient.NotebookClient(contents, timeout=900, resources=resources).execute()
    shown = [o for c in contents.cells for o in c.get("outputs", []) if "data" in o]
    assert sum("image/png" in output["data"] for output in shown) == 2
