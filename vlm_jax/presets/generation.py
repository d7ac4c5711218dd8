"""How a reply is chosen, token by token."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy by default; sampled above temperature 0, searched with more than one beam.

    Attributes:
      max_new_tokens: length limit of a reply; None = `eval.max_new_tokens`.
      min_new_tokens: the reply does not end before so many.
      temperature: what logits are divided by before a token is drawn; 0 = the most likely token.
      top_k: draws from so many of the most likely tokens; 0 = all.
      top_p: draws from the fewest tokens that have this probability together; 1 = all. What
        `top_k` left is renormalised before.
      beams: hypotheses that a beam search keeps per prompt; 1 = none.
      length_penalty: a hypothesis scores its log-probability divided by its length to this power:
        above 0 long ones gain, below 0 short ones.
      early_stopping: whether a prompt's search ends as soon as there are `beams` finished
        hypotheses; else when none that still runs scores better at its present length.
      stop: strings, or ids of tokens, that end a reply beside the template's own end; they are left
        out of it.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop: tuple[str | int, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that are out of range or contradict others, each with what was expected."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            yield "max_new_tokens", "at least 1"
        if self.min_new_tokens < 0:
            yield "min_new_tokens", "at least 0"
        if self.temperature < 0:
            yield "temperature", "at least 0"
        if self.top_k < 0:
            yield "top_k", "at least 0"
        if not 0 < self.top_p <= 1:
            yield "top_p", "more than 0 and at most 1"
        if self.beams < 1:
            yield "beams", "at least 1"
        if self.beams > 1 and self.temperature:
            yield "temperature", "0 with a beam search"
        if not self.temperature and (self.top_k or self.top_p < 1):
            yield "temperature", "more than 0 with top_k or top_p"
        if isinstance(self.stop, str) or "" in self.stop:
            yield "stop", "a tuple of ids and of strings that are not empty"
