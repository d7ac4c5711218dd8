"""Filters: what the published rules keep, they keep."""

import pytest

from vlm_jax.data import filters
from vlm_jax.data.example import BadExample, Example, ImageRef, Turn
from vlm_jax.errors import ConfigError


def says(*answers):
    turns = [t for a in answers for t in (Turn("user", (ImageRef(0), "Q?")), Turn("assistant", a))]
    return Example("k", "s", (b"x",), tuple(turns))


def reason(example, limits):
    try:
        filters.check_text(example, limits)
    except BadExample as bad:
        return bad.reason
    return None


LOOP = "the cat sat on the mat and " * 6


@pytest.mark.parametrize(
    "row, text, expected",
    [
        ("none", "", None),
        ("datacomp_basic", "a cat", "too_few_words"),  # more than two words
        ("datacomp_basic", "a b c", "too_few_characters"),  # more than five characters
        ("datacomp_basic", "a b cd", None),
        ("laion_400m", "abcd", "too_few_characters"),
        ("laion_400m", "abcde", None),
        ("obelics", "one two three", "too_few_words"),
        ("obelics", "word " * 1001, "too_many_words"),
        ("obelics", LOOP, "repeats_itself"),
        ("obelics", "1.99 2.99 3.99 only today here", "too_few_letters"),
        ("obelics", "the quick brown fox jumps over the lazy dog", None),
    ],
)
def test_text_is_kept_as_the_rules_say(row, text, expected):
    assert reason(says((text,)), filters.FILTERS[row]) == expected


def test_the_text_is_all_that_the_assistant_says():
    assert reason(says(("two", " words"), ("more",)), filters.Limits(min_words=3)) is None
    assert reason(says(("two words",), ()), filters.Limits(min_words=3)) == "too_few_words"


def test_the_share_that_repeats_is_that_of_runs_of_five_words():
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    assert filters._repeated(words) == 0
    # 16 runs of 20 words, of which those at 0 to 5 come again at 10 to 15.
    assert filters._repeated([*words, *(w.upper() for w in words)]) == 12 / 16
    assert filters._repeated(words[:3]) == 0


@pytest.mark.parametrize(
    "row, height, width, size, expected",
    [
        ("datacomp_basic", 200, 600, 9, None),
        ("datacomp_basic", 199, 300, 9, "too_small"),
        ("datacomp_basic", 601, 200, 9, "too_narrow"),
        ("laion_400m", 10, 10, 4999, "too_few_bytes"),
        ("laion_400m", 10, 10, 5000, None),
        ("none", 1, 200, 1, None),
        ("none", 1, 201, 1, "too_narrow"),
    ],
)
def test_images_are_kept_as_the_rules_say(row, height, width, size, expected):
    try:
        filters.check_image(bytes(size), height, width, filters.FILTERS[row])
    except BadExample as bad:
        assert bad.reason == expected
    else:
        assert expected is None


def test_a_row_may_be_changed_but_not_into_no_number():
    assert filters.limits("datacomp_basic", min_side=50, max_aspect=None) == filters.Limits(
        50, 3.0, min_words=3, min_characters=6
    )
    with pytest.raises(ConfigError, match="datacomp_basic"):
        filters.limits("datacomp")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_aspect is"):
            filters.limits("none", max_aspect=value)
