"""Which source every document is drawn from."""

import collections
import dataclasses

import grain
import numpy as np
import pytest

from vlm_jax import config as c
from vlm_jax.config import MixtureStage
from vlm_jax.data import mixing, order
from vlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of which only the length is read."""

    length: int

    def __len__(self) -> int:
        return self.length

    def groups(self) -> list[list[int]]:
        return [[i] for i in range(self.length)]


def mixture(small, sizes: dict[str, int], **data) -> mixing.Mixture:
    return mixing.Mixture(small(**data), {name: Numbers(size) for name, size in sizes.items()})


def test_draws_are_those_of_grains_mix(small):
    sizes, weights = {"a": 7, "b": 40, "c": 13}, {"a": 0.3, "b": 5.0, "c": 1.7}
    found = mixture(small, sizes, mixture=weights)
    apart = [
        order.shuffled(Numbers(size), name, 7, 1)[0].map(lambda i, name=name: (name, i))
        for name, size in sizes.items()
    ]
    theirs = grain.MapDataset.mix(apart, list(weights.values()))
    for k in [*range(300), 10**9, 10**12 + 1]:
        assert found[k] == theirs[k]


def test_stages_go_on_in_every_source_where_the_last_one_stood(small):
    stages = (MixtureStage(50, {"b": 1.0, "c": 2.0}), MixtureStage(90, {"a": 1.0, "c": 1.0}))
    sizes = {"a": 23, "b": 11, "c": 9}
    found = mixture(small, sizes, mixture={"a": 3.0, "b": 1.0}, schedule=stages)
    drawn = [found[k] for k in range(400)]
    names = [{d.source for d in drawn[a:b]} for a, b in ((0, 50), (50, 90), (90, 400))]
    assert names == [{"a", "b"}, {"b", "c"}, {"a", "c"}]
    for name, size in sizes.items():
        indices = [d.index for d in drawn if d.source == name]
        for start in range(0, len(indices) - size, size):  # every epoch has every example once
            assert sorted(indices[start : start + size]) == list(range(size))
    for k in (1, 49, 50, 51, 90, 91, 400):
        came = collections.Counter(d.source for d in drawn[:k])
        assert found.epochs(k) == {name: came[name] / size for name, size in sizes.items()}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_grow_with_a_power_of_the_size(small, power):
    sizes = {"a": 100, "b": 400, "c": 2500}
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}
    found = mixture(small, sizes, mixture=weights, size_power=power)
    came = collections.Counter(found[k].source for k in range(20_000))
    expected = {name: weights[name] * size**power for name, size in sizes.items()}
    total = sum(expected.values())
    for name in sizes:  # proportions are rounded to hundredths of the smallest
        assert abs(came[name] / 20_000 - expected[name] / total) < 0.01 * expected[name] / total


def test_a_cap_keeps_the_same_random_examples_in_every_epoch(small):
    found = mixture(small, {"a": 500}, mixture={"a": 1.0}, caps={"a": 20})
    epochs = [[found[k].index for k in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert len(set(epochs[0])) == 20 and epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) != set(range(20))
    assert found.epochs(30) == {"a": 1.5}
    small_source = mixture(small, {"a": 5}, mixture={"a": 1.0}, caps={"a": 20})
    assert {small_source[k].index for k in range(5)} == set(range(5))


def test_a_cap_keeps_whole_groups(small):
    groups = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(50)]
    source = dataclasses.make_dataclass("Grouped", [], namespace={"groups": lambda _: groups})()
    indices, length = order.shuffled(source, "a", seed=1, views=2, cap=11)
    assert length == 10
    epochs = [{indices[k] // 3 for k in range(10 * e, 10 * e + 10)} for e in range(4)]
    assert all(epoch == epochs[0] and len(epoch) == 5 for epoch in epochs)


def test_counts_are_whole_and_near_their_shares():
    rng = np.random.default_rng(0)
    for _ in range(200):
        proportions = [int(p) for p in rng.integers(1, 1000, rng.integers(1, 7))]
        k = int(rng.integers(0, 10**6))
        found = mixing.counts(k, proportions)
        assert sum(found) == k
        exact = np.array(proportions) * k / sum(proportions)
        assert np.abs(np.array(found) - exact).max() < len(proportions)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schedule": (MixtureStage(0, {"a": 1.0}),)}, "starts above 0"),
        ({"schedule": (MixtureStage(5, {"a": 0.0}),)}, r"schedule\[0\].*positive weight"),
        ({"caps": {"b": 3}}, r"data\.caps\.b is 3; expected a source of a mixture: a"),
        ({"loss_weights": {"a": float("nan")}}, r"loss_weights\.a is nan"),
        ({"mixture": {"a": float("inf")}}, "finite"),
        ({"lanes": 2}, "lanes is 2; expected a divisor of data.rows, 3"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(small, data, message):
    with pytest.raises(ConfigError, match=message):
        c.check(small(**{"mixture": {"a": 1.0}, **data}))
