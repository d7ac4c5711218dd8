"""Prefixes of decoders as the PEFT library stores them: one tensor, `prompt_embeddings`.

It is [R, L * 2 * G * K]: of each of R virtual tokens the key and then the value in every layer.
What a network made is stored as it came out, by PEFT too, so that the network is not in the file.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import Model
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import adapters, prefixes
from vlm_jax.weights import files

KIND, TENSOR = "PREFIX_TUNING", "prompt_embeddings"
KERNEL = "decoder/stack/blocks/attention/key/kernel"

Arrays = dict[str, np.ndarray]


def there(leaves: Iterable[str]) -> bool:
    """Whether there is a prefix among the leaves."""
    return any(path.rpartition("/")[2] in prefixes.LEAVES for path in leaves)


def written(
    model: Model, leaves: Mapping[str, Any], trained: Iterable[str]
) -> tuple[dict[str, Any], Arrays]:
    """The config and the tensor of the decoder's prefix.

    Raises:
      ConfigError: there are other adapters, or what was trained beside it, which PEFT has no place
        for.
    """
    others = {
        p for p in leaves if adapters.is_leaf(p) and not p.startswith(KERNEL[: -len("kernel")])
    }
    others |= set(trained)
    if others:
        raise ConfigError(
            f"{min(others)} was trained beside a prefix; PEFT stores a decoder's prefix alone"
        )
    (keys, values) = (np.asarray(x) for x in adapters.keys_values(leaves)[KERNEL])
    both = np.stack([keys, values], axis=1)  # [L, 2, R, G, K]
    layers, _, length, heads, size = both.shape
    config = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    tensor = np.ascontiguousarray(both.transpose(2, 0, 1, 3, 4).reshape(length, -1), np.float32)
    return config, {TENSOR: tensor}


def read(
    folder: Path, model: Model, config: Mapping[str, Any], source: files.Safetensors
) -> Arrays:
    """The leaves of a folder's prefix by path.

    Raises:
      ConfigError: it is of a model with an encoder of its own.
      DataError: it is damaged, or of another model.
    """
    if config.get("num_transformer_submodules") not in (None, 1):
        raise ConfigError(f"{folder} is a prefix of an encoder and a decoder; expected a decoder's")
    if set(source.shapes) != {TENSOR}:
        raise DataError(f"{folder} has {sorted(source.shapes)}; expected {TENSOR} alone")
    if model.decoder is None:
        raise ConfigError(f"{folder} is a prefix of a decoder; the model has none")
    decoder = model.decoder
    heads = decoder.kv_heads, decoder.head_dim
    shape = source.shapes[TENSOR]
    if len(shape) != 2 or shape[1] != decoder.depth * 2 * heads[0] * heads[1] or not shape[0]:
        raise DataError(
            f"{folder} has {TENSOR} of the shape {shape}; expected one row per virtual token, of "
            f"{decoder.depth} layers, 2 and {heads[0]} heads of {heads[1]}: is it another model's?"
        )
    both = source.read(TENSOR).reshape(shape[0], decoder.depth, 2, *heads)
    both = both.transpose(2, 1, 0, 3, 4).astype(np.float32)
    return {
        adapters.beside(KERNEL, name): np.ascontiguousarray(leaf)
        for name, leaf in zip(prefixes.OWN, both, strict=True)
    }
