"""In which order a source's examples come."""

import itertools

import numpy as np

from vlm_jax.data import emoji, order

GROUPS = [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]]


def epochs(views: int, count: int, seed: int = 3) -> list[list[int]]:
    at = order.by_groups(GROUPS, seed, views)
    length = sum(min(len(group), views) for group in GROUPS)
    return [[at(e * length + i) for i in range(length)] for e in range(count)]


def test_an_epoch_shows_random_members_of_every_group_side_by_side():
    for seen in epochs(views=2, count=20):
        assert len(set(seen)) == len(seen) == 7
        groups = [next(g for g, group in enumerate(GROUPS) if i in group) for i in seen]
        runs = [groups[0]] + [b for a, b in itertools.pairwise(groups) if a != b]
        assert sorted(runs) == [0, 1, 2, 3]


def test_epochs_differ_and_use_every_member():
    many = epochs(views=2, count=20)
    assert len({tuple(seen) for seen in many}) == 20
    counts = np.bincount([i for seen in many for i in seen])
    assert (counts[:3] == 20).all() and (counts[3:] > 2).all()


def test_any_position_can_be_read_alone():
    forwards = [i for seen in epochs(views=3, count=4) for i in seen]
    for position in (31, 2, 17, 30, 0):
        assert order.by_groups(GROUPS, 3, 3)(position) == forwards[position]
    assert [i for seen in epochs(views=3, count=4, seed=4) for i in seen] != forwards


def test_groups_of_the_embedded_pictures_are_one_concept_in_different_styles():
    source = emoji.EmojiSource("train", "caption")
    groups = source.groups()
    assert sorted(i for group in groups for i in group) == list(range(len(source)))
    for group in groups[::50]:
        facts = [source[i].meta for i in group]
        assert len({fact["concept"] for fact in facts}) == 1
        assert len({fact["style"] for fact in facts}) == len(group) <= 3
    # Two styles where the third is held out, three for the others.
    assert {len(group) for group in groups} == {2, 3}
