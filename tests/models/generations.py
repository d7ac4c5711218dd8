"""What generation is compared on with transformers: prompts, options, and which ids end a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import GOLDENS, LARGER, Case, leaves

from vlm_jax.batch import Batch
from vlm_jax.models import params, sampling
from vlm_jax.presets.generation import Generation

NEW, LENGTHS = 8, (9, 4, 6, 1)
FAMILIES = ("llama_untied", "gemma2", "opt", "mpt")
SMALL = {name: GOLDENS[name] for name in FAMILIES}
LARGE = {name: LARGER[name] for name in ("llama_gqa", "gemma2", "opt", "mpt")}


def beams(**fields) -> Generation:
    """A search with three beams."""
    return Generation(NEW, beams=3, **fields)


# Each with and without ends: see `ended`.
OPTIONS = {
    "greedy": Generation(NEW),
    "greedy, ends": Generation(NEW),
    "greedy, at least 4, ends": Generation(NEW, min_new_tokens=4),
    "beams": beams(),
    "beams, ends": beams(),
    "beams, penalty 0, ends": beams(length_penalty=0.0),
    "beams, penalty -1, ends": beams(length_penalty=-1.0),
    "beams, penalty 2, ends": beams(length_penalty=2.0),
    "beams, early, ends": beams(early_stopping=True),
    "beams, at least 4, ends": beams(min_new_tokens=4, length_penalty=0.0),
}
FILTERS = {
    "temperature": Generation(temperature=0.6),
    "top k": Generation(temperature=1.5, top_k=5),
    "top p": Generation(temperature=0.9, top_p=0.7),
    "both": Generation(temperature=1.3, top_k=7, top_p=0.6),
    "only one": Generation(temperature=2.0, top_p=1e-3),
    "more than all": Generation(temperature=1.0, top_k=1000, top_p=0.999),
}


def ended(name: str) -> bool:
    """Whether a row of OPTIONS has ends."""
    return name.endswith("ends")


def prompts(case: Case, seed: int) -> list[np.ndarray]:
    """Prompts of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, case.model.decoder.vocab, length) for length in LENGTHS]


def logits(seed: int = 0) -> np.ndarray:
    """Some to be filtered."""
    return (2 * np.random.default_rng(seed).normal(size=(6, 37))).astype(np.float32)


def text_batch(prompts: list[np.ndarray]) -> Batch:
    """Prompts as the model takes them, with an empty row at the end."""
    shape = (len(prompts) + 1, max(map(len, prompts)))
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
    for row, prompt in enumerate(prompts):
        here = row, slice(len(prompt))
        batch["tokens"][here], batch["segments"][here] = prompt, 1
        batch["positions"][here] = np.arange(len(prompt))
    nothing, nowhere = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    return Batch(
        **batch,
        loss_weights=nothing.astype(np.float32),
        blocks=nothing,
        visual_index=nowhere,
        image_index=nowhere,
        image_texts=None,
        images=None,
    )


@functools.lru_cache
def _compiled(model, options: Generation, count: int):
    def run(flat, batch, ends):
        ends = [ends[i] for i in range(count)]
        return sampling.generate(params.build(model, flat), batch, None, options, ends)

    return jax.jit(run)


def ours(case: Case, weights: dict, prompts: list[np.ndarray], options, ends) -> np.ndarray:
    """Our tokens for the prompts, [rows, NEW]."""
    others = {
        path: jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in params.abstract(case.model).items()
        if not path.startswith("decoder/")
    }
    flat = others | leaves(case, weights)
    run = _compiled(case.model, options, len(ends))
    made = np.asarray(run(flat, text_batch(prompts), np.array(ends, np.int32)))
    assert (made[-1] == (ends[0] if len(ends) else 0)).all()  # the row without a prompt
    return made[:-1]
