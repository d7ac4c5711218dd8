"""A connector that reads what is asked (InstructBLIP): from the document to loss and answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from vlm_jax import config as configs
from vlm_jax.data import documents, heldout, packing
from vlm_jax.data import tokenizer as tokenizers_
from vlm_jax.data.example import Example, ImageRef, Turn
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.predictor import Predictor
from vlm_jax.evaluation.vision import Vision
from vlm_jax.models import params, sampling
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.qformer import QFormer
from vlm_jax.training import objectives

TOKENIZER = tokenizers_.load("embedded")
VOCAB = 3072


def config(**data) -> configs.Config:
    """An instructed model of a few thousand parameters; fields of `data` by name."""
    encoder = Encoder(16, 1, 32, 2, patch=16, image_size=64, dtype="float32", remat=False)
    reader = QFormer(
        3, 12, 2, 20, 3, vocab=VOCAB, positions=44, norm_eps=1e-6, dtype="float32", remat=False
    )
    decoder = Decoder(VOCAB, 16, 1, 32, 2, 1, 8, tied=True, dtype="float32", remat=False)
    fields = {"tokens": 96, "images_per_row": 3, "text_tokens": 40, "rows": 2}
    return configs.Config(
        name="test",
        model=configs.Model(encoder, reader, decoder),
        data=configs.Data({"emoji:caption": 1.0}, **(fields | data)),
        eval=configs.Eval(rows=4, max_new_tokens=3),
    )


@pytest.fixture(scope="module")
def flat():
    rng = np.random.default_rng(0)
    shapes = params.abstract(config().model)
    return {path: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype) for path, x in shapes.items()}


@pytest.fixture(scope="module")
def examples():
    return heldout.eval_examples(config(), "validation", "choice", 6)


def conversation(picture: bytes) -> Example:
    """Two images asked about in one turn, one in another, one that the assistant shows."""
    turns = (
        Turn("user", (ImageRef(0), " what is new? ", ImageRef(1))),
        Turn("assistant", ("a secret", ImageRef(0))),
        Turn("user", ("sure?", ImageRef(2))),
        Turn("assistant", ("yes",)),
    )
    return Example("k", "made", (picture,) * 3, turns, ("first", "second", "third"))


def test_each_image_comes_with_what_is_asked_where_it_stands(examples):
    made = conversation(examples[0].images[0])
    document = documents.document(made, config(images_per_row=4), TOKENIZER)
    expected = ["what is new?", "what is new?", "", "sure?"]
    for row, text in zip(document.texts, expected, strict=True):
        ids = TOKENIZER.encode(text)
        assert row.tolist() == ids + [0] * (40 - len(ids))


def test_nothing_asked_is_cut(examples):
    made = conversation(examples[0].images[0])
    short = config(text_tokens=2, images_per_row=4)
    refused = documents.document(made, short, TOKENIZER)
    assert refused.rejects == ("too_many_instruction_tokens",) and len(refused) == 0
    with pytest.raises(DataError, match="tokens for the connector"):
        documents.prompt_document(made.turns[:1], made.images, short, TOKENIZER)


def test_a_tokenizer_of_its_own_writes_its_own_ends(examples, tmp_path):
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "what", "is", "new", "?", "sure"]
    bert = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    bert.add_special_tokens(words[:4])
    bert.pre_tokenizer = Whitespace()
    bert.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    bert.save(str(tmp_path / "tokenizer.json"))
    own = config(instruction_tokenizer=str(tmp_path), text_tokens=6, images_per_row=4)
    document = documents.document(conversation(examples[0].images[0]), own, TOKENIZER)
    texts = [[1, 4, 5, 6, 7, 2]] * 2 + [[1, 2, 0, 0, 0, 0], [1, 8, 7, 2, 0, 0]]
    np.testing.assert_array_equal(document.texts, texts)


def test_what_the_connector_could_not_read_is_refused():
    small = config()
    fewer = dataclasses.replace(small.model.connector, vocab=VOCAB - 1)
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, connector=fewer))
    with pytest.raises(ConfigError, match=r"connector\.vocab is 3071"):
        tokenizers_.for_config(small)
    with pytest.raises(ConfigError, match="at most the 44 positions"):
        configs.check(config(text_tokens=45))
    both = dataclasses.replace(config(), train=configs.Train(steps=1, contrastive=0.1))
    with pytest.raises(ConfigError, match=r"train\.contrastive"):
        configs.check(both)


def test_the_loss_reads_what_is_asked_and_teaches_its_reader(flat, examples):
    run = config()
    made = [documents.document(e, run, TOKENIZER) for e in examples[:2]]
    batch = packing.assemble([[one] for one in made], packing.shape_of(run, TOKENIZER.pad))

    @jax.jit
    def gradient(batch):
        loss = lambda flat: objectives.losses(params.build(run.model, flat), batch, run)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(flat)

    (asked, _), taught = gradient(batch)
    (otherwise, _), _ = gradient(batch._replace(image_texts=np.roll(batch.image_texts, 1, -1)))
    assert asked != otherwise
    rows = np.abs(taught["connector/embedding"]).sum(axis=1) > 0
    wanted = np.isin(np.arange(VOCAB), batch.image_texts[batch.image_texts > 0])
    np.testing.assert_array_equal(rows, wanted)


def test_answers_are_those_of_uncached_generation_that_was_asked(flat, examples):
    run = config()
    predictor = Predictor(run, flat)

    @jax.jit
    def uncached(batch):
        vlm = params.build(run.model, flat)
        visual = vlm.visual(batch.images, texts=batch.image_texts)
        return sampling.greedy_uncached(vlm, batch, visual, 3, predictor._end)

    expected = []
    for batch in heldout.prompt_batches(run, [heldout.prompt_of(e) for e in examples]):
        expected += [predictor._text(row, [predictor._end]) for row in np.asarray(uncached(batch))]
    assert predictor.answer(examples) == expected[:6]
    assert len(set(expected)) > 1


def test_one_picture_is_seen_anew_when_something_else_is_asked(flat, examples):
    run, picture = config(), examples[0].images[0]
    asked = [heldout.ask(text, picture) for text in ("what?", "which?", "what?")]
    (batch,) = heldout.prompt_batches(run, asked)
    visual = Vision(run, flat)(batch)
    np.testing.assert_array_equal(visual[0], visual[2])
    assert not np.allclose(visual[0, 0], visual[1, 0])
