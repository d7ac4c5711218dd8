"""The config of a run: one tree of frozen dataclasses, filled from plain data and checked.

A config file is Python that returns an `ml_collections.ConfigDict` made by `default()` and changed
in place, so that every field has a name the command line can override. `resolve` turns it back
into the typed tree that the rest of the code reads, and refuses what it does not know.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from vlm_jax import schema
from vlm_jax.config.checks import CHOICES as CHOICES
from vlm_jax.config.checks import check as check
from vlm_jax.config.checks import check_model as check_model
from vlm_jax.config.stages import in_stages as in_stages
from vlm_jax.config.stages import one_stage as one_stage
from vlm_jax.config.stages import overridden as overridden
from vlm_jax.config.stages import refuse_hidden as refuse_hidden
from vlm_jax.config.stages import walked as walked
from vlm_jax.config.tree import ADAPTERS as ADAPTERS
from vlm_jax.config.tree import FIELDS as FIELDS
from vlm_jax.config.tree import FULL as FULL
from vlm_jax.config.tree import MODES as MODES
from vlm_jax.config.tree import Augment as Augment
from vlm_jax.config.tree import Checkpoint as Checkpoint
from vlm_jax.config.tree import Config as Config
from vlm_jax.config.tree import Corpus as Corpus
from vlm_jax.config.tree import Data as Data
from vlm_jax.config.tree import Eval as Eval
from vlm_jax.config.tree import Guard as Guard
from vlm_jax.config.tree import Init as Init
from vlm_jax.config.tree import MixtureStage as MixtureStage
from vlm_jax.config.tree import Model as Model
from vlm_jax.config.tree import Parallel as Parallel
from vlm_jax.config.tree import Rule as Rule
from vlm_jax.config.tree import Stage as Stage
from vlm_jax.config.tree import Tracking as Tracking
from vlm_jax.config.tree import Train as Train
from vlm_jax.errors import ConfigError


def default(**fields) -> ml_collections.ConfigDict:
    """A config with every field present, to be changed in place by a config file.

    Args:
      **fields: fields of `Config`; `name`, `model` and `data` have no default.
    """
    return ml_collections.ConfigDict(schema.plain(Config(**fields)))


def scaled_lr(lr: float, rows: int, at: int, rule: str = "sqrt") -> float:
    """A learning rate found at one batch size, for another.

    Args:
      lr: the rate that was found.
      rows: samples of the batch it is wanted for.
      at: samples of the batch it was found with.
      rule: "linear" (Goyal et al. 2017), or "sqrt", which keeps the size of Adam's noise (Malladi
        et al. 2022).

    Raises:
      ConfigError: there is no such rule.
    """
    powers = {"linear": 1.0, "sqrt": 0.5}
    if rule not in powers:
        raise ConfigError(f"scaled_lr: rule is {rule!r}; expected one of {', '.join(powers)}")
    return lr * (rows / at) ** powers[rule]


def resolve(config: Mapping[str, Any]) -> Config:
    """The checked, typed form of a config.

    Raises:
      ConfigError: an unknown or missing key (naming the nearest known one), a value of the wrong
        type, or values that contradict each other.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    resolved = schema.typed(Config, config, "config")
    check(resolved)
    walked(resolved)
    return resolved
