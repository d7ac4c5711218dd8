"""The embedded tokenizer, and others by their tokenizer.json."""

import dataclasses
import hashlib
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vlm_jax.data import tokenizer
from vlm_jax.errors import ConfigError


def saved(path, specials) -> str:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(specials))
    backend.enable_padding(length=16)
    backend.enable_truncation(1)
    backend.save(str(path))
    return str(path)


def test_embedded_tokenizer_round_trips_text_and_knows_its_specials():
    tok = tokenizer.load("embedded")
    text = "flag: Côte d’Ivoire, 5 o'clock? 🦊 <user>"
    assert tok.decode(tok.encode(text)) == text
    assert (tok.pad, tok.bos, tok.eos, tok.image) == (0, 1, 2, 3)
    assert (tok.special("<user>"), tok.special("<assistant>")) == (4, 5)
    assert max(tok.encode(text)) < tok.size


def test_special_tokens_spelled_out_in_text_stay_text():
    tok = tokenizer.load("embedded")
    assert not {0, 1, 2, 3, 4, 5} & set(tok.encode("a<eos><image><user> b"))


def test_the_embedded_tokenizer_has_the_special_tokens_of_the_config_s_template(small):
    plain = tokenizer.load("embedded")
    same = tokenizer.for_config(small(template="tiny"))
    assert (same.size, same.fingerprint) == (plain.size, plain.fingerprint)
    config = small(template="chatml")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, decoder=dataclasses.replace(config.model.decoder, vocab=3074)
        ),
    )
    made = tokenizer.for_config(config)
    assert [made.special(mark) for mark in ("<|im_start|>", "<|im_end|>")] == [3072, 3073]
    assert made.size == 3074 and made.fingerprint != plain.fingerprint
    # Spelled out in a text, they are text.
    assert made.encode("a<|im_end|> fox") == plain.encode("a<|im_end|> fox")
    with pytest.raises(ConfigError, match=r"decoder.vocab is 3072; .* needs at least 3074"):
        tokenizer.for_config(small(template="chatml"))


def test_starts_are_characters_of_the_text():
    tok = tokenizer.load("embedded")
    text = "the 🦊 and the fox"
    ids, starts = tok.encode_with_starts(text)
    assert ids == tok.encode(text)
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] < len(text)


def test_pieces_are_the_text_and_a_character_stands_at_its_last_token():
    tok = tokenizer.load("embedded")
    text = "naïve 🦊 cat's\n\t<eos> 日本"
    ids = tok.encode(text)
    pieces = tok.pieces([tok.bos, *ids, tok.eos])
    assert "".join(pieces) == f"<bos>{text}<eos>" and len(pieces) == len(ids) + 2
    fox = tok.encode("🦊")
    assert tok.pieces(fox)[-1] == "🦊" and set(tok.pieces(fox)[:-1]) <= {"", " "}
    cut = tok.pieces([*fox[:-1], tok.eos, 10**6])  # bytes that make nothing, and no token at all
    assert "" not in cut and cut[-2:] == ["<eos>", "<1000000>"]


def test_pieces_of_llama_s_vocabulary_keep_their_spaces(tmp_path):
    words = ["<s>", "</s>", "<unk>", "▁a", "▁cat", "s", "<0xE2>", "<0x82>", "<0xAC>"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(words[:3])
    backend.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(str(tmp_path))
    ids = [0, 4, 5, 4, 6, 7, 8, 6, 1]
    assert tok.pieces(ids) == ["<s>", " cat", "s", " cat", "", "", "€", "<0xE2>", "</s>"]


@pytest.mark.parametrize(
    "specials, expected",
    [
        (("<s>", "</s>", "<unk>"), {"bos": "<s>", "eos": "</s>", "pad": "<unk>", "image": "<unk>"}),
        (("<|endoftext|>",), dict.fromkeys(("bos", "eos", "pad", "image"), "<|endoftext|>")),
        (
            ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|image|>"),
            {
                "bos": "<|begin_of_text|>",
                "eos": "<|end_of_text|>",
                "pad": "<|finetune_right_pad_id|>",
                "image": "<|image|>",
            },
        ),
    ],
)
def test_foreign_tokenizers_are_read_by_the_names_they_use(tmp_path, specials, expected):
    path = saved(tmp_path / "tokenizer.json", specials)
    for name in (path, str(tmp_path)):
        tok = tokenizer.load(name)
        assert {role: getattr(tok, role) for role in expected} == {
            role: 2 + specials.index(token) for role, token in expected.items()
        }
    assert tok.size == 2 + len(specials)
    assert tok.fingerprint == hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]
    assert tok.encode("a b a") == [0, 1, 0]  # neither padded nor cut, whatever the file says


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no eos token: looked for <eos>"):
        tokenizer.load(saved(tmp_path / "tokenizer.json", ("<pad>", "<bos>")))
    with pytest.raises(ConfigError, match="No such file"):
        tokenizer.load(str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        tokenizer.load(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match="no token '<robot>'"):
        tokenizer.load("embedded").special("<robot>")
