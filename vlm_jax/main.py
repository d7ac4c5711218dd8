"""Trains a model from a config; the same command again continues the run.

python -m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=500

With a schedule "wsd" or "rsqrt", a branch decays from a checkpoint of another run's stable phase:

python -m vlm_jax.main --config=... --workdir=runs/half --branch_from=runs/whole --branch_at=500
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vlm_jax import doors
from vlm_jax.config import Config
from vlm_jax.errors import ConfigError

# Of doors that one process imports, as tests do, the last one's flag holds.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of configs/.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_BRANCH_FROM = flags.DEFINE_string("branch_from", None, "Folder of the run to branch off.")
_BRANCH_AT = flags.DEFINE_integer("branch_at", None, "Step to branch off at; it has a checkpoint.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Trains, scores and reports."""
    doors.no_arguments(argv)
    branch = asked_branch(_BRANCH_FROM.value, _BRANCH_AT.value)
    smaller = doors.smaller_variant(_CONFIG)
    run(doors.config(_CONFIG), doors.folder(_WORKDIR.value), smaller, branch)


def asked_branch(trunk: str | None, step: int | None) -> tuple[Path, int] | None:
    """The run and the step that the flags say to branch off at, if any.

    Raises:
      ConfigError: one flag is missing, or the step is none.
    """
    if trunk is None and step is None:
        return None
    if trunk is None or step is None or step < 1:
        raise ConfigError(
            f"--branch_from is {trunk} and --branch_at {step}; expected a run's folder and a step "
            "of which it has a checkpoint"
        )
    return doors.folder(trunk), step


def run(
    config: Config, workdir: Path, smaller: str = "", branch: tuple[Path, int] | None = None
) -> None:
    """A whole run: the model, the same without images, the scores of both, the report.

    Args:
      config: the run.
      workdir: its folder.
      smaller: what to try where the devices cannot hold it.
      branch: the folder and the step of the run that it branches off.
    """
    from vlm_jax.evaluation import report
    from vlm_jax.evaluation.evaluator import Evaluator
    from vlm_jax.training import branching, loop

    origin = None
    if branch is not None:
        origin = branching.Branch(*branch)
        config = branching.ended(config, origin)
    evaluator = Evaluator(config, workdir)
    state = loop.train(config, workdir, evaluator, smaller, origin)
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
    decay = min(config.train.decay_steps, steps - warmup)
    return dataclasses.replace(
        without_images(config),
        name=f"{config.name}-text-only",
        train=dataclasses.replace(
            config.train, steps=steps, warmup_steps=warmup, decay_steps=decay, bag_of_words=0.0
        ),
        eval=dataclasses.replace(config.eval, every=every, splits=("validation",)),
    )


if __name__ == "__main__":
    doors.run(main)
