"""Streams: order, resume, bad samples."""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from batches import digest, with_pictures

from vlm_jax.batch import Batch
from vlm_jax.data import images, pipeline, sources, tokenizer
from vlm_jax.errors import ConfigError, DataError

TOKENIZER = tokenizer.load("embedded")


def first(config, count: int) -> list[tuple[Batch, pipeline.Info]]:
    with pipeline.train_stream(config) as stream:
        return [next(stream) for _ in range(count)]


def test_batches_are_a_function_of_seed_and_step_whatever_the_threads(small, spoiled):
    runs = [[digest(b) for b, _ in first(small(threads=t), 6)] for t in (0, 1, 2)]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) == 6
    assert runs[0] != [digest(b) for b, _ in first(small(seed=8), 6)]


@pytest.mark.parametrize(("threads", "views"), [(0, 1), (1, 1), (2, 1), (2, 2)])
def test_a_stream_goes_on_where_its_state_says(small, spoiled, threads, views):
    spoiled[2] = b"bad"  # resuming must not count it twice, nor forget it
    config = small(threads=threads, views=views, bad_samples=0.5)
    rng = np.random.default_rng(threads)
    with pipeline.train_stream(config) as stream:
        states, batches = [stream.get_state()], []
        for _ in range(12):
            batches.append(next(stream))
            states.append(json.loads(json.dumps(stream.get_state())))
        for at in rng.integers(0, 10, 3):
            fresh = pipeline.train_stream(config)
            for resumed in (fresh, stream):
                resumed.set_state(states[at])
                assert resumed.get_state() == states[at]
                for k in (at, at + 1):
                    batch, info = next(resumed)
                    assert digest(batch) == digest(batches[k][0])
                    assert info == batches[k][1]
                    assert resumed.get_state() == states[k + 1]
            fresh.close()


def test_a_state_of_another_stream_is_refused_by_name(small, spoiled):
    with pipeline.train_stream(small()) as stream:
        state = stream.get_state()
    changes = {
        "tokens": ({"tokens": 128}, "tokens 96, this config 128"),
        "seed": ({"seed": 9}, "seed 7, this config 9"),
        "mixture": ({"mixture": {"made:one": 1.0}}, "mixture .*'made:two'"),
        "pool": ({"pool": 13}, "pool 12, this config 13"),
        "views": ({"views": 2}, "views 1, this config 2"),
    }
    for change, message in changes.values():
        with pytest.raises(ConfigError, match=message):
            pipeline.train_stream(small(**change)).set_state(state)
    pipeline.train_stream(small(threads=2, bad_samples=0.5)).set_state(state)


def test_every_document_is_seen_once_an_epoch_in_the_weights_asked_for(small, spoiled):
    seen = collections.Counter(
        document for _, info in first(small(), 24) for row in info.documents for document in row
    )
    one = sum(count for (_, source), count in seen.items() if source == "one")
    two = sum(count for (_, source), count in seen.items() if source == "two")
    # Each source goes round its 23 examples; the packer holds back at most its pool.
    assert len(seen) == 46 and max(seen.values()) - min(seen.values()) <= 2 + 23 * 2 / 10
    assert abs(one - 2 * two) <= 12
    by_source = {
        source: [count for (_, name), count in seen.items() if name == source]
        for source in ("one", "two")
    }
    for counts in by_source.values():
        assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_picture_is_counted_and_changes_no_other_sample(small, spoiled, threads):
    config = small(threads=threads, bad_samples=1.0)
    good = first(config, 10)
    spoiled[3] = b"not a picture"
    bad = first(config, 10)
    rejects = collections.Counter()
    hit = 0
    for (a, good_info), (b, bad_info) in zip(good, bad, strict=True):
        assert good_info.documents == bad_info.documents and not good_info.rejects
        rejects.update(bad_info.rejects)
        keys = [[key for key, _ in row] for row in good_info.documents]
        for row, names in enumerate(keys):
            own = np.isin(a.segments[row], [i + 1 for i, n in enumerate(names) if n == "one/3"])
            hit += own.any()
            for field in Batch._fields[:7]:
                same = getattr(a, field)[row] == getattr(b, field)[row]
                assert same.all() or (field == "loss_weights" and same[~own].all())
            assert a.loss_weights[row, own].any() == own.any()
            assert not b.loss_weights[row, own].any()
            slots = np.unique(a.image_index[row, own & (a.image_index[row] >= 0)])
            hidden = np.isin(a.images.patch_images[row], slots)
            np.testing.assert_array_equal(
                a.images.patches[row, ~hidden], b.images.patches[row, ~hidden]
            )
            assert not b.images.patches[row, hidden].any()
    assert hit and set(rejects) == {("one", "not_an_image")}
    assert rejects["one", "not_an_image"] >= 3 * hit


@pytest.mark.parametrize("threads", [0, 2])
def test_what_waits_for_a_row_is_not_decoded(small, spoiled, monkeypatch, threads):
    config = small(pool=40, threads=threads)
    shown = [int((batch.images.grids[..., 0] > 0).sum()) for batch, _ in first(config, 4)]
    decoded = []
    picture = images.picture
    monkeypatch.setattr(images, "picture", lambda given: decoded.append(1) or picture(given))
    stream = pipeline.train_stream(config)
    made = stream._made()  # no batch is made ahead of its use, but one is begun where threads are
    for _ in range(3):
        next(made)
    made.close()
    assert sum(shown[:3]) <= len(decoded) <= sum(shown[: 4 if threads else 3])


def test_too_many_bad_samples_end_the_run(small, spoiled):
    spoiled.update(dict.fromkeys(range(23), b""))
    # About 2/3 of the mixture times 3/4 with images are bad; 20 of 10,000 may be.
    with pytest.raises(DataError, match=r"21 of the last \d+ samples .*allows 20 in 10000.*empty"):
        first(small(bad_samples=0.002, threads=2), 50)
    assert DataError.exit_code == 65


@pytest.mark.parametrize("threads", [0, 2])
def test_a_corpus_that_fits_no_row_ends_the_run(small, spoiled, threads):
    with pytest.raises(DataError, match=r"21 of the last 21 samples .*too_many_tokens"):
        first(small(tokens=4, bad_samples=0.002, threads=threads), 1)


def test_bad_samples_end_the_run_at_the_same_batch_whatever_the_threads(small, spoiled):
    spoiled.update(dict.fromkeys(range(0, 23, 2), b""))
    ends = []
    for threads in (0, 2):
        config = small(tokens=34, bad_samples=0.003, threads=threads)
        with pipeline.train_stream(config) as stream:
            batches = 0
            with pytest.raises(DataError, match=r"allows 30 in 10000"):
                for _ in stream:
                    batches += 1
        ends.append(batches)
    assert ends[0] == ends[1] > 1


def test_a_batch_with_nothing_to_learn_names_its_samples(small, spoiled):
    spoiled.update(dict.fromkeys(range(23), b""))
    config = small(mixture={"made:one": 1.0}, bad_samples=1.0, tokens=24, rows=1)
    with pytest.raises(DataError, match=r"nothing to learn from .*'empty'.*one/\d"):
        first(config, 30)


def test_no_picture_looks_the_same_in_two_epochs(small, spoiled):
    shown = collections.defaultdict(list)
    for batch, info in first(small(mixture={"made:one": 1.0}, rows=2), 30):
        for row, names in enumerate(info.documents):
            for segment, (key, _) in enumerate(names, start=1):
                at = (batch.segments[row] == segment) & (batch.image_index[row] >= 0)
                for slot in np.unique(batch.image_index[row, at])[:1]:
                    here = batch.images.patch_images[row] == slot
                    shown[key].append(batch.images.patches[row, here].tobytes())
    assert min(map(len, shown.values())) >= 2
    for looks in shown.values():
        assert len(set(looks)) == len(looks)


def test_views_of_one_thing_share_a_batch(small):
    def partners(views):
        config = small(**with_pictures(views=views, rows=16, tokens=160, images_per_row=8))
        things = collections.Counter()
        for _, info in first(config, 2):
            seen = [key.rpartition("-")[0] for row in info.documents for key, _ in row]
            things.update(collections.Counter(seen).values())
        return things

    # Only what the packer holds back, and a pair that straddles two batches, stands alone.
    apart, together = partners(1), partners(2)
    assert apart[2] < 10 < 90 < together[2] and not together[3]
    assert together[1] < 20


def test_what_is_cut_is_counted_and_learned_from(small, spoiled):
    config = small(mixture={"made:one": 1.0}, tokens=40, overlong="truncate", bad_samples=1.0)
    cut = collections.Counter()
    for batch, info in first(config, 12):
        cut.update(info.truncated)
        assert batch.loss_weights.any(axis=1).all()
    kept = first(
        dataclasses.replace(config, data=dataclasses.replace(config.data, overlong="reject")), 12
    )
    refused = sum(info.rejects.get(("one", "too_many_tokens"), 0) for _, info in kept)
    assert cut.keys() == {"one"} and cut["one"] > 3 and refused > 3


def test_text_only_batches_have_no_visual_tokens_and_no_images(small, spoiled):
    for batch, _ in first(small(images=False), 3):
        assert (batch.visual_index == -1).all() and (batch.image_index == -1).all()
        assert not (batch.tokens == TOKENIZER.image).any() and batch.loss_weights.any()
        assert batch.images.grids.shape == (3, 0, 2) and batch.images.patches.shape == (3, 0, 48)


def test_closing_ends_the_threads(small, spoiled):
    before = set(threading.enumerate())
    stream = pipeline.train_stream(small(threads=2))
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()


def test_unknown_sources_name_the_nearest(small):
    with pytest.raises(ConfigError, match="did you mean emoji:caption"):
        pipeline.train_stream(small(mixture={"emoji:captions": 1.0}))
    with pytest.raises(ConfigError, match="it has train, validation"):
        sources.open_source("emoji:caption", "test")


def test_a_decoder_smaller_than_its_tokenizer_is_refused(small):
    config = small(**with_pictures())
    decoder = dataclasses.replace(config.model.decoder, vocab=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    with pytest.raises(ConfigError, match=r"decoder\.vocab is 64; the tokenizer 'embedded' needs"):
        pipeline.train_stream(config)


def test_importing_the_pipeline_loads_no_jax():
    code = "import sys, vlm_jax.data.pipeline; sys.exit('jax' in sys.modules)"
    root = pathlib.Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
