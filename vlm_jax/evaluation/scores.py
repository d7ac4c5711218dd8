"""From answers to scores: what counts as right, and 95 % intervals by bootstrap.

A score is a mean over examples, or a ratio of sums (nats per answer token). Its interval resamples
*clusters* of examples, not examples: three pictures of one held-out concept are not three
independent draws. Systems that answered the same examples are compared on the same resamples.
"""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vlm_jax.evaluation import cider

RESAMPLES = 2000
MODEL = "model"  # the system that all others are compared with

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of the table.

    Attributes:
      split, kind: the examples.
      subset: "all", or "no flags" where some examples are flags.
      metric: "exact", "cider", "accuracy" (shares of 1, CIDEr of 10), "loss" or "gap" (nats per
        answer token).
      system: "model" or the name of a baseline.
      value, low, high: the figure and its 95 % interval.
      count: examples.
      gain, gain_low, gain_high: the model's figure minus this system's, with a paired 95 %
        interval; None for the model itself.
    """

    split: str
    kind: str
    subset: str
    metric: str
    system: str
    value: float
    low: float
    high: float
    count: int
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """All figures of an evaluated model.

    Attributes:
      name: of the config.
      step: optimizer steps done.
      parameters: how many the model has.
      splits, kinds: what was scored, in the order of the config.
      rows: the figures.
    """

    name: str
    step: int
    parameters: int
    splits: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[Score, ...]

    def find(
        self, split: str, kind: str, metric: str, system: str = MODEL, subset: str = "all"
    ) -> Score:
        """One figure.

        Raises:
          KeyError: it was not measured; lists the systems that were.
        """
        place = [s for s in self.rows if (s.split, s.kind, s.metric) == (split, kind, metric)]
        for score in place:
            if (score.system, score.subset) == (system, subset):
                return score
        raise KeyError(
            f"no {metric} of {system!r} on {subset} {split} {kind} examples; "
            f"there are {sorted({(s.system, s.subset) for s in place})}"
        )

    def to_json(self) -> str:
        """What scores.json holds."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """The scores that `to_json` wrote."""
        fields = json.loads(text)
        rows = tuple(Score(**row) for row in fields.pop("rows"))
        lists = {name: tuple(fields.pop(name)) for name in ("splits", "kinds")}
        return cls(**fields, **lists, rows=rows)


def normalize(text: str) -> str:
    """A text as exact match compares it: without case, extra spaces and a final full stop."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold()
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip()


def exact(answers: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """1 where an answer equals its reference once normalised, else 0."""
    pairs = zip(answers, references, strict=True)
    return np.array([float(normalize(a) == normalize(r)) for a, r in pairs])


def cider_of(answers: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """CIDEr of each answer, the references being the corpus."""
    return cider.cider([cider.words(a) for a in answers], [[cider.words(r)] for r in references])


def metrics_of(kind: str) -> tuple[str, ...]:
    """The metrics of a kind's answers: captions are free text, all others have one right answer."""
    return ("exact", "cider") if kind == "caption" else ("accuracy",)


METRICS = {"exact": exact, "cider": cider_of, "accuracy": exact}


def resample(
    values: Float[np.ndarray, "S N"],
    weights: Float[np.ndarray, " N"],
    clusters: Sequence[Hashable],
    seed: int = 0,
) -> Float[np.ndarray, "S R"]:
    """Weighted means of each system over the same bootstrap resamples of clusters.

    Args:
      values: sums per example (a loss in nats, a right answer); one row per system.
      weights: what the sums are divided by (answer tokens, or ones).
      clusters: the cluster of each example.
      seed: of the resamples.
    """
    _, index = np.unique(np.array([str(c) for c in clusters]), return_inverse=True)
    count = index.max() + 1
    stacked = np.stack([np.bincount(index, row, count) for row in (*values, weights)], axis=1)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    # How often each resample drew each cluster: one matrix product then does every system.
    flat = draws + count * np.arange(RESAMPLES)[:, None]
    times = np.bincount(flat.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count)
    sums = times.astype(np.float64) @ stacked
    return (sums[:, :-1] / np.maximum(sums[:, -1:], 1e-12)).T


def interval(samples: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The percentile interval of 95 %."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def compare(
    systems: Mapping[str, Float[np.ndarray, " N"]],
    clusters: Sequence[Hashable],
    weights: Float[np.ndarray, " N"] | None = None,
    **labels: str,
) -> list[Score]:
    """Scores of every system on the same examples, with the model's gain over each.

    Args:
      systems: sums per example by system name; `MODEL` is what the others are compared with.
      clusters: the cluster of each example.
      weights: what the sums are divided by; ones by default.
      **labels: split, kind, subset and metric of the scores.
    """
    values = np.stack([np.asarray(v, np.float64) for v in systems.values()])
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, np.float64)
    means = values.sum(1) / weights.sum()
    samples = resample(values, weights, clusters)
    model = list(systems).index(MODEL)
    scores = []
    for i, system in enumerate(systems):
        low, high = interval(samples[i])
        gain = (None, None, None)
        if i != model:
            gain = (float(means[model] - means[i]), *interval(samples[model] - samples[i]))
        scores.append(
            Score(
                **labels,
                system=system,
                value=float(means[i]),
                low=low,
                high=high,
                count=values.shape[1],
                gain=gain[0],
                gain_low=gain[1],
                gain_high=gain[2],
            )
        )
    return scores
