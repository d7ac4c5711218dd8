"""Trains a model from a config; the same command again continues the run.

python -m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=500
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vlm_jax import doors
from vlm_jax.config import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Trains, scores and reports."""
    doors.no_arguments(argv)
    run(doors.config(_CONFIG), doors.folder(_WORKDIR.value), doors.smaller_variant(_CONFIG))


def run(config: Config, workdir: Path, smaller: str = "") -> None:
    """A whole run: the model, the same without images, the scores of both, the report.

    Args:
      config: the run.
      workdir: its folder.
      smaller: what to try where the devices cannot hold it.
    """
    from vlm_jax.evaluation import report
    from vlm_jax.evaluation.evaluator import Evaluator
    from vlm_jax.training import loop

    evaluator = Evaluator(config, workdir)
    state = loop.train(config, workdir, evaluator, smaller)
    text_only = None
    if config.eval.text_only_steps:
        text_only = train_text_only(config, workdir / "text_only")
    scores = evaluator.final(state.evaluated(), text_only)
    path = report.write(workdir)
    print(report.table(scores))
    print(f"report: {path}")


def train_text_only(config: Config, workdir: Path):
    """The baseline's parameters: the same config without images, at its best validation loss."""
    from vlm_jax.evaluation.evaluator import Evaluator
    from vlm_jax.evaluation.selection import Best
    from vlm_jax.training import loop

    config = text_only_config(config)
    best = Best(Evaluator(config, workdir), workdir / "best.npz")
    loop.train(config, workdir, best)
    return best.params()


def text_only_config(config: Config) -> Config:
    """The text-only baseline of a config: all else held equal, its own number of steps."""
    from vlm_jax.evaluation.evaluator import without_images

    steps, every = config.eval.text_only_steps, config.eval.text_only_every
    # A baseline shorter than the warm-up would be refused after the model has been trained.
    warmup = min(config.train.warmup_steps, steps // 4)
    return dataclasses.replace(
        without_images(config),
        name=f"{config.name}-text-only",
        train=dataclasses.replace(config.train, steps=steps, warmup_steps=warmup, bag_of_words=0.0),
        eval=dataclasses.replace(config.eval, every=every, splits=("validation",)),
    )


if __name__ == "__main__":
    doors.run(main)
