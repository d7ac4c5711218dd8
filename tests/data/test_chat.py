"""Chat templates: the published strings byte for byte, and which tokens are learned."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from vlm_jax.data import chat, templates, tokenizer
from vlm_jax.data.example import ImageRef, Turn
from vlm_jax.errors import ConfigError, DataError

TALK = (
    Turn("user", (ImageRef(0), "what is it?")),
    Turn("assistant", ("a red fox",)),
    Turn("user", ("and ", ImageRef(1), " this?")),
    Turn("assistant", ("a <eos> hen",)),
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> tokenizer.Tokenizer:
    """One token per byte, so that tokens can be read as the string they stand for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({a: i for i, a in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    backend.save(str(path))
    return tokenizer.load(str(path))


def spelled(tok: tokenizer.Tokenizer, ids) -> str:
    """Ids as a string, special tokens by name."""
    return tok.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def marked(tok: tokenizer.Tokenizer, rendered: chat.Rendered) -> list[str]:
    """The rendered string cut where the loss weight changes; learned pieces are in brackets."""
    cuts = np.flatnonzero(np.diff(rendered.loss_weights)) + 1
    ids = np.split(rendered.tokens, cuts)
    weights = np.split(rendered.loss_weights, cuts)
    return [
        f"[{spelled(tok, part)}]" if weight[0] else spelled(tok, part)
        for part, weight in zip(ids, weights, strict=True)
    ]


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicuna_is_byte_exact_and_learns_answers_and_their_ends(letters):
    rendered = chat.render(templates.template("vicuna_v1"), letters, TALK, 2)
    assert marked(letters, rendered) == [
        f"<s>{SYSTEM} USER: <image><image>\nwhat is it? ASSISTANT:",
        "[ a red fox</s>]",
        "USER: <image><image>\nand  this? ASSISTANT:",
        "[ a <eos> hen</s>]",
    ]


def test_vicuna_prompt_ends_at_the_colon(letters):
    rendered = chat.render(templates.template("vicuna_v1"), letters, TALK[:1], 1, reply=True)
    assert spelled(letters, rendered.tokens) == (
        f"<s>{SYSTEM} USER: <image>\nwhat is it? ASSISTANT:"
    )
    assert not rendered.loss_weights.any()


def test_plain_throws_the_question_away_and_ends_with_a_line(letters):
    plain = templates.template("plain")
    rendered = chat.render(plain, letters, TALK[:2], 3)
    assert marked(letters, rendered) == ["<s><image><image><image>", "[a red fox\n]"]
    prompt = chat.render(plain, letters, TALK[:1], 3, reply=True)
    assert spelled(letters, prompt.tokens) == "<s><image><image><image>"
    assert spelled(letters, [chat.end_token(plain, letters)]) == "\n"


def test_tiny_masks_by_turn_and_knows_where_images_stand():
    tok = tokenizer.load("embedded")
    rendered = chat.render(templates.template("tiny"), tok, TALK, 2)
    bos, eos, image, user, assistant = range(1, 6)
    expected = [
        *[(bos, 0), (user, 0), (image, 0), (image, 0)],
        *[(i, 0) for i in tok.encode("what is it?")],
        (assistant, 0),
        *[(i, 1) for i in tok.encode("a red fox")],
        (eos, 1),
        (user, 0),
        *[(i, 0) for i in tok.encode("and ")],
        *[(image, 0), (image, 0)],
        *[(i, 0) for i in tok.encode(" this?")],
        (assistant, 0),
        *[(i, 1) for i in tok.encode("a <eos> hen")],
        (eos, 1),
    ]
    assert (
        list(zip(rendered.tokens.tolist(), rendered.loss_weights.tolist(), strict=True)) == expected
    )
    assert [tuple(span) for span in rendered.image_spans] == [
        (2, 0),
        (rendered.tokens.tolist().index(image, 4), 1),
    ]
    assert (rendered.tokens == eos).sum() == 2  # the one spelled out in an answer is text


@pytest.mark.parametrize("name", ["tiny", "vicuna_v1", "plain"])
def test_a_prompt_is_the_start_of_its_training_sequence(name, letters):
    tok = tokenizer.load("embedded") if name == "tiny" else letters
    whole = chat.render(templates.template(name), tok, TALK, 2)
    prompt = chat.render(templates.template(name), tok, TALK[:3], 2, reply=True)
    np.testing.assert_array_equal(whole.tokens[: len(prompt.tokens)], prompt.tokens)
    assert whole.loss_weights[len(prompt.tokens) :].all()


def test_images_in_an_answer_are_not_learned():
    turns = (Turn("user", ("show",)), Turn("assistant", ("this ", ImageRef(0), " fox")))
    tok = tokenizer.load("embedded")
    rendered = chat.render(templates.template("tiny"), tok, turns, 3)
    start = rendered.image_spans[0].start
    assert rendered.loss_weights[start : start + 3].tolist() == [0, 0, 0]
    assert rendered.loss_weights[start - 1] == rendered.loss_weights[start + 3] == 1


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean vicuna_v1"):
        templates.template("vicuna")
    with pytest.raises(DataError, match="role 'system'"):
        chat.render(templates.template("tiny"), tokenizer.load("embedded"), [Turn("system", ())], 1)
