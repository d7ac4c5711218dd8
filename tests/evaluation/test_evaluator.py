import json

import numpy as np
import pytest
import small

from vlm_jax.data import heldout
from vlm_jax.evaluation import losses, report
from vlm_jax.evaluation.evaluator import Evaluator
from vlm_jax.evaluation.scores import Scores
from vlm_jax.evaluation.vision import Vision

SPLITS, KINDS = ("validation", "unseen_style"), ("caption", "choice")


@pytest.fixture(scope="module")
def config():
    return small.config(splits=SPLITS, kinds=KINDS, examples=5, final_examples=10)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run's folder after its final evaluation, and the scores."""
    workdir = tmp_path_factory.mktemp("run")
    other = small.parameters(seed=1)
    return workdir, Evaluator(config, workdir).final(small.parameters(), other, step=7)


def test_losses_on_the_way_have_agreed_names(config, tmp_path):
    scalars = Evaluator(config, tmp_path)(3, small.parameters())
    names = {f"eval/{split}/{kind}/loss" for split in SPLITS for kind in KINDS}
    assert set(scalars) == names | {f"eval/{split}/caption/gap" for split in SPLITS}
    assert all(np.isfinite(value) for value in scalars.values())


def test_losses_on_the_way_are_not_those_of_older_parameters(config, tmp_path):
    evaluator = Evaluator(config, tmp_path)
    evaluator(1, small.parameters())
    assert evaluator(2, small.parameters(seed=1)) == Evaluator(config, tmp_path)(
        2, small.parameters(seed=1)
    )


def test_a_model_without_images_has_losses_and_no_gap(config, tmp_path):
    scalars = Evaluator(small.blind(config), tmp_path)(3, small.parameters())
    assert set(scalars) == {f"eval/{split}/{kind}/loss" for split in SPLITS for kind in KINDS}


def test_where_no_other_picture_is_to_be_shown_there_is_no_gap(tmp_path):
    config = small.config(splits=("validation",), kinds=("caption",), examples=1, final_examples=1)
    evaluator = Evaluator(config, tmp_path)
    assert set(evaluator(3, small.parameters())) == {"eval/validation/caption/loss"}
    found = evaluator.final(small.parameters())
    assert {s.metric for s in found.rows} == {"exact", "cider", "loss"}


def test_every_score_stands_beside_its_baselines(run):
    _, scores = run
    systems = {s.system for s in scores.rows if (s.kind, s.metric) == ("caption", "exact")}
    pools = ("all", "other styles")
    assert systems == {"model", "text only", "majority"} | {
        f"pixels {pool}, {side} px" for pool in pools for side in (16, 32)
    }
    choice = {s.system for s in scores.rows if (s.kind, s.metric) == ("choice", "accuracy")}
    assert choice == {"model", "text only", "majority"}
    assert {s.system for s in scores.rows if s.metric == "loss"} == {"model", "text only"}
    assert {s.system for s in scores.rows if s.metric == "gap"} == {"model"}
    assert all(s.low <= s.value <= s.high for s in scores.rows)
    assert scores.step == 7 and scores.parameters == sum(
        leaf.size for leaf in small.parameters().values()
    )


def test_final_losses_are_those_of_all_final_examples(run, config):
    _, scores = run
    batches = heldout.eval_batches(config, "unseen_style", "choice", 10)
    expected = losses.total(losses.per_example(Vision(config, small.parameters()), batches))
    found = scores.find("unseen_style", "choice", "loss")
    assert found.value == pytest.approx(expected, rel=1e-5) and found.count == 10


def test_scores_and_samples_are_written(run):
    workdir, scores = run
    assert Scores.from_json((workdir / "scores.json").read_text()) == scores
    for split in SPLITS:
        rows = report.read_jsonl(workdir / "samples" / f"{split}-choice.jsonl")
        assert len(rows) == 10
        rights = np.mean([row["right"] for row in rows])
        assert rights == scores.find(split, "choice", "accuracy").value
        for row in rows:
            assert row["reference"] in row["prompt"]  # one of the options
            assert row["key"].startswith(f"emoji/choice/{split}/")
            assert (workdir / row["images"][0]).exists()


def test_attention_is_kept_with_the_picture_the_encoder_saw(run):
    workdir, _ = run
    rows = json.loads((workdir / "samples" / "attention.json").read_text())
    assert {row["split"] for row in rows} == set(SPLITS)
    assert np.array(rows[0]["maps"]).shape == (3, 16)
    assert (workdir / rows[0]["image"]).exists()


def test_the_report_of_a_run_shows_its_samples(run):
    workdir, _ = run
    page = report.write(workdir).read_text()
    row = report.read_jsonl(workdir / "samples" / "unseen_style-caption.jsonl")[0]
    assert row["reference"].replace("&", "&amp;") in page
    assert {"sheet.png", "attention.png"} <= {path.name for path in workdir.iterdir()}
