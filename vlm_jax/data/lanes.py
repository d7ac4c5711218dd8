"""Lanes: the parts of the stream that are packed each on its own.

Of L lanes, lane l packs documents l, l + L, l + 2 L ... into rows of its own. What it gives depends
on nothing else, so lanes can be dealt out to any number of hosts that divides L, and dealt out anew
when a run goes on with other hosts. A lane's position is a few numbers: those of the next document
and of the drawn ones that no row holds yet, which are made again on resume.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.config import Data
from vlm_jax.data import packing
from vlm_jax.data.documents import Document
from vlm_jax.data.packing import Shape
from vlm_jax.data.reading import Awaited
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
      ask: begins to make the lane's document n; what it returns waits for it.
      data: how documents are packed.
      shape: of the batch.
      position: where to begin.
      ahead: how many documents are asked for before they are needed.
      rejected: called with this lane's document wherever one cannot be used.
    """

    def __init__(
        self,
        ask: Callable[[int], Awaited],
        data: Data,
        shape: Shape,
        position: Position,
        ahead: int,
        rejected: Callable[[Document], None],
    ):
        self._ask, self._shape, self._pool = ask, shape, data.pool
        self._ahead, self._rejected = ahead, rejected
        self.next, self._asked = position.next, position.next
        self._coming: collections.deque[Awaited] = collections.deque()
        again = [(n, ask(n)) for n in position.pending]
        self._pending = [(n, wait()) for n, wait in again]
        self.bad = collections.deque(position.bad)

    @property
    def position(self) -> Position:
        """Where the lane stands after its last row."""
        return Position(self.next, tuple(n for n, _ in self._pending), tuple(self.bad))

    def row(self) -> list[Document]:
        """The documents of the next row: tops up the pending ones and takes a row's worth."""
        while len(self._pending) < self._pool:
            n, document = self._arrival()
            if document.rejects:
                self._note(n)
                self._rejected(document)
            if len(document):
                self._pending.append((n, document))
        held = [document for _, document in self._pending]
        chosen = packing.choose(held, self._shape.needs, *self._shape.room)
        for i in reversed(chosen):
            del self._pending[i]
        return [held[i] for i in chosen]

    def _arrival(self) -> tuple[int, Document]:
        while self._asked <= self.next + self._ahead:
            self._coming.append(self._ask(self._asked))
            self._asked += 1
        n, self.next = self.next, self.next + 1
        return n, self._coming.popleft()()

    def _note(self, n: int) -> None:
        self.bad.append(n)
        while self.bad[0] <= n - REJECT_WINDOW:
            self.bad.popleft()


def check_budget(lanes: Sequence[Lane], share: float, last: Document) -> None:
    """Ends the run where more of a host's last documents are bad than allowed.

    Args:
      lanes: of the host.
      share: of REJECT_WINDOW documents that may be bad.
      last: the newest of them, for the message.

    Raises:
      DataError: there are more.
    """
    window = -(-REJECT_WINDOW // len(lanes))
    bad = sum(n > lane.next - 1 - window for lane in lanes for n in lane.bad)
    allowed = min(share * REJECT_WINDOW, REJECT_WINDOW - 1)
    if bad > allowed:
        seen = min(sum(lane.next for lane in lanes), REJECT_WINDOW)
        raise DataError(
            f"{bad} of the last {seen} samples could not be used; config.data.bad_samples allows "
            f"{allowed:.0f} in {REJECT_WINDOW}. The last one is {last.key} "
            f"({', '.join(last.rejects)}); repair the data or allow more"
        )
