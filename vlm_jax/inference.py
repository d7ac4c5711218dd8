"""A trained run as an object that generates: `vlm_jax.load(workdir).generate(images, prompts)`."""

import os

from vlm_jax.evaluation.predictor import Predictor
from vlm_jax.training import checkpoints


def load(workdir: str | os.PathLike, step: int | None = None) -> Predictor:
    """The model of a run, with the averaged weights where the run kept them.

    Args:
      workdir: a run's folder.
      step: which checkpoint; None = the newest.

    Raises:
      StorageError: the folder holds no readable checkpoint.
    """
    config, params = checkpoints.load_params(workdir, step)
    return Predictor(config, params)
