"""Keeping the parameters of a run's best evaluation (early stopping)."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

Params = Mapping[str, Array]
Evaluate = Callable[[int, Params], dict[str, float]]


class Best:
    """An evaluator that also keeps the parameters with the lowest validation loss.

    They are kept in a file, so that a continued run still has them.

    Args:
      evaluate: gives {"eval/validation/KIND/loss": nats per answer token}; all kinds count alike.
      path: the .npz file of the best parameters; its step and loss lie beside it.
    """

    def __init__(self, evaluate: Evaluate, path: Path):
        self._evaluate, self._path = evaluate, path
        self._note = path.with_suffix(".json")

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        scalars = self._evaluate(step, params)
        names = [n for n in scalars if n.startswith("eval/validation/") and n.endswith("/loss")]
        loss = float(np.mean([scalars[name] for name in names]))
        if not self._note.exists() or loss < json.loads(self._note.read_text())["loss"]:
            self._keep(step, loss, params)
        return scalars

    def params(self) -> dict[str, np.ndarray]:
        """The best parameters so far."""
        with np.load(self._path, allow_pickle=False) as kept:
            return dict(kept)

    def _keep(self, step: int, loss: float, params: Params) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {path: np.asarray(jax.device_get(leaf)) for path, leaf in params.items()}
        partial = self._path.with_suffix(".tmp.npz")
        np.savez(partial, **arrays)
        os.replace(partial, self._path)
        # The note last: a kill in between only makes the next evaluation keep its parameters again.
        partial_note = self._note.with_suffix(".tmp")
        partial_note.write_text(json.dumps({"step": step, "loss": loss}))
        os.replace(partial_note, self._note)
