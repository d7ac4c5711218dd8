"""Being asked to stop: by a person, a scheduler, or the end of a preemptible machine."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Notes the first SIGINT or SIGTERM, for the loop to end after its step; a second one kills.

    Hosts of one run must stop at the same step. There jax's preemption service takes the SIGTERM of
    any host and names the step to all.
    """

    def __init__(self):
        self._asked = False
        self._before = {}

    def __enter__(self) -> "Interrupt":
        # Only the main thread may handle signals; several hosts leave SIGTERM to jax.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self, step: int) -> bool:
        """Whether the run is to stop after `step`."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _note(self, number: int, frame) -> None:
        self._asked = True
        signal.signal(number, self._before[number])
