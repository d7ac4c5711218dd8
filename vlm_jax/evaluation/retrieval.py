"""A model of pairs as one that answers: with the nearest of the texts there are.

For a split, those are the distinct answers of its examples. What it says of a picture is the
nearest one, and its loss the cross-entropy of the right one among them, so that the scores and
baselines of a model that writes hold here too.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlm_jax import config as configs
from vlm_jax.batch import Batch
from vlm_jax.data import heldout
from vlm_jax.data.example import Example
from vlm_jax.evaluation import devices, questions
from vlm_jax.evaluation.losses import Loss
from vlm_jax.models import params as parameters


class Retriever:
    """Answers of a model of pairs.

    Args:
      config: the run.
      params: flat parameters.
    """

    def __init__(self, config: configs.Config, params: Mapping[str, Array]):
        self.config, self.params = config, params

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """The nearest of the examples' answers to the first picture of each."""
        answers, logits, _ = self._compared(examples)
        return [answers[i] for i in logits.argmax(axis=1)]

    def losses(self, examples: Sequence[Example]) -> dict[str, Loss]:
        """By key: nats of an example's own answer among all; one "token" each."""
        answers, logits, there = self._compared(examples)
        place = {answer: i for i, answer in enumerate(answers)}
        nats = -np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=1))
        return {
            example.key: Loss(float(nats[i, place[questions.reference(example)]]), 1.0)
            for i, example in enumerate(examples)
            if there[i]
        }

    def attention(self, images) -> None:
        """There is no connector that attends."""
        return None

    def _compared(self, examples: Sequence[Example]):
        """Distinct answers, logits of every picture with each, and which pictures are there."""
        references = [questions.reference(example) for example in examples]
        first = {answer: i for i, answer in reversed(list(enumerate(references)))}
        answers = sorted(first)
        images, texts, there = self._embedded(examples)
        texts = texts[[first[a] for a in answers]]
        logits = _similarity(self.config.model)(self.params, images, texts)
        return answers, devices.fetch(logits), there

    def _embedded(self, examples: Sequence[Example]):
        embed = _compiled(self.config.model)
        found = [
            (
                *map(devices.fetch, embed(self.params, devices.place(batch))),
                batch.images.grids[:, 0, 0] > 0,
            )
            for batch, _ in heldout.batches(self.config, examples)
        ]
        images, texts, there = (np.concatenate(part)[: len(examples)] for part in zip(*found))
        return images, texts, there


@functools.cache
def _compiled(model: configs.Model):
    """One compiled function for all parameters of a model."""

    def embed(params: Mapping[str, Array], batch: Batch):
        vlm = parameters.build(model, params)
        return vlm.embeddings(batch.images, batch.tokens, vlm.text.there(batch.segments))

    return jax.jit(embed)


@functools.cache
def _similarity(model: configs.Model):
    return jax.jit(lambda params, *sides: parameters.build(model, params).text.similarity(*sides))
