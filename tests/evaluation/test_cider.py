import math
import random

import numpy as np
import pytest

from vlm_jax.evaluation.cider import cider, words


def test_two_pictures_by_hand():
    # "a" is in both references and weighs nothing; "dog" and "a dog" weigh log 2 in one of them.
    # Of n = 1 to 4 two cosines are 1 and two are empty: 10 * (1 + 1 + 0 + 0) / 4.
    np.testing.assert_allclose(cider(["a dog", "a dog"], [["a dog"], ["a cat"]]), [5, 0])


def test_repeating_a_word_is_clipped_and_its_length_penalised():
    # Unigrams: (2, clipped to 1) . 1 / (2 * 1) = 1/2; nothing else; one word too many.
    expected = 10 * (1 / 2) / 4 * math.exp(-1 / (2 * 6**2))
    np.testing.assert_allclose(cider(["dog dog", "cat"], [["dog"], ["cat"]])[0], expected)


def test_a_repeated_reference_of_four_words_scores_ten():
    captions = ["one two three four", "five six seven eight"]
    np.testing.assert_allclose(cider(captions, [[c] for c in captions]), [10, 10])


def test_words_keep_what_captions_are_told_apart_by():
    assert words("Flag: Côte d’Ivoire!") == "flag côte d’ivoire"
    assert words("keycap: #, twenty-one.") == "keycap # twenty-one"


def test_a_picture_without_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        cider(["a dog"], [[]])
    with pytest.raises(ValueError, match="1 captions but 2"):
        cider(["a dog"], [["a dog"], ["a cat"]])


@pytest.mark.slow
def test_it_is_pycocoevalcaps_cider():
    reference = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rng = random.Random(0)

    def sentence(shortest: int) -> str:
        return " ".join(f"w{rng.randrange(30)}" for _ in range(rng.randint(shortest, 9)))

    references = [[sentence(1) for _ in range(rng.randint(1, 5))] for _ in range(200)]
    # Half of the candidates repeat a reference; some say nothing.
    candidates = [rng.choice([rng.choice(group), sentence(0)]) for group in references]
    expected = reference.compute_score(
        dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    )[1]
    np.testing.assert_allclose(cider(candidates, references), expected, rtol=1e-9, atol=1e-12)
