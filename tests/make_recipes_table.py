"""Writes docs/recipes.md: what the configs of published systems resolve to.

PYTHONPATH=. python tests/make_recipes_table.py
"""

import collections
import importlib
import inspect
import pathlib

import systems

from vlm_jax import config as c
from vlm_jax.training import adaptation

TABLE = pathlib.Path(__file__).parents[1] / "docs" / "recipes.md"
INTRODUCTION = """# Recipes of published systems

What their configs resolve to: `PYTHONPATH=. python tests/make_recipes_table.py` writes this page,
and a test says when it is out of date. The source of every figure stands beside it in the config;
"unverified" are figures of papers and model cards whose text was not at hand, "ours" what no source
says. A batch is so many rows of so many tokens; where a row has room for several images, samples
are packed into it. A variant with `stages` has no row: it walks others. Parameters are those of a
row's first variant. AdamW's epsilon is 1e-8 but for mPLUG-Owl's first stage.
"""
COLUMNS = (
    *("variants", "trains, in millions", "batch", "tokens", "images", "pixels", "template"),
    *("rate", "schedule", "warm-up", "steps", "decay", "betas", "clip"),
)


def main() -> None:
    """Writes the page."""
    TABLE.write_text(page())


def page() -> str:
    """All of it."""
    return "\n".join((INTRODUCTION, *map(section, files())))


def files() -> list[str]:
    """Names of the configs with a section."""
    return list(dict.fromkeys(name.partition(":")[0] for name in systems.systems()))


def section(file: str) -> str:
    """What a config says of itself, and a table of its variants, like ones in one row."""
    alike = collections.defaultdict(list)
    for name in systems.systems():
        config = systems.config(name)
        if name.partition(":")[0] == file and not config.stages:
            alike[_data(config), _train(config), config.adaptation].append(name)
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    for (data, train, _), names in alike.items():
        config = systems.config(names[0])
        plan = adaptation.of(config)
        words = " ".join(f"`{name.partition(':')[2]}`" for name in names if name[-1] != ":")
        rates = _rates(config.train.lr, plan)
        table.append((words, _trained(config, plan), *data, rates, *train))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    about = inspect.cleandoc(importlib.import_module(f"configs.{file}").__doc__)
    return f"## configs/{file}.py\n\n{about}\n\n{lines}\n"


def _data(config: c.Config) -> tuple[str, ...]:
    data = config.data
    batch = f"{data.rows:,}", f"{data.tokens:,}", f"{data.images_per_row}"
    return (*batch, _pixels(config), data.template)


def _train(config: c.Config) -> tuple[str, ...]:
    train = config.train
    return (
        train.schedule + (f" to {train.end_lr:.3g}" if train.end_lr else ""),
        f"{train.warmup_steps:,}",
        f"{train.steps:,}",
        _number(train.weight_decay),
        f"{train.b1:g}, {train.b2:g}",
        f"{train.clip:g}",
    )


def _pixels(config: c.Config) -> str:
    """How large pictures are seen, how they are brought there, and what is random of it."""
    augment, seen = config.data.augment, {}
    for encoder in config.model.encoders:
        resize = encoder.resize
        seen[f"{resize.longest or resize.side or max(encoder.size)} {resize.mode}"] = None
    seen |= {"random crops": None} if augment.crop != (1.0, 1.0) else {}
    seen |= {"flips": None} if augment.flip else {}
    return ", ".join(seen)


def _rates(peak: float, plan: adaptation.Plan) -> str:
    """The peak rate, or those of all parts where some have another."""
    rates = collections.defaultdict(dict)
    for path, factor in plan.lr.items():
        depth = 2 if path.startswith("connector/") else 1
        rates[factor * peak]["/".join(path.split("/")[:depth])] = None
    if len(rates) == 1:
        return _number(peak)
    return "; ".join(f"{', '.join(found)}: {_number(rate)}" for rate, found in rates.items())


def _trained(config: c.Config, plan: adaptation.Plan) -> str:
    """What trains of each part, and how."""
    counts = collections.Counter()
    for path in plan.lr:
        mode = config.adaptation[plan.rule_of[path]].mode
        counts[path.split("/")[0], "" if mode == "full" else f" by {mode}"] += plan.shapes[
            path
        ].size
    return ", ".join(f"{part}{how} {_millions(size)}" for (part, how), size in counts.items())


def _millions(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e6 else f"{size / 1e6:.2g}"


def _number(value: float) -> str:
    """As the configs write it: 2e-5."""
    if not 0 < value < 1e-2:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


if __name__ == "__main__":
    main()
