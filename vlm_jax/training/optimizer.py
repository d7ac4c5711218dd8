"""AdamW with warm-up, cosine, clipping, and a learning-rate and decay factor per parameter."""

import jax.numpy as jnp
import optax

from vlm_jax.config import Train
from vlm_jax.errors import ConfigError
from vlm_jax.training.adaptation import Plan


def schedule(train: Train) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then a cosine to `end_lr * lr`.

    Raises:
      ConfigError: the warm-up is as long as the run.
    """
    if not 0 <= train.warmup_steps < train.steps:
        raise ConfigError(
            f"config.train.warmup_steps is {train.warmup_steps}; expected at least 0 and fewer "
            f"than the {train.steps} of config.train.steps"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if train.warmup_steps else train.lr,
        peak_value=train.lr,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.lr * train.end_lr,
    )


def make(train: Train, plan: Plan) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters by path.

    The gradient is clipped by its global norm first. Weight decay is decoupled: a step subtracts
    lr * factor * (adam + weight_decay * decay_factor * parameter).
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip) if train.clip else optax.identity(),
        optax.scale_by_adam(train.b1, train.b2, train.eps, mu_dtype=jnp.float32),
        _add_decay(
            {path: train.weight_decay * factor for path, factor in plan.weight_decay.items()}
        ),
        _scale_each(plan.lr),
        optax.scale_by_learning_rate(schedule(train)),
    )


def _add_decay(decay: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: {
            path: update + decay[path] * params[path] if decay[path] else update
            for path, update in updates.items()
        }
    )


def _scale_each(factors: dict[str, float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: {path: u * factors[path] for path, u in updates.items()}
    )
