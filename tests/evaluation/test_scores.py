import numpy as np
import pytest

from vlm_jax.evaluation import scores

LABELS = {"split": "unseen_style", "kind": "caption", "subset": "all", "metric": "exact"}


def test_exact_match_ignores_case_spaces_and_a_full_stop_only():
    answers = ["Red  Heart.", "flag: côte d’ivoire", "red hearts", "heart, red", "keycap: *"]
    references = ["red heart", "Flag: Côte d'Ivoire", "red heart", "red heart", "keycap: #"]
    assert scores.exact(answers, references).tolist() == [1, 1, 0, 0, 0]


def test_the_interval_covers_a_bernoullis_rate_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    rate, trials, covered = 0.4, 300, 0
    for _ in range(trials):
        right = (rng.random(120) < rate).astype(float)
        low, high = scores.interval(scores.resample(right[None], np.ones(120), range(120))[0])
        covered += low <= rate <= high
    # 0.95 +- 3.5 standard errors of 300 trials, and a little less for the percentile method.
    assert 0.90 <= covered / trials <= 0.995


def test_the_interval_of_a_mean_is_the_normal_one_for_many_examples():
    values = np.random.default_rng(1).normal(5.0, 2.0, 2000)
    low, high = scores.interval(scores.resample(values[None], np.ones(2000), range(2000))[0])
    width = 2 * 1.96 * values.std() / np.sqrt(2000)
    assert high - low == pytest.approx(width, rel=0.08)


def test_copies_of_one_concept_do_not_narrow_the_interval():
    right = (np.random.default_rng(2).random(100) < 0.5).astype(float)
    alone = scores.resample(right[None], np.ones(100), range(100))[0]
    copied = scores.resample(np.repeat(right, 3)[None], np.ones(300), np.repeat(range(100), 3))[0]
    np.testing.assert_allclose(copied, alone)


def test_systems_that_agree_on_most_examples_are_told_apart_by_the_paired_interval():
    rng = np.random.default_rng(3)
    baseline = (rng.random(300) < 0.5).astype(float)
    better = baseline.copy()
    better[np.flatnonzero(baseline == 0)[:12]] = 1
    model, other = scores.compare({"model": better, "base": baseline}, range(300), **LABELS)
    assert model.gain is None
    assert model.low < other.high  # the two intervals overlap
    assert other.gain == pytest.approx(12 / 300) and other.gain_low > 0


def test_losses_are_ratios_of_sums_not_means_of_ratios():
    nats, tokens = np.array([1.0, 10.0]), np.array([1.0, 4.0])
    (score,) = scores.compare({"model": nats}, range(2), tokens, **LABELS)
    assert score.value == pytest.approx(11 / 5)


def test_scores_come_back_from_json():
    rows = scores.compare({"model": np.ones(4), "base": np.zeros(4)}, range(4), **LABELS)
    before = scores.Scores("tiny", 10, 99, ("unseen_style",), ("caption",), tuple(rows))
    after = scores.Scores.from_json(before.to_json())
    assert after == before
    assert after.find("unseen_style", "caption", "exact", "base").gain == 1
    with pytest.raises(KeyError, match="'base'"):
        after.find("unseen_style", "caption", "exact", "nobody")
