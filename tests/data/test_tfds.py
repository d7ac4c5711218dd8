"""Data sets that TFDS itself wrote: the same records as by its own reader, without TensorFlow."""

import io
import json
import subprocess
import sys

import corpora
import numpy as np
import pytest

from vlm_jax import config as configs
from vlm_jax.data import formats, images, preparation, tfds, validation
from vlm_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.slow  # TFDS comes with the extra `check`

COUNT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set like TFDS's coco_captions and like its visual questions, of two splits."""
    datasets = pytest.importorskip("tensorflow_datasets")
    features = datasets.features

    class Tiny(datasets.core.GeneratorBasedBuilder):
        VERSION = datasets.core.Version("1.0.0")

        def _info(self):
            text, image = features.Text(), features.Image(encoding_format="png")
            said = features.Sequence({"id": np.int64, "text": text})
            return datasets.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict({"image": image, "captions": said, "content": text}),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(COUNT), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for i in range(count):
                said = [{"id": i, "text": f"a{i}"}, {"id": i, "text": "b"}]
                picture = io.BytesIO(corpora.png(i))
                yield i, {"image": picture, "captions": said, "content": ""}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def opened(path):
    return formats.CorpusSource("own", configs.Corpus("tfds", {"all": str(path)}), "all")


def test_records_are_those_of_tfds_in_its_order(folder):
    import tensorflow_datasets

    source = opened(f"{folder}:train")
    theirs = tensorflow_datasets.builder_from_directory(folder).as_data_source("train")
    assert len(source) == len(theirs) == COUNT
    for index, record in enumerate(theirs):
        example = source.example(index, np.random.default_rng(0))
        (picture,) = example.images
        np.testing.assert_array_equal(images.decode(picture)[..., :3], record["image"])
        caption = record["captions"]["text"][0].decode()
        assert example.turns == corpora.told(("", caption))
        assert picture == corpora.png(int(caption[1:]))  # as it was stored
    assert "tensorflow" not in sys.modules
    assert not list(validation.problems(source)) and source.records.where(2).endswith("record 2")


def test_part_of_a_split_is_another_corpus(folder):
    whole, part = opened(f"{folder}:train"), opened(f"{folder}:train[:3]")
    assert len(part) == 3 and part.fingerprint != whole.fingerprint
    assert part.example(2, None).turns == whole.example(2, None).turns


def test_what_comes_in_goes_out(folder, tmp_path):
    corpus = configs.Corpus("tfds", {"all": f"{folder}:train"})
    manifest = preparation.run(corpus, tmp_path / "out", shard_bytes=1000)
    assert (manifest["records"], manifest["rejects"]) == (COUNT, {})


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "names no split; expected .*:SPLIT of train, test"),
        (":val", "has no split 'val'"),
        ("x:train", "features.json cannot be read"),
    ],
)
def test_what_is_no_split_is_refused(folder, path, message):
    with pytest.raises(DataError, match=message):
        opened(f"{folder}{path}")


def test_a_class_of_the_data_sets_own_is_never_imported(folder, tmp_path):
    for said in (
        {"pythonClassName": "antigravity.X", "text": {}},
        {"type": "antigravity.X", "content": "{}"},
        {"featuresDict": {"features": {"a": {"pythonClassName": "antigravity.X"}}}},
    ):
        (tmp_path / "features.json").write_text(json.dumps(said))
        with pytest.raises(DataError, match=r"names the class 'antigravity\.X'"):
            tfds.TfdsRecords(tmp_path)
    assert "antigravity" not in sys.modules


def test_without_tfds_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ConfigError, match="extra `tfds`"):
        opened(f"{folder}:train")


def test_the_door_reads_it(folder):
    command = [sys.executable, "-m", "vlm_jax.prepare", "validate", f"{folder}:test"]
    done = subprocess.run([*command, "--format=tfds"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 records, nothing wrong" in done.stdout
