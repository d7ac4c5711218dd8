"""Filling a row that has room for tokens, images and patches.

Tokens and patches count alike, each as a share of the row's; images only have to fit. Which set is
best of all is a knapsack of several dimensions, too many to solve for every row, so this is a
search with bounds: what it leaves empty is measured by `benchmarks/packing.py`. It adds, multiplies
and compares element by element, so that every machine finds the same set.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

TOKENS, IMAGES, PATCHES = range(3)

STATES = 4  # how far back from its end the greedy row is completed anew
WAITING = 64  # oldest documents whose sets of three complete it


def chosen(sizes: Sequence[tuple[int, int, int]], room: Sequence[int]) -> list[int]:
    """Which documents fill the row, ascending; the first is always among them.

    A greedy row takes, as long as one fits, the document whose needs of tokens and patches are
    nearest in direction to what is left of them (Panigrahy et al. 2011, "Heuristics for vector bin
    packing"). Then its last few documents are taken back one by one, and each time the best of all
    sets of up to three of the oldest that fit completes the row. The fullest of these rows wins.

    Args:
      sizes: tokens, images and patches of each document; the first fits.
      room: those of the row.
    """
    needs, row = np.asarray(sizes, np.int64), np.asarray(room, np.int64)
    greedy = _greedy(needs, row)
    starts = range(max(1, len(greedy) - STATES), len(greedy) + 1)
    found = [_completed(greedy[:start], needs, row) for start in starts]
    best = max(found, key=lambda those: int(_filled(needs[those].sum(axis=0), row)))
    return sorted(best)


def _filled(needs: Int[np.ndarray, "... 3"], row: Int[np.ndarray, " 3"]) -> Int[np.ndarray, "..."]:
    """Shares of the row's tokens and patches together, times both of these numbers."""
    return needs[..., TOKENS] * row[PATCHES] + needs[..., PATCHES] * row[TOKENS]


def _greedy(needs: Int[np.ndarray, "n 3"], row: Int[np.ndarray, " 3"]) -> list[int]:
    """The first document, and one after another what points most nearly to the room left."""
    taken, left = [0], row - needs[0]
    shares = needs[:, (TOKENS, PATCHES)] / row[[TOKENS, PATCHES]]
    length = np.sqrt(shares[:, 0] * shares[:, 0] + shares[:, 1] * shares[:, 1])
    free = np.arange(len(needs)) > 0
    while (fits := free & (needs <= left).all(axis=1)).any():
        tokens, patches = left[[TOKENS, PATCHES]] / row[[TOKENS, PATCHES]]
        along = (shares[:, 0] * tokens + shares[:, 1] * patches) / np.maximum(length, 1e-9)
        nearest = int(np.where(fits, along, -1.0).argmax())
        taken.append(nearest)
        free[nearest] = False
        left = left - needs[nearest]
    return taken


def _completed(
    taken: list[int], needs: Int[np.ndarray, "n 3"], row: Int[np.ndarray, " 3"]
) -> list[int]:
    """What was taken and the set of up to three others that fills the row best."""
    left = row - needs[taken].sum(axis=0)
    fits = (needs <= left).all(axis=1)
    fits[taken] = False
    waiting = np.flatnonzero(fits)[:WAITING]
    # One more that needs nothing stands for fewer than three.
    those = np.concatenate([needs[waiting], np.zeros((1, 3), np.int64)])
    sets = _sets(len(waiting))
    tokens, images, patches = (need[sets].sum(axis=0) for need in those.T.copy())
    fits = (tokens <= left[TOKENS]) & (images <= left[IMAGES]) & (patches <= left[PATCHES])
    filled = tokens * row[PATCHES] + patches * row[TOKENS]
    best = int(np.where(fits, filled, -1).argmax())
    return taken + [int(waiting[i]) for i in sets[:, best] if i < len(waiting)]


@functools.cache
def _sets(count: int) -> Int[np.ndarray, "3 sets"]:
    """All sets of up to three of so many, `count` itself standing for none."""
    first, second, third = np.indices((count + 1,) * 3).reshape(3, -1)
    ascending = (first < second) | (second == count)
    kept = ascending & ((second < third) | (third == count)) & (first <= second)
    return np.stack([first, second, third])[:, kept]
