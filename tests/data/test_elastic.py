"""The same stream for any number of hosts and of processes, before and after a resume."""

import io
import json

import jax
import numpy as np
import pytest
from batches import digest
from PIL import Image

from vlm_jax import config as c
from vlm_jax.data import lanes, pipeline
from vlm_jax.errors import ConfigError, DataError, PeerError
from vlm_jax.presets.resizing import Resize

LANES = 8


def jpeg(rng: np.random.Generator) -> bytes:
    height, width = rng.integers(5, 40, 2)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path, small):
    """Builds a config over two corpora of files, one with pictures of which two are spoiled."""
    rng = np.random.default_rng(5)
    shown, told = [], []
    for i in range(60):
        names = [f"{i}-{n}.jpg" for n in range(rng.integers(0, 4))]
        for n, name in enumerate(names):
            good = (i, n) not in ((7, 0), (31, 0))
            (tmp_path / name).write_bytes(jpeg(rng) if good else b"\xff\xd8 no more")
        answer = "word " * int(rng.integers(1, 9))
        ask = "<image>" * len(names) + f"what is {i}?"
        shown.append({"images": names, "messages": _messages(ask, answer)})
        told.append({"messages": _messages(f"say {i}", answer)})
    shown[7]["images"] = ["7-0.jpg"]
    shown[7]["messages"] = _messages("<image>spoiled?", "yes")
    (tmp_path / "7-0.jpg").write_bytes(b"")
    del told[11]["messages"]  # a record that makes no example
    corpora = {}
    for name, records in ("shown", shown), ("told", told):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        corpora[name] = c.Corpus("messages", {"train": str(path)})

    def build(**data) -> c.Config:
        fields = {
            "corpora": corpora,
            "mixture": {"shown": 2.0, "told": 1.0},
            "schedule": ({"start": 70, "mixture": {"shown": 1.0, "told": 1.0}},),
            "loss_weights": {"told": 0.5},
            "rows": 8,
            "lanes": LANES,
            "pool": 4,
            "bad_samples": 0.5,
        }
        fields["schedule"] = tuple(c.MixtureStage(**stage) for stage in fields["schedule"])
        return small(**{**fields, **data})

    return build


def _messages(ask: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def read(config, hosts: int, steps: int, state=None):
    """Digests of global batches, what was rejected for each, and the merged state at the end."""
    streams = [pipeline.train_stream(config, host=h, hosts=hosts) for h in range(hosts)]
    try:
        for stream in streams:
            if state is not None:
                stream.set_state(json.loads(json.dumps(state)))
        digests, rejected = [], []
        for _ in range(steps):
            batches, infos = zip(*map(next, streams), strict=True)
            digests.append(digest(jax.tree.map(lambda *rows: np.concatenate(rows), *batches)))
            rejected.append(sorted(bad for info in infos for bad in info.rejected))
        return digests, rejected, pipeline.merged([stream.get_state() for stream in streams])
    finally:
        for stream in streams:
            stream.close()


# Pictures keep their aspect ratio, up to nine patches, and share the patches of a row.
NATIVE = {
    "encoder": {"image_size": 12, "max_patches": 9, "resize": Resize("patches")},
    "patches_per_row": 24,
    "augment": c.Augment(crop=(0.4, 1.0), flip=0.5),
}


@pytest.mark.parametrize("pictures", [{}, NATIVE], ids=["squashed", "native"])
def test_any_number_of_hosts_reads_the_same_stream_and_takes_over_from_any_other(mixed, pictures):
    config = mixed(**pictures)
    whole, rejected, end = read(config, 1, 12)
    assert len(set(whole)) == 12 and sum(map(len, rejected)) >= 3
    for hosts in (2, 4, 8):
        assert read(config, hosts, 12) == (whole, rejected, end)
    digests, noted, state = [], [], None
    for hosts, steps in ((4, 5), (2, 3), (8, 4)):
        more, bad, state = read(config, hosts, steps, state)
        digests, noted = digests + more, noted + bad
    assert (digests, noted, state) == (whole, rejected, end)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_processes_read_the_same_stream_and_go_on_in_it(mixed, hosts, workers):
    whole, rejected, end = read(mixed(**NATIVE), 1, 9)
    at = int(np.random.default_rng(hosts + workers).integers(1, 9))
    config = mixed(workers=workers, threads=1, **NATIVE)
    first, noted, state = read(config, hosts, at)
    rest, more, last = read(config, hosts, 9 - at, state)
    assert (first + rest, noted + more, last) == (whole, rejected, end)


@pytest.mark.slow
def test_a_killed_reader_ends_the_run_instead_of_hanging_it(mixed):
    with pipeline.train_stream(mixed(workers=1)) as stream:
        next(stream)
        import multiprocessing

        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(PeerError, match="died or hangs"):
            for _ in range(40):
                next(stream)


def test_lanes_that_cannot_be_dealt_out_and_states_of_a_part_are_refused(mixed):
    with pytest.raises(ConfigError, match="lanes is 8; expected a multiple of 3 hosts"):
        pipeline.train_stream(mixed(), hosts=3)
    part = pipeline.train_stream(mixed(), host=1, hosts=2).get_state()
    with pytest.raises(ConfigError, match="lacks lane 0"):
        pipeline.train_stream(mixed()).set_state(part)
    with pytest.raises(ConfigError, match="has lanes 8, this config 4"):
        pipeline.train_stream(mixed(lanes=4)).set_state(part)


def test_every_host_counts_bad_samples_over_as_many_documents_of_its_own(mixed, monkeypatch):
    monkeypatch.setattr(lanes, "REJECT_WINDOW", 100)
    for hosts in (1, 4):
        read(mixed(bad_samples=0.2), hosts, 30)
        with pytest.raises(DataError, match=r"2 of the last \d+ samples .*allows 1 in 100"):
            read(mixed(bad_samples=0.01), hosts, 60)
