"""The learning rate by step: a warm-up, a level, a decay."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vlm_jax.config import Train
from vlm_jax.errors import ConfigError

# Share of the way down that is left, by the share of the decay that is done. "sqrt" is the best
# shape of Hägele et al. 2024 ("Scaling laws and compute-optimal training beyond fixed training
# durations", "1-sqrt").
SHAPES: dict[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    "sqrt": lambda done: 1.0 - jnp.sqrt(done),
}
DECAYING = ("wsd", "rsqrt")  # with a decay at the end, whose length is a field of its own


def make(train: Train) -> optax.Schedule:
    """Learning rate by optimizer step: linear from 0 over `warmup_steps`, then `train.schedule`.

    "wsd" is the warm-up-stable-decay of MiniCPM (Hu et al. 2024); "rsqrt" that of big_vision's
    `create_learning_rate_schedule` (Zhai et al. 2022), whose cool-down is a linear decay to 0.

    Raises:
      ConfigError: warm-up and decay do not fit the run, or the schedule has no decay.
    """
    _check(train)
    start, end = train.warmup_steps, train.lr * train.end_lr
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if start else train.lr,
            peak_value=train.lr,
            warmup_steps=start,
            decay_steps=train.steps,
            end_value=end,
        )
    levels = {
        "linear": optax.linear_schedule(train.lr, end, train.steps - start),
        "constant": optax.constant_schedule(train.lr),
        "wsd": optax.constant_schedule(train.lr),
        "rsqrt": lambda step: train.lr / jnp.sqrt(1.0 + step / train.timescale),
    }
    warmed = levels[train.schedule]
    if start:
        rise = optax.linear_schedule(0.0, train.lr, start)
        warmed = optax.join_schedules([rise, warmed], [start])
    return _decayed(train, warmed) if train.decay_steps else warmed


def _decayed(train: Train, level: optax.Schedule) -> optax.Schedule:
    """`level`, that falls to `end_lr` of itself over the last `decay_steps`."""
    start, shape = train.steps - train.decay_steps, SHAPES[train.decay_shape]

    def rate(step):
        done = jnp.clip((step - start) / train.decay_steps, 0.0, 1.0)
        return level(step) * (train.end_lr + (1.0 - train.end_lr) * shape(done))

    return rate


def _check(train: Train) -> None:
    if not 0 <= train.warmup_steps < train.steps:
        raise ConfigError(
            f"config.train.warmup_steps is {train.warmup_steps}; expected at least 0 and fewer "
            f"than the {train.steps} of config.train.steps"
        )
    longest = train.steps - train.warmup_steps if train.schedule in DECAYING else 0
    least = 1 if train.schedule == "wsd" else 0
    if not least <= train.decay_steps <= longest:
        raise ConfigError(
            f"config.train.decay_steps is {train.decay_steps}; expected {least} to {longest} with "
            f"the schedule {train.schedule!r} of {train.steps} steps"
        )
    if train.timescale <= 0:
        raise ConfigError(f"config.train.timescale is {train.timescale}; expected more than 0")
