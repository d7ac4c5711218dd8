"""The tokenizer in a GGUF file's metadata as Hugging Face's tokenizer.json."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vlm_jax.errors import ConfigError, DataError

# Kinds of tokens in `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    """Words as GPT-4's successors cut them; they differ in how many digits stay together."""
    cut = pre_tokenizers.Split(tokenizers.Regex(_WORDS % numbers), behavior="isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# How text is cut before merging, by `tokenizer.ggml.pre` (llama.cpp's src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _gpt2()]
    ),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ConfigError: it is not a byte-level BPE, or cuts text in a way that is not in PRE_TOKENIZERS.
      DataError: the file has no tokenizer.
    """
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}")  # noqa: E731
    if get("tokens") is None:
        raise DataError("the GGUF file has no tokenizer")
    if get("model") != "gpt2":
        raise ConfigError(
            f"the GGUF file's tokenizer.ggml.model is {get('model')!r}; expected 'gpt2' "
            "(byte-level BPE): give the tokenizer.json of the original model instead"
        )
    if get("pre") not in PRE_TOKENIZERS:
        raise ConfigError(
            f"the GGUF file's tokenizer.ggml.pre is {get('pre')!r}; expected one of "
            f"{', '.join(PRE_TOKENIZERS)}: give the tokenizer.json of the original model instead"
        )
    tokens = get("tokens")
    # No token holds a space: byte-level BPE writes it as another letter.
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    ids = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer, made.decoder = PRE_TOKENIZERS[get("pre")](), decoders.ByteLevel()
    for token, kind in zip(tokens, get("token_type") or (), strict=False):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            made.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return made


def save(metadata: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Writes tokenizer.json, and tokenizer_config.json with special tokens and chat template.

    Raises:
      ConfigError, DataError: as `build`.
    """
    folder = pathlib.Path(folder)
    made = build(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None:
            config[f"{role}_token"] = tokens[found]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
