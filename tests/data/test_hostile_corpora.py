"""Corpora that mean harm cost little, end nothing and write nowhere but into their folder."""

import json
import subprocess
import sys
from pathlib import Path

import hostile_corpora
import pytest

ROOT = Path(__file__).parents[2]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """What each cost and said, measured in a process that has no more than it needs."""
    folder = tmp_path_factory.mktemp("corpora")
    command = [sys.executable, "-B", hostile_corpora.__file__, folder]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_none_crashes_hangs_or_costs_much(costs):
    _, found = costs
    assert found.keys() == hostile_corpora.CORPORA.keys()
    assert not {name: cost for name, cost in found.items() if cost["status"]}
    # Of both passes together, of files of up to 40 MB; seconds of the CPU.
    assert not {name: cost for name, cost in found.items() if cost["cpu"] > 2 * 2}
    assert not {name: cost for name, cost in found.items() if cost["memory"] > 100 * MEGABYTE}


def test_each_is_refused_or_its_records_are_by_reason(costs):
    for name, cost in costs[1].items():
        for job in ("validate", "run"):
            assert cost["said"][job], name


def test_nothing_is_written_beside_the_output(costs):
    folder, _ = costs
    for path in folder.iterdir():
        assert {p.name.partition(".")[0] for p in path.iterdir()} <= {"corpus", "out"}
    assert {p.name for p in folder.iterdir()} == {str(i) for i in range(len(costs[1]))}
