"""Exported folders say how their pictures are prepared."""

import json

import goldens
import numpy as np
import pytest
from PIL import Image

from vlm_jax.weights import conversion, files, processors

PICTURES = sorted(set(goldens.names()) & {*processors.PROCESSORS, "blip_2"})


def export(name: str, folder):
    """A golden model, in and out; its preset."""
    source = goldens.publish(goldens.read(name), folder / "source")
    stored = conversion.import_folder(source, folder / "model")
    conversion.export_folder(stored, folder / "exported")
    return stored.model.encoder


def test_the_preset_says_it_unless_the_publisher_did(tmp_path):
    encoder = export("llava", tmp_path)
    written = files.read_json(tmp_path / "exported/preprocessor_config.json")
    assert written["crop_size"] == {"height": encoder.size[0], "width": encoder.size[1]}
    assert written["image_mean"] == list(encoder.mean)
    config = files.read_json(tmp_path / "exported/processor_config.json")
    assert config["vision_feature_select_strategy"] == "default"
    assert config["num_additional_image_tokens"] == 1

    source = goldens.publish(goldens.read("llava"), tmp_path / "theirs")
    (source / "preprocessor_config.json").write_text(json.dumps({"size": 7}))
    stored = conversion.import_folder(source, tmp_path / "model")
    conversion.export_folder(stored, tmp_path / "again")
    assert files.read_json(tmp_path / "again/preprocessor_config.json") == {"size": 7}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_transformers_prepares_pictures_as_the_encoder_takes_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder = export(name, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "exported")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    found = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    if encoder.max_patches:
        assert found.shape[-1] <= max(encoder.size) or found.shape[-1] == encoder.patch**2 * 3
    else:
        assert found.shape[-2:] == encoder.size
