"""Trains a model from a config; the same command again continues the run.

python -m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=500

With a schedule "wsd" or "rsqrt", a branch decays from a checkpoint of another run's stable phase:

python -m vlm_jax.main --config=... --workdir=runs/half --branch_from=runs/whole --branch_at=500

A config with stages trains one after the other, each in a folder of its own (runs/llava/1-align,
runs/llava/2-tune); a single one's fields are changed by --stage:

python -m vlm_jax.main --config=configs/llava15.py:7b-stages --workdir=runs/llava \
  --stage=align.train.steps=100 --stage=tune.train.lr=1e-5
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vlm_jax import config as configs
from vlm_jax import doors
from vlm_jax.config import Config
from vlm_jax.errors import ConfigError, Interrupted

# Of doors that one process imports, as tests do, the last one's flag holds.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of configs/.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_BRANCH_FROM = flags.DEFINE_string("branch_from", None, "Folder of the run to branch off.")
_BRANCH_AT = flags.DEFINE_integer("branch_at", None, "Step to branch off at; it has a checkpoint.")
_STAGE = flags.DEFINE_multi_string(
    "stage", [], "Change of one stage: NAME.FIELD=VALUE; repeat.", allow_override=True
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Trains, scores and reports."""
    doors.no_arguments(argv)
    branch = asked_branch(_BRANCH_FROM.value, _BRANCH_AT.value)
    smaller = doors.smaller_variant(_CONFIG)
    config = configs.overridden(doors.config(_CONFIG), _STAGE.value)
    run(config, doors.folder(_WORKDIR.value), smaller, branch)


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
    """A whole run, of one stage or several.

    Args:
      config: the run.
      workdir: its folder.
      smaller: what to try where the devices cannot hold it.
      branch: the folder and the step of the run that it branches off; of a run in stages the last
        one branches, alone.

    Raises:
      ConfigError: the folder holds another run, or this one cannot be trained.
      Interrupted: it was asked to stop; its state is saved.
    """
    from vlm_jax.training import stages

    if config.stages and branch is not None:
        trunk = stages.of(config, branch[0])[-1]
        config, branch = trunk.config, (trunk.folder, branch[1])
    stages.check_folder(config, workdir)
    if config.stages:
        walk(config, workdir, smaller)
    else:
        run_stage(config, workdir, smaller, branch)


def walk(config: Config, workdir: Path, smaller: str = "") -> None:
    """Trains and scores stage after stage, each from the last; those that have ended are passed by.

    Raises:
      ConfigError: a stage could not be trained; none is then.
      Interrupted: it was asked to stop, within a stage or after one.
    """
    from vlm_jax.training import checkpoints, preflight, stages

    runs = stages.of(config, workdir)
    preflight.check(runs, smaller)
    checkpoints.write_config(workdir, config)
    for i, stage in enumerate(runs):
        if stage.ended:
            print(f"stage {stage.folder.name} has ended: {stage.folder / stages.REPORT}")
            continue
        print(f"stage {stage.folder.name}, {i + 1} of {len(runs)}")
        stopping = run_stage(stage.config, stage.folder, smaller)
        if stopping and i + 1 < len(runs):
            raise Interrupted(f"stopped after {stage.folder.name}; the same command goes on")


def run_stage(
    config: Config, workdir: Path, smaller: str = "", branch: tuple[Path, int] | None = None
) -> bool:
    """The model, the same without images, the scores of both, the report.

    Returns:
      Whether it was asked to stop while the scores were made, which were made all the same.
    """
    from vlm_jax.evaluation import report
    from vlm_jax.evaluation.evaluator import Evaluator
    from vlm_jax.training import branching, loop
    from vlm_jax.training.interrupt import Interrupt

    origin = None
    if branch is not None:
        origin = branching.Branch(*branch)
        config = branching.ended(config, origin)
    evaluator = Evaluator(config, workdir)
    state = loop.train(config, workdir, evaluator, smaller, origin)
    text_only = None
    if config.eval.text_only_steps:
        text_only = train_text_only(config, workdir / "text_only")
    with Interrupt() as interrupt:
        scores = evaluator.final(state.evaluated(), text_only)
        path = report.write(workdir)
        print(report.table(scores))
        print(f"report: {path}")
    return interrupt.asked(config.train.steps)


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
