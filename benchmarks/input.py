"""The whole input side on one core, beside a bare loop and two other pipelines on the same JPEGs.

    python -m benchmarks.input                  # images/s: 500 x 375 JPEGs to 384 x 384 pixels
    python -m benchmarks.input --memory=20000   # resident memory over so many samples
    python -m benchmarks.input --start=1000000  # seconds to the first batch from so many records
    python -m benchmarks.input --pool=1024      # both of a packer that chooses from so many

Speed: one process on one core, the sides in turns over the same captioned pictures; images per
second of the process's CPU clock, medians over rounds. `bare` decodes and resizes by the functions
that the pipeline calls and throws the bytes away; `vlm_jax` is the training stream of prepared
shards: records, template, tokens, pixels, packing, batches of one row of 8 pictures, in bytes that
the model normalises. `webdataset` reads the same pictures from a
tar, decodes and resizes with Pillow and normalises with numpy; `datasets` reads them from an Arrow
table through transformers' SigLIP image processor (Pillow's backend). Neither makes tokens.
Needs webdataset, datasets and transformers beside what a run needs; a side that is not
installed is skipped.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.pictures import photograph
from vlm_jax import config as c
from vlm_jax.data import images, pipeline, preparation
from vlm_jax.presets.connectors import resampler
from vlm_jax.presets.decoders import decoder
from vlm_jax.presets.encoder_sizes import published

SIZE, BATCH, PICTURES = 384, 8, 1000
ENCODER = published("siglip-b16", image_size=SIZE)

# Yields the number of images of one batch after the other, without end.
Side = Callable[[Path], Iterator[int]]


def bare(folder: Path) -> Iterator[int]:
    """Decode and resize alone."""
    for data in itertools.cycle(_jpegs(folder)):
        picture = images.picture(data)
        plans = images.plans((picture.height, picture.width), (ENCODER,))
        images.see(picture, plans, (ENCODER,))
        yield 1


def ours(folder: Path, **data) -> Iterator[int]:
    """The training stream."""
    corpus = c.Corpus("shards", {"train": str(folder / "shards")})
    with pipeline.train_stream(config(corpus, **data)) as stream:
        for batch, _ in stream:
            yield int((batch.images.grids[..., 0] > 0).sum())


def webdataset(folder: Path) -> Iterator[int]:
    """WebDataset with Pillow."""
    import webdataset as wds
    from PIL import Image

    def pixels(image):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return (np.asarray(image, np.float32) / 255 - 0.5) / 0.5

    dataset = (
        wds.WebDataset(str(folder / "pictures.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(pixels, lambda text: text)
        .batched(BATCH)
    )
    while True:
        for batch, _ in dataset:
            yield len(batch)


def datasets(folder: Path) -> Iterator[int]:
    """Hugging Face datasets with an image processor."""
    import datasets as hf
    from transformers import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    rows = {
        "image": [{"bytes": data, "path": None} for data in _jpegs(folder)],
        "caption": ["a picture"] * PICTURES,
    }
    features = hf.Features({"image": hf.Image(), "caption": hf.Value("string")})
    dataset = hf.Dataset.from_dict(rows, features=features)

    def processed(batch):
        return processor(batch["image"], return_tensors="np") | {"caption": batch["caption"]}

    dataset = dataset.with_transform(processed)
    while True:
        for batch in dataset.iter(BATCH):
            yield len(batch["pixel_values"])


SIDES: dict[str, Side] = {
    "bare": bare,
    "vlm_jax": ours,
    "webdataset": webdataset,
    "datasets": datasets,
}


def config(corpus: c.Corpus, **data) -> c.Config:
    """A run on captioned pictures: SigLIP, 64 visual tokens of a picture, a small decoder."""
    model = c.Model(ENCODER, resampler("idefics2"), decoder("mistral-7b"))
    fields = {
        "corpora": {"own": corpus},
        "mixture": {"own": 1.0},
        "rows": 1,
        "tokens": 640,
        "images_per_row": BATCH,
        "threads": 0,
    }
    return c.Config("input", model, c.Data(**{**fields, **data}))


def speed(rounds: int, seconds: float) -> None:
    """Prints images per second of CPU time, and each side's share of the bare loop's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, PICTURES)
        running = {name: side for name in SIDES if (side := _started(name, folder))}
        rates = {name: [] for name in running}
        for _ in range(rounds):
            for name, side in running.items():
                rates[name].append(_rate(side, seconds))
    base = statistics.median(rates["bare"])
    print(f"{'side':12} {'images/s':>9} {'of bare':>8}")
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:12} {median:9.1f} {median / base:8.1%}")


def memory(samples: int) -> None:
    """Prints resident memory while the stream gives that many samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, PICTURES)
        seen, step, found = 0, max(samples // 10, 1), []
        for count in ours(folder):
            seen += count
            if seen >= step * (len(found) + 1):
                found.append(_resident())
                print(f"{seen:8} samples {found[-1]:8.1f} MB")
            if seen >= samples:
                break
    print(f"from the first tenth to the end: {found[-1] - found[0]:+.1f} MB")


def pool(documents: int) -> None:
    """Prints seconds to the first batch that is chosen from so many, and memory after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, PICTURES)
        next(ours(folder))  # what is imported late is imported before the clock starts
        before, begun = _resident(), time.perf_counter()
        stream = ours(folder, pool=documents)
        next(stream)
        seconds = time.perf_counter() - begun
        print(f"{documents} documents: first batch after {seconds:.2f} s, ", end="")
        print(f"{_resident() - before:+.1f} MB")


def start(records: int) -> None:
    """Prints seconds from a config to its first batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, PICTURES)
        path = folder / "many.jsonl"
        with path.open("w") as file:
            file.writelines(_line(i % PICTURES) for i in range(records))
        next(ours(folder))  # what is imported late is imported before the clock starts
        begun = time.perf_counter()
        with pipeline.train_stream(config(c.Corpus("messages", {"train": str(path)}))) as stream:
            opened = time.perf_counter()
            next(stream)
        first = time.perf_counter()
    size = f"{records} records of {records * len(_line(0)) / 1e6:.0f} MB"
    print(f"{size}: opened in {opened - begun:.2f} s, first batch after {first - begun:.2f} s")


def main() -> None:
    """Measures what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a side in a round")
    parser.add_argument("--memory", type=int, default=0, help="samples")
    parser.add_argument("--start", type=int, default=0, help="records")
    parser.add_argument("--pool", type=int, default=0, help="documents")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    if options.memory:
        memory(options.memory)
    elif options.start:
        start(options.start)
    elif options.pool:
        pool(options.pool)
    else:
        speed(options.rounds, options.seconds)


def _write(folder: Path, count: int) -> None:
    """Captioned pictures as files with their JSONL, as a tar and as prepared shards."""
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for i in range(count):
            data = photograph(i, 500, 375)
            (folder / f"{i}.jpg").write_bytes(data)
            for suffix, content in ("jpg", data), ("txt", b"a picture"):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path = folder / "train.jsonl"
    path.write_text("".join(_line(i) for i in range(count)))
    corpus = c.Corpus("messages", {"all": str(path)})
    preparation.run(corpus, folder / "shards", shard_bytes=10**8)


def _line(picture: int) -> str:
    said = [
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "a picture"},
    ]
    return json.dumps({"images": [f"{picture}.jpg"], "messages": said}) + "\n"


def _jpegs(folder: Path) -> list[bytes]:
    return [(folder / f"{i}.jpg").read_bytes() for i in range(PICTURES)]


def _started(name: str, folder: Path) -> Iterator[int] | None:
    """A side that gave its first batch: what it imports and opens is not measured."""
    side = SIDES[name](folder)
    try:
        next(side)
    except ImportError as missing:
        print(f"{name} is skipped: {missing}")
        return None
    return side


def _rate(side: Iterator[int], seconds: float) -> float:
    begun, count = time.process_time(), 0
    while time.process_time() - begun < seconds:
        count += next(side)
    return count / (time.process_time() - begun)


def _resident() -> float:
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
