"""Every source in its real layout: its examples, what `validate` says, and what `run` keeps."""

import collections
import dataclasses

import corpora
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vlm_jax import config as configs
from vlm_jax import prepare
from vlm_jax.data import formats, images, pipeline, preparation, validation
from vlm_jax.errors import DataError


@pytest.fixture(params=corpora.MADE)
def made(request, tmp_path):
    (tmp_path / "in").mkdir()
    return corpora.MADE[request.param](tmp_path / "in")


def opened(corpus):
    return formats.CorpusSource("own", corpus, "all")


def seen(example):
    """The red values of an example's pictures and its turns."""
    return [int(images.decode(image)[0, 0, 0]) for image in example.images], example.turns


def test_every_record_is_the_example_it_should_be_or_bad(made):
    source = opened(made.corpus)
    assert len(source) == len(made.good) + len(made.bad)
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        if index in made.good:
            assert seen(source.example(index, np.random.default_rng(0))) == made.good[index]
    assert source.fingerprint == opened(made.corpus).fingerprint


def test_validate_names_place_and_reason(made):
    found = list(validation.problems(opened(made.corpus)))
    assert [problem.reason for problem in found] == [reason for reason, _ in made.bad.values()]
    for problem, (_, place) in zip(found, made.bad.values(), strict=True):
        assert problem.where.endswith(place) and problem.detail


def test_what_comes_in_goes_out_or_is_counted(made, tmp_path):
    manifest = preparation.run(made.corpus, tmp_path / "out", shard_bytes=2000)
    # Ids that stand twice are `validate`'s business.
    twice = [index for index, (reason, _) in made.bad.items() if reason == "duplicate_id"]
    reasons = collections.Counter(reason for i, (reason, _) in made.bad.items() if i not in twice)
    assert manifest["rejects"] == dict(sorted(reasons.items()))
    after = opened(configs.Corpus("shards", {"all": str(tmp_path / "out")}))
    kept = [i for i in range(len(made.good) + len(made.bad)) if i in made.good or i in twice]
    for number, index in enumerate(kept):
        example = after.example(number, np.random.default_rng(0))
        assert index in twice or seen(example) == made.good[index]
    assert len(after) == len(kept)


@pytest.mark.parametrize("name", ["cauldron", "obelics_jsonl"])
def test_a_run_counts_the_bad_and_learns_the_good(name, tmp_path, small):
    made = corpora.MADE[name](tmp_path)
    corpus = dataclasses.replace(made.corpus, paths={"train": made.corpus.paths["all"]})
    data = {"corpora": {"own": corpus}, "mixture": {"own": 1.0}, "bad_samples": 0.99}
    with pipeline.train_stream(small(**data, template="interleaved")) as stream:
        batches = [next(stream) for _ in range(4)]
    reasons = {reason for _, info in batches for _, reason in info.rejects}
    assert reasons == {reason for reason, _ in made.bad.values()}
    learned = {
        int(key.rsplit("/", 1)[1])
        for batch, info in batches
        for row, documents in enumerate(info.documents)
        for segment, (key, _) in enumerate(documents, 1)
        if batch.loss_weights[row][batch.segments[row] == segment].any()
    }
    assert learned == set(made.good)


def test_the_door_takes_every_format(made, capsys):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(format=made.corpus.format, images=made.corpus.images):
        with pytest.raises(DataError, match=f"^{len(made.bad)} of .* records have problems"):
            prepare.validate(made.corpus.paths["all"])
    said = capsys.readouterr().out
    for reason, place in made.bad.values():
        assert f"{place}: {reason}: " in said
