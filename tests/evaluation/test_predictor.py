import dataclasses
import io

import jax
import numpy as np
import pytest
import small
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from vlm_jax.data import heldout
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.predictor import Predictor
from vlm_jax.models import params, sampling


@pytest.fixture(scope="module")
def predictor():
    return Predictor(small.config(), small.parameters())


@pytest.fixture(scope="module")
def examples():
    return heldout.eval_examples(small.config(), "validation", "choice", 6)


def test_answers_are_those_of_uncached_greedy_generation(predictor, examples):
    config = predictor.config

    @jax.jit
    def uncached(flat, batch):
        vlm = params.build(config.model, flat)
        return sampling.greedy_uncached(vlm, batch, vlm.visual(batch.images), 3, predictor._end)

    expected = []
    for batch in heldout.prompt_batches(config, [heldout.prompt_of(e) for e in examples]):
        tokens = np.asarray(uncached(predictor.params, batch))
        expected += [predictor._text(row, [predictor._end]) for row in tokens]
    answers = predictor.answer(examples)
    assert answers == expected[:6]
    assert len(set(answers)) > 1  # or the comparison would say little


def test_an_end_of_several_tokens_is_left_out(tmp_path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "##"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("#", "#")]))  # "###" is ## #, as LLaMA's
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = small.config()
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path), template="vicuna_v0")
    one = Predictor(dataclasses.replace(config, data=data), small.parameters())
    for answer in ("a red fox", "a red fox###", "a red fox###Human: and"):
        assert one._text(np.array(one.tokenizer.encode(answer)), [one._end]) == "a red fox"


def test_generate_gives_the_answers_of_examples_in_order(predictor, examples):
    questions = [example.turns[0].parts[-1] for example in examples]
    pictures = [example.images for example in examples]
    assert predictor.generate(pictures, questions) == predictor.answer(examples)


def test_pictures_may_be_bytes_paths_or_pil_images(predictor, examples, tmp_path):
    encoded = examples[0].images[0]
    path = tmp_path / "picture.png"
    path.write_bytes(encoded)
    decoded = Image.open(io.BytesIO(encoded))
    forms = [encoded, path, str(path), decoded, [encoded], (decoded,)]
    assert len(set(predictor.generate(forms, ["what is it?"] * len(forms)))) == 1


def test_a_prompt_may_have_no_picture_or_several(predictor, examples):
    first, second = (example.images[0] for example in examples[:2])
    images = [None, [first, second], [second, first]]
    assert len(predictor.generate(images, ["which is it?"] * 3, max_new_tokens=2)) == 3


def test_one_entry_of_images_per_prompt_is_expected(predictor):
    with pytest.raises(ValueError, match="1 entries of images for 2 prompts"):
        predictor.generate([None], ["a", "b"])


def test_a_model_without_images_answers_the_question_alone(examples):
    blind = Predictor(small.blind(small.config()), small.parameters())
    question = "which is it?"
    images = [example.images for example in examples]
    assert len(set(blind.generate(images, [question] * len(images)))) == 1


def test_attention_is_a_distribution_over_patches_for_a_perceiver_only(predictor, examples):
    pictures = [example.images[0] for example in examples]
    maps = predictor.attention(pictures)
    assert maps.shape == (6, 3, 16)
    assert (maps >= 0).all() and (maps.sum(-1) <= 1 + 1e-5).all()
    assert not np.allclose(maps[0], maps[1])
    projector = Predictor(small.config("mlp"), small.parameters("mlp"))
    assert projector.attention(pictures) is None


def ask(predictor, examples, **options) -> list[str]:
    pictures = [example.images for example in examples]
    return predictor.generate(pictures, ["what is it?"] * len(pictures), 6, **options)


def test_a_reply_ends_before_a_stop_token_or_a_stop_string(predictor, examples):
    whole = ask(predictor, examples)
    reply = max(whole, key=len)
    assert len(reply) > 2
    middle = reply[1:-1]
    ended = ask(predictor, examples, stop=(middle,))
    assert ended == [text.split(middle)[0].strip() for text in whole]
    tokens = predictor.tokenizer.encode(reply)
    for text, cut in zip(whole, ask(predictor, examples, stop=(tokens[-1],)), strict=True):
        assert text.startswith(cut)
    assert whole != ask(predictor, examples, stop=(tokens[-1],))


def test_draws_follow_the_seed_and_the_place_of_the_prompt(predictor, examples):
    same = [examples[0]] * 6  # more than a batch
    options = {"temperature": 2.0, "top_k": 50}
    drawn = ask(predictor, same, seed=3, **options)
    assert len(set(drawn)) > 3
    assert drawn == ask(predictor, same, seed=3, **options)
    assert drawn[:2] == ask(predictor, same[:2], seed=3, **options)
    assert drawn != ask(predictor, same, seed=4, **options)


def test_one_beam_of_a_search_may_be_beaten_by_three(predictor, examples):
    searched = ask(predictor, examples, beams=3, length_penalty=0.0)
    assert len(searched) == 6
    assert searched != ask(predictor, examples)


def test_options_that_make_no_sense_are_refused(predictor, examples):
    with pytest.raises(ConfigError, match="top_p is 2; expected more than 0 and at most 1"):
        ask(predictor, examples, temperature=1.0, top_p=2)
