"""How a run is doing, on the terminal: a live line where it is one, plain lines where not."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text


class Meter:
    """Speeds over the steps since the last reading, and the time left.

    Args:
      steps: of the whole run.
      clock: seconds, of which only differences matter.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter):
        self._steps, self._clock = steps, clock
        self._seconds = self._counted = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last reading: it went to compiling, evaluating or saving."""
        self._start = self._clock()
        self._window = {"steps": 0, "tokens": 0, "images": 0}

    def add(self, line: Mapping[str, Any]) -> None:
        """Counts a step."""
        for name in ("tokens", "images"):
            self._window[name] += line[name]
        self._window["steps"] += 1

    def read(self, step: int) -> dict[str, float]:
        """tokens and images per second, seconds per step and seconds left; empty without steps."""
        window, seconds = self._window, self._clock() - self._start
        if not window["steps"] or seconds <= 0:
            return {}
        self._seconds, self._counted = self._seconds + seconds, self._counted + window["steps"]
        self.restart()
        return {
            "tokens_per_s": window["tokens"] / seconds,
            "images_per_s": window["images"] / seconds,
            "step_s": seconds / window["steps"],
            "left_s": (self._steps - step) * self._seconds / self._counted,
        }


class Progress:
    """Shows lines of metrics on the first host's terminal.

    Args:
      steps: of the whole run.
      console: where to; tests give their own.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self._steps = steps
        self._console = console or Console()
        self._quiet = jax.process_index() > 0
        self._live = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, line: Mapping[str, Any]) -> None:
        """Shows a training step: replaces the live line, or prints one."""
        text = describe(line, self._steps)
        if self._live is not None:
            self._live.update(Text(text), refresh=True)
        else:
            self.say(text)

    def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows held-out figures; these stay."""
        figures = "  ".join(f"{name} {value:.3f}" for name, value in scalars.items())
        self.say(f"step {step}  {figures}")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)


def describe(line: Mapping[str, Any], steps: int) -> str:
    """A step for people."""
    loss = f"loss {line['loss']:.4f}" if "loss" in line else "loss -"
    parts = [f"step {line['step']}/{steps}", loss]
    speeds = line.get("time")
    if speeds:
        parts += [
            f"{speeds['tokens_per_s']:,.0f} tokens/s",
            f"{speeds['images_per_s']:,.1f} images/s",
        ]
    parts.append(f"padding {line['padding']:.1%}")
    if speeds:
        parts.append(f"{duration(speeds['left_s'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: "1:02:03", or "2:03" below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
