"""Heads of a Q-Former whose queries and text are compared, as fields: BLIP-2's first stage."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Matching:
    """Heads by which a Q-Former's queries and text are compared, matched and generated from.

    The text is read by the Q-Former itself (Li et al. 2023, arXiv 2301.12597, section 3.2): it has
    the table of tokens, its rows of positions and feed-forward parts for text. A text begins with a
    token that stands for all of it, as BERT's [CLS] does.

    Attributes:
      length: tokens of a text, its first and last among them.
      out: width of the space in which each query and the first token are compared.
      temperature: what similarities are divided by at the start, as it is learned; 0 = they are not
        scaled.
      start: id that stands first in a text that is to be generated, instead of the first ([DEC]).
      generates: whether there is an output layer to generate texts with.
    """

    length: int = 32
    out: int = 256
    temperature: float = 0.07
    start: int = 30_522
    generates: bool = True
    kind: str = "matching"

    CHOICES: ClassVar = {"kind": ("matching",)}

    def problems(self, connector) -> Iterator[tuple[str, str]]:
        """Fields that contradict others, each with what was expected.

        Args:
          connector: the preset of the model's connector.
        """
        if getattr(connector, "kind", "") != "qformer" or not connector.vocab:
            yield "kind", "a Q-Former with a vocabulary as the connector"
            return
        if self.length > connector.positions:
            yield "length", f"at most the connector's {connector.positions} positions"
        if self.generates and not 0 <= self.start < connector.vocab:
            yield "start", f"an id below the connector's vocabulary {connector.vocab}"
        if self.temperature < 0:
            yield "temperature", "at least 0"


# BLIP-2's, over BERT's vocabulary with [DEC] (LAVIS, blip2_qformer.py).
BLIP2 = Matching()
