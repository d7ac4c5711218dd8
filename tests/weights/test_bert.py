"""A Q-Former that begins as BERT: its reading of text is that of transformers."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from vlm_jax import config as c
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models import layers, params
from vlm_jax.parallel import mesh, sharding
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.matching import Matching
from vlm_jax.presets.qformer import QFormer
from vlm_jax.training import initial
from vlm_jax.weights import bert, files

VOCAB, POSITIONS, WIDTH, DEPTH, MLP, QUERIES, LENGTH = 37, 19, 24, 4, 40, 5, 7
CONFIG = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": MLP,
}
ENCODER = Encoder(image_size=(6, 9), patch=3, width=12, depth=1, mlp=16, heads=2, dtype="float32")
READER = QFormer(
    queries=QUERIES,
    width=WIDTH,
    depth=DEPTH,
    mlp=MLP,
    heads=3,
    vocab=VOCAB + 2,
    positions=POSITIONS,
    dtype="float32",
)
HEADS = Matching(length=LENGTH, out=6, start=VOCAB)


def config(folder, model=None, parts=("connector", "text")):
    model = model or c.Model(ENCODER, READER, text=HEADS)
    init = tuple(c.Init(str(folder), part) for part in parts)
    return c.Config("bert", model, c.Data({"emoji:caption": 1.0}), init=init)


def loaded(config):
    made = mesh.make(c.Parallel(), jax.devices()[:1])
    shapes = initial.shapes(config)
    return initial.load(config, sharding.named(made, shapes, params.axes))


def tensors():
    """Those of google-bert/bert-base-uncased's file, by its names, which are old."""
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}  # noqa: E731
    norm = lambda name: {f"{name}.LayerNorm.{x}": (WIDTH,) for x in ("gamma", "beta")}  # noqa: E731
    tables = ("word", VOCAB), ("position", POSITIONS), ("token_type", 2)
    shapes = {f"embeddings.{name}_embeddings.weight": (n, WIDTH) for name, n in tables}
    shapes |= norm("embeddings") | linear("pooler.dense", WIDTH, WIDTH)
    for i in range(DEPTH):
        at = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{at}.attention.{name}", WIDTH, WIDTH)
        shapes |= linear(f"{at}.intermediate.dense", MLP, WIDTH)
        shapes |= linear(f"{at}.output.dense", WIDTH, MLP)
        shapes |= norm(f"{at}.attention.output") | norm(f"{at}.output")
    shapes = {f"bert.{name}": shape for name, shape in shapes.items()}
    head = "cls.predictions.transform"
    shapes |= linear(f"{head}.dense", WIDTH, WIDTH) | norm(head)
    shapes |= {"cls.predictions.bias": (VOCAB,)} | linear("cls.seq_relationship", 2, WIDTH)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def written(path, given, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | fields))
    files.write(path / "model.safetensors", given, lambda name: [given[name]])
    return path


def test_text_and_queries_begin_as_bert_and_the_rest_is_drawn(tmp_path):
    given = tensors()
    found = loaded(config(written(tmp_path / "bert", given)))
    missing = params.abstract(c.Model(ENCODER, READER, text=HEADS)).keys() - found.keys()
    drawn = (
        r"connector/(queries|stack/.*/cross_.*)|text/(project|image_project|match|temperature).*"
    )
    assert all(re.fullmatch(rf"encoder/.*|{drawn}", path) for path in missing)
    blocks = "connector/stack/blocks/layers/1/"
    third = given["bert.encoder.layer.3.intermediate.dense.weight"]
    for ours in ("mlp", "text_mlp"):
        np.testing.assert_array_equal(found[f"{blocks}{ours}/up/kernel"][1], third.T)
    scale = given["bert.encoder.layer.1.attention.output.LayerNorm.gamma"]
    np.testing.assert_array_equal(found[blocks + "attended/norm/scale"][0], scale)
    words, table = given["bert.embeddings.word_embeddings.weight"], found["connector/embedding"]
    np.testing.assert_array_equal(table[:VOCAB], words)
    assert table.dtype == np.float16 and 0 < np.abs(table[VOCAB:]).max() < 0.1
    assert not np.any(found["text/output_bias"][VOCAB:])


def test_a_bert_without_its_head_gives_none(tmp_path):
    given = {name: array for name, array in tensors().items() if name.startswith("bert.")}
    folder = written(tmp_path / "bert", given)
    assert not any(
        path.startswith("text/") for path in loaded(config(folder, parts=("connector",)))
    )
    with pytest.raises(ConfigError, match="has nothing of 'text'"):
        loaded(config(folder))


def test_what_is_no_such_bert_is_refused(tmp_path):
    given = tensors()
    folder = written(tmp_path / "bert", given)
    small = dataclasses.replace(READER, vocab=VOCAB - 1)
    for reader in (small, dataclasses.replace(READER, vocab=0)):
        with pytest.raises(ConfigError, match=f"reads its {VOCAB} tokens"):
            loaded(config(folder, c.Model(ENCODER, reader), ("connector",)))
    with pytest.raises(ConfigError, match="reads its '37' tokens"):
        loaded(config(written(tmp_path / "text", given, vocab_size="37")))
    with pytest.raises(ConfigError, match="of width 48; the model's Q-Former has 24"):
        loaded(config(written(tmp_path / "wide", given, hidden_size=48)))
    with pytest.raises(DataError, match="has shape"):
        wrong = given | {"bert.embeddings.word_embeddings.weight": np.zeros((VOCAB, 5), np.float16)}
        loaded(config(written(tmp_path / "wrong", wrong)))
    with pytest.raises(DataError, match=r"lacks the tensor encoder.layer.0.output.dense.bias"):
        lacking = {n: a for n, a in given.items() if n != "bert.encoder.layer.0.output.dense.bias"}
        loaded(config(written(tmp_path / "lacking", lacking)))
    assert not bert.is_folder(tmp_path)


@pytest.mark.slow
def test_states_and_logits_of_text_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.BertConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    theirs = transformers.BertForMaskedLM(hf).eval()
    for leaf in theirs.parameters():  # norms and biases too
        torch.nn.init.normal_(leaf, std=0.3)
    torch.nn.init.zeros_(theirs.bert.embeddings.token_type_embeddings.weight)  # LAVIS has none
    theirs.save_pretrained(tmp_path / "bert")
    run = config(tmp_path / "bert")
    leaves = params.init(run.model, jax.random.key(0)) | loaded(run)
    model = params.build(run.model, leaves)
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, VOCAB, (3, LENGTH))
    there = np.arange(LENGTH) < np.array([[7], [4], [1]])
    part = np.arange(QUERIES + LENGTH) >= QUERIES
    keys = np.concatenate([np.ones((3, QUERIES), bool), there], axis=1)
    visible = (part[:, None] == part[None])[None, None] & keys[:, None, None]
    seen = layers.Features(rng.normal(size=(3, 6, 12)).astype(np.float32))
    states = model.connector.states(seen, (tokens,), visible)[:, QUERIES:]
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens), torch.tensor(there).long(), output_hidden_states=True)
    last = wanted.hidden_states[-1].numpy()
    np.testing.assert_allclose(np.array(states)[there], last[there], atol=2e-5)
    logits = model.text.unembed(model.connector, states)[..., :VOCAB]
    np.testing.assert_allclose(np.array(logits)[there], wanted.logits.numpy()[there], atol=1e-4)
