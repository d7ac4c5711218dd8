"""Evaluation inside a run: cheap held-out losses on the way, every score at the end."""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array

from vlm_jax import config as configs
from vlm_jax.data import heldout
from vlm_jax.data.example import Example
from vlm_jax.errors import DataError
from vlm_jax.evaluation import baselines, losses, questions, scores
from vlm_jax.evaluation.predictor import Predictor
from vlm_jax.evaluation.retrieval import Retriever
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models.params import count

CAPTION = "caption"
TEXT_ONLY = "text only"
MAJORITY_EXAMPLES = 2_000  # of training whose answers the majority baseline counts, per kind
NEIGHBOUR_EXAMPLES = 20_000  # of training whose pictures are searched
PICTURED = 48  # samples per split and kind whose pictures are kept, drawn by chance
ATTENDED = 3  # pictures per split whose connector attention is kept
ATTENDED_SIDE = 128  # pixels they are kept at

Params = Mapping[str, Array]


class Evaluator:
    """Held-out losses and scores of a run.

    Args:
      config: the run; its `eval` part says what is measured.
      workdir: where `final` writes scores.json and samples/.
    """

    def __init__(self, config: configs.Config, workdir: str | Path):
        self.config, self.workdir = config, Path(workdir)
        self._held: dict[tuple[str, str, str], list] = {}

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Held-out loss per split and kind, and the seeing gap of captions.

        Args:
          step: only for symmetry with other things that are called during a run.
          params: flat parameters.

        Returns:
          {"eval/SPLIT/KIND/loss": nats per answer token, "eval/SPLIT/KIND/gap": ...}.
        """
        measure, scalars = self._measure(params), {}
        for split, kind in itertools.product(self.config.eval.splits, self.config.eval.kinds):
            right = measure(split, kind, "right")
            scalars[f"eval/{split}/{kind}/loss"] = losses.total(right)
            gap = self.config.data.images and kind == CAPTION
            if gap and self._can_shuffle(split, kind, self.config.eval.examples):
                other = measure(split, kind, "shuffled")
                scalars[f"eval/{split}/{kind}/gap"] = losses.gap(right, other)
        return scalars

    def _measure(self, params: Params) -> Callable[[str, str, str], dict[str, losses.Loss]]:
        """Held-out losses during the run, by split, kind and what is shown."""
        if self.config.model.pair:
            limit = self.config.eval.examples
            model = Retriever(self.config, params)
            return lambda split, kind, images: _losses(model, split, kind, limit, images)
        vision = Vision(self.config, params)
        return lambda *shown: losses.per_example(vision, self._batches(*shown))

    def final(
        self, params: Params, text_only: Params | None = None, step: int | None = None
    ) -> scores.Scores:
        """Every score with its baselines; also written to scores.json and samples/.

        Args:
          params: flat parameters of the model.
          text_only: those of the same config trained without images.
          step: optimizer steps that the model was trained for; by default all of the config's.
        """
        splits, kinds = self.config.eval.splits, self.config.eval.kinds
        answering = Retriever if self.config.model.pair else Predictor
        models = {scores.MODEL: answering(self.config, params)}
        if text_only is not None:
            models[TEXT_ONLY] = Predictor(without_images(self.config), text_only)
        # Kinds outside, so that what a kind compiles and reads serves all its splits.
        rows = [
            score
            for kind, split in itertools.product(kinds, splits)
            for score in self._score(split, kind, models)
        ]
        found = scores.Scores(
            name=self.config.name,
            step=self.config.train.steps if step is None else step,
            parameters=count(self.config.model, params),
            splits=splits,
            kinds=kinds,
            rows=tuple(rows),
        )
        self._keep_attention(models[scores.MODEL])
        self._write("scores.json", found.to_json())
        return found

    def _examples(self, split: str, kind: str, limit: int) -> list[Example]:
        return heldout.eval_examples(self.config, split, kind, limit)

    def _batches(self, split: str, kind: str, images: str) -> list:
        """The batches of the losses during the run; read once, as they never change."""
        key = (split, kind, images)
        if key not in self._held:
            limit = self.config.eval.examples
            self._held[key] = list(heldout.eval_batches(self.config, split, kind, limit, images))
        return self._held[key]

    def _score(
        self, split: str, kind: str, models: Mapping[str, Predictor | Retriever]
    ) -> list[scores.Score]:
        """Every score of a split and kind; keeps the samples."""
        examples = self._examples(split, kind, self.config.eval.final_examples)
        measured = self._final_losses(split, kind, models)
        # What could not be read, or is too long for a row, has no loss and gets no answer; nor does
        # what was to be shown the picture of such a one.
        of_model = [by[scores.MODEL] for by in measured.values() if scores.MODEL in by]
        examples = [e for e in examples if all(e.key in found for found in of_model)]
        labels = {"split": split, "kind": kind}
        return [
            *self._answer_scores(examples, models, labels),
            *_loss_scores(examples, measured, labels),
        ]

    def _final_losses(
        self, split: str, kind: str, models: Mapping[str, Predictor | Retriever]
    ) -> dict[str, dict[str, dict[str, losses.Loss]]]:
        """Losses by what was shown ("right" or "shuffled" images), model and example."""
        limit = self.config.eval.final_examples
        measured: dict[str, dict] = {"right": {}, "shuffled": {}}
        for name, model in models.items():
            # Without images both would be the same.
            both = model.config.data.images and self._can_shuffle(split, kind, limit)
            shown = ("right", "shuffled") if both else ("right",)
            for images in shown:
                measured[images][name] = _losses(model, split, kind, limit, images)
        return measured

    def _can_shuffle(self, split: str, kind: str, limit: int) -> bool:
        """Whether there are other pictures to show; a file of one's own may have a single one."""
        try:
            heldout.shuffle_images(self._examples(split, kind, limit))
        except DataError:
            return False
        return True

    def _answer_scores(
        self,
        examples: Sequence[Example],
        models: Mapping[str, Predictor | Retriever],
        labels: Mapping[str, str],
    ) -> list[scores.Score]:
        """Scores of the answers of the models and of every baseline; keeps the samples."""
        kind = labels["kind"]
        answers = {name: model.answer(examples) for name, model in models.items()}
        answers["majority"] = baselines.majority(self._train(kind, MAJORITY_EXAMPLES), examples)
        if kind == CAPTION:
            answers |= self._neighbours(examples)
        self._keep_samples(examples, answers, **labels)
        references = [questions.reference(example) for example in examples]
        found = []
        for metric in scores.metrics_of(kind):
            measure = scores.METRICS[metric]
            values = {system: measure(given, references) for system, given in answers.items()}
            found += _compare(examples, values, metric=metric, **labels)
        return found

    @functools.cache  # noqa: B019
    def _train(self, kind: str, limit: int) -> list[Example]:
        return self._examples("train", kind, limit)

    @functools.cached_property
    def _neighbours(self) -> baselines.Neighbours:
        return baselines.Neighbours(self._train(CAPTION, NEIGHBOUR_EXAMPLES))

    def _keep_samples(
        self, examples: Sequence[Example], answers: Mapping[str, list[str]], split: str, kind: str
    ) -> None:
        """Writes every answer, in random order, the pictures of the first ones beside them."""
        rights = scores.exact(
            answers[scores.MODEL], [questions.reference(example) for example in examples]
        )
        rows = []
        # Other kinds show other pictures.
        order = np.random.default_rng(zlib.crc32(kind.encode())).permutation(len(examples))
        for place, i in enumerate(order):
            example = examples[i]
            rows.append(
                {
                    "key": example.key,
                    "prompt": questions.prompt(example),
                    "answer": answers[scores.MODEL][i],
                    "reference": questions.reference(example),
                    "right": bool(rights[i]),
                    "baselines": {s: a[i] for s, a in answers.items() if s != scores.MODEL},
                    "images": self._keep_pictures(example) if place < PICTURED else [],
                }
            )
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        self._write(f"samples/{split}-{kind}.jsonl", "\n".join(lines) + "\n")

    def _keep_pictures(self, example: Example) -> list[str]:
        paths = []
        for n, image in enumerate(example.images):
            path = f"samples/images/{example.key.replace('/', '-')}-{n}.png"
            self._write(path, PIL.Image.fromarray(baselines.on_white(image)))
            paths.append(path)
        return paths

    def _keep_attention(self, model: Predictor | Retriever) -> None:
        """Writes where a Perceiver connector looks in a few pictures of each split."""
        rows = []
        for split in self.config.eval.splits:
            examples = self._examples(split, self.config.eval.kinds[0], 0)
            chosen = np.random.default_rng(1).permutation(len(examples))[:ATTENDED]
            examples = [examples[i] for i in chosen if examples[i].images]
            maps = model.attention([example.images[0] for example in examples])
            if maps is None:
                return
            rows += self._attended(split, examples, maps, model.answer(examples))
        self._write("samples/attention.json", json.dumps(rows))

    def _attended(self, split, examples, maps, answers) -> list[dict[str, Any]]:
        model = self.config.model
        grid = model.connector.pooled(model.encoders)[0] or model.encoder.grid
        references = [questions.reference(example) for example in examples]
        rights = scores.exact(answers, references)
        rows = []
        for i, example in enumerate(examples):
            path = f"samples/images/attended-{split}-{i}.png"
            # Encoders see a square: so must whoever looks where they look.
            picture = PIL.Image.fromarray(baselines.on_white(example.images[0]))
            self._write(path, picture.resize((ATTENDED_SIDE, ATTENDED_SIDE)))
            rows.append(
                {
                    "split": split,
                    "image": path,
                    "answer": answers[i],
                    "reference": references[i],
                    "right": bool(rights[i]),
                    "grid": list(grid),
                    "maps": np.round(maps[i], 5).tolist(),
                }
            )
        return rows

    def _write(self, name: str, content: str | PIL.Image.Image) -> None:
        """A file of the workdir; the first process alone writes."""
        if jax.process_index():
            return
        path = self.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            content.save(path)


def _losses(
    model: Predictor | Retriever, split: str, kind: str, limit: int, images: str
) -> dict[str, losses.Loss]:
    """Of every held-out example, by its key; `images` are "right" or "shuffled"."""
    if isinstance(model, Predictor):
        batches = heldout.eval_batches(model.config, split, kind, limit, images)
        return losses.per_example(model.vision, batches)
    examples = heldout.eval_examples(model.config, split, kind, limit)
    return model.losses(heldout.shuffle_images(examples) if images == "shuffled" else examples)


def without_images(config: configs.Config) -> configs.Config:
    """The same config with text alone."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, images=False))


def _loss_scores(
    examples: Sequence[Example],
    measured: Mapping[str, Mapping[str, Mapping[str, losses.Loss]]],
    labels: Mapping[str, str],
) -> list[scores.Score]:
    """Loss of every model, and the seeing gap of the one that sees."""

    def nats(of: Mapping[str, losses.Loss]) -> np.ndarray:
        return np.array([of[example.key].nats for example in examples])

    right, shuffled = measured["right"], measured["shuffled"]
    weights = np.array([right[scores.MODEL][example.key].tokens for example in examples])
    by_model = {name: nats(of) for name, of in right.items()}
    found = _compare(examples, by_model, weights, metric="loss", **labels)
    if scores.MODEL in shuffled:
        gap = {scores.MODEL: nats(shuffled[scores.MODEL]) - by_model[scores.MODEL]}
        found += _compare(examples, gap, weights, metric="gap", **labels)
    return found


def _compare(
    examples: Sequence[Example],
    systems: Mapping[str, np.ndarray],
    weights: np.ndarray | None = None,
    **labels: str,
) -> list[scores.Score]:
    """Scores over all examples and, where some are flags, over the others alone.

    Flags are near-copies between styles, so that a figure with them flatters everyone.
    """
    if not examples:
        return []
    flags = np.array([bool(example.meta.get("flag")) for example in examples])
    subsets = {"all": np.ones_like(flags)}
    if 0 < flags.sum() < len(flags):
        subsets["no flags"] = ~flags
    clusters = np.array([questions.cluster(example) for example in examples])
    found = []
    for subset, kept in subsets.items():
        values = {system: sums[kept] for system, sums in systems.items()}
        divisors = None if weights is None else weights[kept]
        found += scores.compare(values, clusters[kept], divisors, subset=subset, **labels)
    return found
