"""Decoding speed on the CPU beside transformers: the same random Llama, greedy, float32.

    python -m benchmarks.decode
    python -m benchmarks.decode --sizes tiny --batches 1 --repeats 3
    python -m benchmarks.decode --threads 1 --clock cpu

Both sides run in one process, in turns, on the same cores with as many threads. A figure is the
median over the repeats of a whole generation: the prompt, then every new token. On a machine that
does other work too, the seconds that one core spent (`--threads 1 --clock cpu`) say more than those
on the wall. Needs torch and transformers.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np
import torch
import transformers

from vlm_jax.batch import Batch
from vlm_jax.config import Model
from vlm_jax.models import params, sampling
from vlm_jax.presets.decoders import Decoder, decoder
from vlm_jax.weights import registry, tables

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
EXACT = {"dtype": "float32", "remat": False}
SIZES = {
    "tiny": Decoder(2048, 256, 6, 768, 4, 2, 64, tied=True, **EXACT),
    "smollm2-135m": decoder("smollm2-135m", **EXACT),
}


def main() -> None:
    """Prints a table of tokens per second, all rows of a batch together."""
    options = _options()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)  # before jax starts its threads
    torch.set_num_threads(len(cores))
    print(
        f"prompt {options.prompt}, new tokens {options.new}, threads {len(cores)}, "
        f"{options.clock} clock, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'size':14} {'batch':>5} {'vlm_jax':>9} {'transformers':>13} {'ratio':>6} {'equal':>6}")
    for size in options.sizes:
        model = Model(decoder=SIZES[size])
        theirs = _llama(model.decoder)
        shapes = {path: leaf.shape for path, leaf in params.abstract(model).items()}
        tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
        flat = jax.tree.map(
            jax.numpy.asarray, tables.gather(registry.family("llama").rows(model), shapes, tensors)
        )
        for rows in options.batches:
            rng = np.random.default_rng(rows)
            tokens = rng.integers(0, model.decoder.vocab, (rows, options.prompt))
            sides = _ours(model, flat, tokens, options.new), _theirs(theirs, tokens, options.new)
            answers = [side() for side in sides]  # compiles, and warms up
            seconds = _seconds(sides, options.repeats, CLOCKS[options.clock])
            ours, other = (rows * options.new / s for s in seconds)
            equal = (answers[0] == answers[1]).mean()
            print(f"{size:14} {rows:5} {ours:9.1f} {other:13.1f} {ours / other:6.2f} {equal:6.1%}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="all cores by default")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


def _llama(d: Decoder) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=d.vocab,
        hidden_size=d.width,
        num_hidden_layers=d.depth,
        intermediate_size=d.mlp,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        tie_word_embeddings=d.tied,
        initializer_range=0.1,  # so that answers vary and ties are rare
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def _ours(model: Model, flat: dict, tokens: np.ndarray, new: int):
    full = lambda value: np.full(tokens.shape, value, np.int32)  # noqa: E731
    batch = Batch(
        tokens=tokens.astype(np.int32),
        segments=full(1),
        positions=full(0) + np.arange(tokens.shape[1], dtype=np.int32),
        loss_weights=full(0),
        blocks=full(0),
        visual_index=full(-1),
        image_index=full(-1),
        image_texts=None,
        images=None,
    )

    @jax.jit
    def generate(flat, batch):
        return sampling.greedy(params.build(model, flat), batch, None, new, -1)

    return lambda: np.asarray(generate(flat, batch))


def _theirs(module: transformers.LlamaForCausalLM, tokens: np.ndarray, new: int):
    prompt = torch.from_numpy(tokens)
    mask = torch.ones_like(prompt)

    def generate() -> np.ndarray:
        with torch.inference_mode():
            made = module.generate(
                prompt, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True
            )
        return made[:, prompt.shape[1] :].numpy()

    return generate


def _seconds(sides, repeats: int, clock) -> list[float]:
    """Median seconds of each side, measured in turns."""
    taken = [[] for _ in sides]
    for _ in range(repeats):
        for side, times in zip(sides, taken, strict=True):
            start = clock()
            side()
            times.append(clock() - start)
    return [statistics.median(times) for times in taken]


if __name__ == "__main__":
    main()
