"""What the recipes of published systems share; not a config itself.

Every figure of a recipe has its source in a comment: a section or table of the paper, or a file of
the authors' repository. "Unverified" are figures of papers and model cards whose text was not at
hand, only accounts of it; "ours" is what no source says. Shares of the authors' data are given in
words, since the data is not here.

Data, tokenizers and weights of those systems are not part of this repository: their configs read
the embedded pictures until `data.mixture`, `data.tokenizer` and `init` name others. Prompts are the
systems' own: their special tokens are added to the embedded tokenizer. A row holds one image, so
that a batch has as many samples as the recipe's; `data.images_per_row` packs several.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from vlm_jax import config as c
from vlm_jax import schema

MIXTURE = {"emoji:caption": 1.0, "emoji:choice": 1.0, "emoji:yes_no": 1.0}
ENCODERS = r"(encoder|extra_encoders/\d+)/.*"
DECODER = r"decoder/.*"
# With cross-attention, all of the decoder but its gated blocks and added tokens.
DECODER_ALONE = r"decoder/(?!cross/|added_).*"


def words(file: str, variant: str, *choices: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a variant such as "13b-align", one of each of `choices`.

    Args:
      file: name of the config, for the message.
      variant: words joined by "-"; the first of each choice may be left out.
      *choices: known words; "" stands for none.

    Raises:
      ValueError: there is no such variant.
    """
    for chosen in itertools.product(*choices):
        others = (w for w, known in zip(chosen, choices, strict=True) if w != known[0])
        if variant in (_joined(chosen), _joined(others)):
            return chosen
    known = ", ".join([*filter(None, variants(*choices)), "and local behind any of them"])
    raise ValueError(f"configs/{file}.py has no variant {variant!r}; it has: {known}")


def variants(*choices: tuple[str, ...]) -> list[str]:
    """All variants of these words."""
    return [_joined(chosen) for chosen in itertools.product(*choices)]


def _joined(chosen) -> str:
    return "-".join(word for word in chosen if word)


def system(name: str, model: c.Model, tokens: int, **data: Any):
    """A config of a published system: FSDP over all devices, AdamW as PyTorch has it.

    Betas of 0.9 and 0.999, 1e-8, and a norm of at most 1 are what transformers' Trainer does where
    a script says nothing (TrainingArguments), and `train` then says nothing either.
    """
    return c.default(
        name=name,
        model=model,
        data=c.Data(
            mixture=MIXTURE,
            tokens=tokens,
            pool=1024,
            threads=16,
            **{"images_per_row": 1, "template": "vicuna_v1"} | data,
        ),
        train=c.Train(b2=0.999),
        checkpoint=c.Checkpoint(every=500),
        eval=c.Eval(every=1000, kinds=("caption", "choice", "yes_no")),
        parallel=c.Parallel(data=1, fsdp=-1),
    )


def walk(get_config: Callable[[str], Any], name: str, **variants: str):
    """A config that walks variants of a file, by the names of its stages."""
    return c.in_stages(name, **{stage: get_config(said) for stage, said in variants.items()})


def put(config, **parts: Any) -> None:
    """Replaces parts of a config's model by presets."""
    replace(config.model, **parts)


def replace(section, **values: Any) -> None:
    """Replaces fields of a section of a config by dataclasses, of whatever type they were."""
    with section.ignore_type():
        for name, value in values.items():
            section[name] = schema.plain(value)


def captions(config, template: str = "plain") -> None:
    """Feeds images and captions without prompts, as first stages do."""
    config.data.template = template
    with config.unlocked():
        config.data.mixture = {"emoji:caption": 1.0}
    config.eval.kinds = ("caption",)


def freeze(config, *patterns: str, rules: tuple[c.Rule, ...] = c.FULL) -> None:
    """Freezes what the patterns match; the rules say how all else trains."""
    frozen = (c.Rule(pattern, mode="frozen") for pattern in patterns)
    config.adaptation = schema.plain((*frozen, *rules))


def adapt(config, *rules: c.Rule) -> None:
    """Trains by the rules, and freezes what they do not cover."""
    config.adaptation = schema.plain((*rules, c.Rule(".*", mode="frozen")))


def epochs(
    config, rows: int, samples: int, times: float = 1, warmup: float = 0.03, **train: Any
) -> None:
    """Sets batch, steps, a warm-up that is a share of them, and other fields of `train`.

    Both are rounded up as by transformers' Trainer: the last batch of an epoch is a smaller one.
    """
    steps = math.ceil(times * math.ceil(samples / rows))
    config.data.rows = rows
    config.train.update(steps=steps, warmup_steps=math.ceil(warmup * steps), **train)
