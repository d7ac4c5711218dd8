"""Lanes: the parts of the stream that are packed each on its own.

Of L lanes, lane l packs documents l, l + L, l + 2 L ... into rows of its own. What it gives depends
on nothing else, so lanes can be dealt out to any number of hosts that divides L, and dealt out anew
when a run goes on with other hosts. A lane's position is a few numbers: those of the next document
and of the drawn ones that no row holds yet, which are made again on resume.
"""

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from vlm_jax.config import Data
from vlm_jax.data import packing
from vlm_jax.data.documents import Document
from vlm_jax.data.packing import Shape
from vlm_jax.data.reading import Coming
from vlm_jax.errors import DataError

REJECT_WINDOW = 10_000  # documents of a host over which the share of bad ones is taken


class Position(NamedTuple):
    """Where a lane stands; documents are counted within it.

    Attributes:
      next: the next document to draw.
      pending: drawn documents that no row holds yet, oldest first.
      bad: those of the last REJECT_WINDOW documents that could not be used.
    """

    next: int = 0
    pending: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"next": self.next, "pending": list(self.pending), "bad": list(self.bad)}

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> "Position":
        """What `plain` gave."""
        whole = lambda name: tuple(int(n) for n in state[name])  # noqa: E731
        return cls(int(state["next"]), whole("pending"), whole("bad"))


class Lane:
    """One lane, from a position on.

    Args:
      ask: begins to make the lane's document n.
      data: how documents are packed.
      shape: of the batch.
      position: where to begin.
      ahead: how many documents are asked for before they are needed.

    Attributes:
      position: where the lane stands after its last row, as far as its bad documents are known.
    """

    def __init__(
        self, ask: Callable[[int], Coming], data: Data, shape: Shape, position: Position, ahead: int
    ):
        self._ask, self._shape, self._pool, self._ahead = ask, shape, data.pool, ahead
        self._next = self._asked = position.next
        self._coming: collections.deque[Coming] = collections.deque()
        self._pending = [(n, ask(n)) for n in position.pending]
        self._bad = set(position.bad)

    @property
    def position(self) -> Position:
        return Position(self._next, tuple(n for n, _ in self._pending))

    def row(self, useless: Callable[[Document], None]) -> list[tuple[int, Coming]]:
        """The documents of the next row: tops up the pending ones and takes a row's worth.

        Args:
          useless: called with each that arrives and is of no use for any row.
        """
        while len(self._pending) < self._pool:
            n, document = self._arrival()
            if len(document.draft):
                self._pending.append((n, document))
            else:
                self.spoiled(n)
                useless(document.draft.words)
        held = [document.draft for _, document in self._pending]
        chosen = packing.choose(held, self._shape.needs, *self._shape.room)
        row = [self._pending[i] for i in chosen]
        for i in reversed(chosen):
            del self._pending[i]
        for _, document in row:
            document.begin()
        return row

    def spoiled(self, n: int) -> None:
        """Document n, which may have come long ago, turned out to be bad."""
        self._bad.add(n)

    def settled(self, position: Position) -> Position:
        """A position that it had or has, now with the bad documents before it."""
        window = range(position.next - REJECT_WINDOW, position.next)
        return position._replace(bad=tuple(sorted(n for n in self._bad if n in window)))

    def forget(self, position: Position) -> None:
        """Drops bad documents that are too old for this position; no earlier one is asked for."""
        self._bad = {n for n in self._bad if n >= position.next - REJECT_WINDOW}

    def _arrival(self) -> tuple[int, Coming]:
        while self._asked <= self._next + self._ahead:
            self._coming.append(self._ask(self._asked))
            self._asked += 1
        n, self._next = self._next, self._next + 1
        return n, self._coming.popleft()


def check_budget(positions: Collection[Position], share: float, last: Document) -> None:
    """Ends the run where more of a host's last documents are bad than allowed.

    Args:
      positions: of its lanes.
      share: of REJECT_WINDOW documents that may be bad.
      last: the newest of them, for the message.

    Raises:
      DataError: there are more.
    """
    window = -(-REJECT_WINDOW // len(positions))
    bad = sum(n > at.next - 1 - window for at in positions for n in at.bad)
    allowed = min(share * REJECT_WINDOW, REJECT_WINDOW - 1)
    if bad > allowed:
        seen = min(sum(at.next for at in positions), REJECT_WINDOW)
        raise DataError(
            f"{bad} of the last {seen} samples could not be used; config.data.bad_samples allows "
            f"{allowed:.0f} in {REJECT_WINDOW}. The last one is {last.key} "
            f"({', '.join(last.rejects)}); repair the data or allow more"
        )
