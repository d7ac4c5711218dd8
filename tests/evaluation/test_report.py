import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import StorageError
from vlm_jax.evaluation import figures, report, scores

SPLITS, KINDS = ("validation", "unseen_style"), ("caption", "yes_no")


def all_scores() -> scores.Scores:
    """A model that is better than the majority answer, worse than pixels, even with text alone."""
    rows = []
    for split in SPLITS:
        for kind, metric in (("caption", "exact"), ("yes_no", "accuracy")):
            systems = {
                "model": np.repeat([1.0, 0.0], [60, 40]),
                "text only": np.tile([1.0, 0.0, 1.0, 0.0, 1.0], 20),
                "majority": np.repeat([1.0, 0.0], [20, 80]),
                "pixels all, 16 px": np.repeat([1.0, 0.0], [65, 35]),
                "pixels all, 32 px": np.repeat([1.0, 0.0], [90, 10]),
            }
            labels = {"split": split, "kind": kind, "subset": "all"}
            rows += scores.compare(systems, range(100), metric=metric, **labels)
            nats = {"model": np.full(100, 2.0), "text only": np.full(100, 5.0)}
            tokens = np.full(100, 4.0)
            rows += scores.compare(nats, range(100), tokens, metric="loss", **labels)
    return scores.Scores("tiny & co", 300, 1_234_567, SPLITS, KINDS, tuple(rows))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of a run that never was."""
    folder = tmp_path_factory.mktemp("run")
    images = folder / "samples" / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(images / "one.png")
    (folder / "scores.json").write_text(all_scores().to_json())
    (folder / "config.json").write_text('{"name": "tiny", "seed": 0}')
    lines = [{"step": s, "loss": 8 / s} for s in range(1, 301, 10)]
    for split in SPLITS:
        held = (
            {f"eval/{split}/caption/loss": 9 / s, f"eval/{split}/caption/gap": s / 100}
            for s in (100, 200, 300)
        )
        lines += [{"step": 100 * i, **row} for i, row in enumerate(held, 1)]
        for kind in KINDS:
            rows = [
                {
                    "key": f"{split}-{i}",
                    "prompt": "is it <b>?",
                    "answer": "$5 <b>bill</b>" * i,
                    "reference": "dollar, \x12",
                    "right": i == 1,
                    "baselines": {},
                    "images": ["samples/images/one.png"],
                }
                for i in range(3)
            ]
            path = folder / "samples" / f"{split}-{kind}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    attended = {
        "split": "unseen_style",
        "image": "samples/images/one.png",
        "answer": "a",
        "reference": "a",
        "right": True,
        "grid": [4, 4],
        "maps": rng.random((5, 16)).tolist(),
    }
    (folder / "samples" / "attention.json").write_text(json.dumps([attended]))
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    return report.write(workdir).read_text()


def test_the_report_is_one_file_that_needs_nothing_else(page):
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)


def test_the_pngs_lie_beside_it(workdir, page):
    for name in ("curves.png", "sheet.png", "attention.png"):
        with Image.open(workdir / name) as image:
            assert min(image.size) > 100


def test_what_the_model_says_is_shown_as_it_said_it(page):
    assert "<b>bill" not in page
    assert html.escape("$5 <b>bill</b>", quote=False) in page
    assert "(nothing)" in page  # the empty answer


def test_the_stronger_pixels_stand_in_the_table_with_a_verdict():
    (line,) = [
        x
        for x in report.lines(all_scores())
        if (x.split, x.kind, x.metric) == ("unseen_style", "caption", "exact")
    ]
    model, text_only, majority, pixels, other = line.cells
    assert (model.value, model.verdict) == ("60.0", "")
    assert (pixels.value, pixels.verdict) == ("90.0", "worse")
    assert (majority.value, majority.verdict) == ("20.0", "better")
    assert (text_only.value, text_only.verdict) == ("60.0", "even")
    assert other.value == ""


def test_a_lower_loss_is_better():
    (line,) = [
        x
        for x in report.lines(all_scores())
        if (x.split, x.kind, x.metric) == ("unseen_style", "caption", "loss")
    ]
    assert [cell.value for cell in line.cells[:2]] == ["0.50", "1.25"]
    assert line.cells[1].verdict == "better" and line.cells[1].gain.startswith("-0.75")


def test_the_terminals_table_holds_every_split_and_kind():
    text = report.table(all_scores())
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    assert text.count("unseen style") == 4 and text.count("validation") == 4
    assert "60.0 (" in text and "90.0 ▼" in text and "20.0 ▲" in text


def test_a_run_without_scores_has_no_report(tmp_path):
    with pytest.raises(StorageError, match=r"no scores.json"):
        report.write(tmp_path)


def test_a_report_needs_scores_alone(tmp_path):
    (tmp_path / "scores.json").write_text(all_scores().to_json())
    assert "60.0" in report.write(tmp_path).read_text()


def test_a_step_that_a_continued_run_logged_twice_is_drawn_once():
    rows = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert report.series(rows, "loss") == ([1, 2], [3.0, 2.0])


def test_the_smoothed_curve_of_a_constant_is_that_constant():
    np.testing.assert_allclose(figures.smooth([2.0] * 50), 2.0)


def test_pointed_queries_come_first_and_look_at_different_places():
    spread = np.full((2, 2), 0.25)
    corner = np.array([[1.0, 0.0], [0.0, 0.0]])
    other = np.array([[0.0, 0.0], [0.1, 0.9]])
    assert figures.pointed(np.stack([spread, corner, corner, other]), 2) == [1, 3]
