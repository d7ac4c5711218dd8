"""What an Example asks and what the right answer is, as text."""

from collections.abc import Iterable

from vlm_jax.data.example import Example, Turn


def text(turns: Iterable[Turn]) -> str:
    """The words of turns, images left out."""
    parts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
    return " ".join(part.strip() for part in parts if part.strip())


def reference(example: Example) -> str:
    """The right answer: the last reply."""
    return text(example.turns[-1:])


def cluster(example: Example) -> str:
    """What an example is a draw of: pictures of one concept are not independent."""
    return str(example.meta.get("concept", example.key))


def prompt(example: Example) -> str:
    """The words that the model is given."""
    return text(example.turns[:-1])
