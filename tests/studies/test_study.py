"""A study: which cells are run, what is left alone, and the table."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from vlm_jax.errors import ConfigError, Interrupted, VlmError
from vlm_jax.parallel import devices
from vlm_jax.studies import cells, table

STUDY = textwrap.dedent("""
    from configs import tiny

    CELLS = {"causal": "causal", "prefix": "prefix"}

    def get_config(cell):
        config = tiny.get_config()
        config.data.attention = CELLS[cell]
        config.train.update(steps=4, warmup_steps=1, log_every=2)
        config.eval.update(every=0, examples=4, final_examples=4, text_only_steps=0)
        config.eval.update(splits=("validation",), kinds=("caption",))
        return config
""")


@pytest.fixture
def study(tmp_path):
    found = {}
    exec(STUDY, found)
    (tmp_path / "study.py").write_text(STUDY)
    return found


def called(codes, monkeypatch):
    """The cells that were run, which end with `codes` in turn."""
    found = []

    def call(command):
        found.append(command[-1].rpartition("/")[2])
        return codes[len(found) - 1]

    monkeypatch.setattr(cells, "_call", call)
    return found


def test_the_cells_that_are_wanted_are_run_in_order(study, tmp_path, monkeypatch):
    found = called([0, 0], monkeypatch)
    cells.run("study.py", cells.of(study, tmp_path))
    assert found == ["causal", "prefix"]
    assert [cell.name for cell in cells.of(study, tmp_path, ["prefix"])] == ["prefix"]
    with pytest.raises(ConfigError, match="no cell 'other'; it has: causal, prefix"):
        cells.of(study, tmp_path, ["other"])
    with pytest.raises(ConfigError, match="no CELLS"):
        cells.of({}, tmp_path)


def test_a_cell_that_fails_does_not_end_the_others_and_a_stop_does(study, tmp_path, monkeypatch):
    found = called([65, 0], monkeypatch)
    with pytest.raises(VlmError, match=r"causal \(exit code 65\)") as raised:
        cells.run("study.py", cells.of(study, tmp_path))
    assert found == ["causal", "prefix"] and raised.value.exit_code == 65
    found = called([75], monkeypatch)
    with pytest.raises(Interrupted, match="stopped in cell causal"):
        cells.run("study.py", cells.of(study, tmp_path))
    assert found == ["causal"]


@pytest.mark.slow
def test_a_study_runs_once_and_gives_its_table(study, tmp_path):
    def run():
        command = "-m", "vlm_jax.study", f"--config={tmp_path}/study.py", f"--workdir={tmp_path}/w"
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return (tmp_path / "w" / "table.md").read_text()

    text = run()
    assert text.startswith("### validation, caption\n\n| cell | trained | nats per token | exact")
    assert [line.split(" | ")[0] for line in text.splitlines()[4:6]] == ["| causal", "| prefix"]
    (row, other), scored = table.rows(cells.of(study, tmp_path / "w")), "w/causal/scores.json"
    rows = json.loads((tmp_path / scored).read_text())["rows"]
    losses = [r["value"] for r in rows if (r["metric"], r["system"]) == ("loss", "model")]
    assert [s.value for s in row.scores if s.metric == "loss"] == losses
    assert row.trained == other.trained > 0 and row.images > 4 and row.images_per_s > 0
    # A sandbox that stands in for the kernel may not know.
    assert row.peak_bytes < 2**34 and (row.peak_bytes > 2**27 or not devices.peak())
    before = [(tmp_path / "w" / c / "metrics.jsonl").stat().st_mtime_ns for c in study["CELLS"]]
    assert run() == text
    after = [(tmp_path / "w" / c / "metrics.jsonl").stat().st_mtime_ns for c in study["CELLS"]]
    assert before == after


def test_a_cell_is_told_once_of_a_signal_that_its_terminal_knows_of_too():
    waits = "import os, sys; sys.exit(os.getsid(0) != os.getpid())"
    assert cells._call((sys.executable, "-c", waits)) == 0


def test_a_second_signal_that_kills_a_cell_stops_the_study_too(tmp_path):
    begun = tmp_path / "begun"
    cell = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"

    def kill():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # no handler there: it dies of it

    killer = threading.Thread(target=kill)
    killer.start()
    assert cells._call((sys.executable, "-c", cell)) == Interrupted.exit_code
    killer.join()


def test_a_table_of_no_cells_is_written_where_nothing_is_yet(study, tmp_path):
    assert table.write(tmp_path / "new", cells.of(study, tmp_path / "new")) == ""
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == []
