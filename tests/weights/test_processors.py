"""Exported folders say how their pictures are prepared."""

import dataclasses
import json

import goldens
import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import images
from vlm_jax.presets.resizing import SQUASH, Resize
from vlm_jax.weights import conversion, files, processors

PICTURES = sorted(set(goldens.names()) & {*processors.PROCESSORS, "blip_2"})


def export(name: str, folder, resize: Resize = SQUASH):
    """A golden model, in and out, its pictures resized like this; its preset."""
    source = goldens.publish(goldens.read(name), folder / "source")
    stored = conversion.import_folder(source, folder / "model")
    encoder = dataclasses.replace(stored.model.encoder, resize=resize)
    model = dataclasses.replace(stored.model, encoder=encoder)
    conversion.export_folder(dataclasses.replace(stored, model=model), folder / "exported")
    return encoder


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


# Modes of families whose processor has them, by the side of the golden's images.
CHOSEN = {
    "llava": lambda side: Resize("pad"),
    "clip": lambda side: Resize("crop", shortest=side + 5),
    "llava_next": lambda side: Resize(
        "pinpoints", pinpoints=((side, 2 * side), (2 * side, side), (2 * side, 2 * side))
    ),
    "idefics2": lambda side: Resize("quarters", filter="bilinear", shortest=side // 2),
    "idefics3": lambda side: Resize("grid", filter="lanczos", longest=2 * side),
    "siglip2": lambda side: Resize("patches", filter="bilinear"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_transformers_prepares_pictures_as_the_run_did(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    side = export(name, tmp_path / "first").size[0]
    encoder = export(name, tmp_path, CHOSEN[name](side))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "exported")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    (ours,) = images.fit_all(picture, (encoder,))
    found = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])
    if name == "siglip2":
        flat = images.patchify(ours[0], encoder.patch)
        np.testing.assert_allclose(found[0, : len(flat)], flat, atol=2.01 / 255)
        return
    found = found.reshape(-1, *found.shape[-3:])
    assert len(found) == len(ours)
    for view, theirs in zip(ours, found, strict=True):
        height, width = view.shape[:2]
        seen = np.moveaxis(theirs, 0, -1)[:height, :width]
        np.testing.assert_allclose(view, seen, atol=1.01 / 255 / min(encoder.std))
