"""CIDEr of Vedantam et al. 2015 (https://arxiv.org/abs/1411.5726), as COCO's server reports it.

That is the variant the paper calls CIDEr-D, without stemming: n-grams of length 1 to 4 weighted by
tf-idf, clipped cosine, a Gaussian penalty on the difference of lengths, times 10. What the field
quotes as "CIDEr" is this, from pycocoevalcap's class `Cider`; the tests hold the two equal.
"""

import collections
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LONGEST = 4  # n-grams
SIGMA = 6.0  # words, of the length penalty

Vector = dict[tuple[str, ...], float]

_WORD = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*|[#*%$€£+]")


def words(text: str) -> str:
    """Lower-case words with punctuation dropped, joined by spaces.

    Stands in for the Java tokenizer of COCO's server; they differ on rare punctuation only.
    """
    return " ".join(_WORD.findall(text.lower()))


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, " N"]:
    """CIDEr of each caption; the corpus score is their mean.

    Args:
      candidates: one caption per picture, words separated by spaces (see `words`).
      references: one or more captions per picture, likewise; they also give the document
        frequencies, so a score depends on the corpus it is computed with.

    Returns:
      One score per picture, 0 to 10.

    Raises:
      ValueError: the lists differ in length, or a picture has no reference.
    """
    if len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} captions but {len(references)} lists of references; "
            "expected one list per caption"
        )
    if not all(references):
        raise ValueError("a picture has no reference caption; expected at least one each")
    counted = [[_ngrams(reference) for reference in group] for group in references]
    frequency = collections.Counter(ngram for group in counted for ngram in set().union(*group))
    corpus = math.log(len(references)) if references else 0.0

    def weigh(counts: collections.Counter) -> list[Vector]:
        vectors: list[Vector] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            idf = corpus - math.log(max(1, frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        return vectors

    scores = np.zeros(len(candidates))
    for i, (candidate, group) in enumerate(zip(candidates, counted, strict=True)):
        vectors = weigh(_ngrams(candidate))
        for text, counts in zip(references[i], group, strict=True):
            gap = len(candidate.split()) - len(text.split())
            penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
            scores[i] += penalty * np.mean(
                [_clipped_cosine(a, b) for a, b in zip(vectors, weigh(counts), strict=True)]
            )
        scores[i] *= 10 / len(group)
    return scores


def _ngrams(text: str) -> collections.Counter:
    tokens = text.split()
    return collections.Counter(
        tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1)
    )


def _clipped_cosine(candidate: Vector, reference: Vector) -> float:
    """Cosine in which repeating a reference's n-gram earns nothing."""
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    if norms == 0:
        return 0.0
    shared = candidate.keys() & reference.keys()
    return sum(min(candidate[g], reference[g]) * reference[g] for g in shared) / norms
