"""Running a model whose leaves came from a file, and checking that a table of names is whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch, Images
from vlm_jax.config import Model
from vlm_jax.models import params
from vlm_jax.weights import tables


def shapes(model: Model, tower: str = "") -> dict[str, tuple[int, ...]]:
    """Of our leaves, by paths relative to the tower ("decoder/")."""
    return {
        path.removeprefix(tower): leaf.shape
        for path, leaf in params.abstract(model).items()
        if path.startswith(tower)
    }


def everything(source) -> dict[str, np.ndarray]:
    """All tensors of a file by name."""
    return {name: source.read(name) for name in source.shapes}


def assert_whole(rows, source, wanted: dict[str, tuple[int, ...]], carried=()) -> dict:
    """Every leaf and every tensor has its row, both ways give the same bits; returns the leaves."""
    assert tables.uncovered(rows, wanted, source.shapes, carried) == ([], [])
    found = everything(source)
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        name: (shape, source.dtypes[name]) for name, shape in source.shapes.items()
    }
    leaves = tables.gather(rows, wanted, found)
    assert {path: leaf.shape for path, leaf in leaves.items()} == wanted
    back = tables.scatter(rows, leaves)
    for name, array in back.items():
        assert array.dtype == found[name].dtype and array.shape == found[name].shape, name
        assert array.tobytes() == found[name].tobytes(), name
    return leaves


def float32(model: Model) -> Model:
    """The model, computing in float32."""
    parts = {"encoder": model.encoder, "connector": model.connector, "decoder": model.decoder}
    exact = {
        name: dataclasses.replace(part, dtype="float32") for name, part in parts.items() if part
    }
    return dataclasses.replace(model, **exact)


def text(tokens: np.ndarray) -> Batch:
    """Rows of one document each, without images."""
    rows, length = tokens.shape
    fill = lambda value: np.full((rows, length), value, np.int32)  # noqa: E731
    return Batch(
        tokens=tokens.astype(np.int32),
        segments=fill(1),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        loss_weights=np.ones((rows, length), np.float32),
        blocks=fill(0),
        visual_index=fill(-1),
        image_index=fill(-1),
        image_texts=np.zeros((rows, 0, 0), np.int32),
        images=Images(np.zeros((rows, 0, 2), np.int32)),
    )


def logits(model: Model, leaves: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Of a decoder whose leaves are named relative to it."""
    model = float32(model)
    flat = {f"decoder/{path}": jnp.asarray(leaf) for path, leaf in leaves.items()}

    def run(flat, batch):
        vlm = params.build(model, flat)
        return vlm.unembed(vlm.hidden(batch, None))

    return np.asarray(jax.jit(run)(flat, text(tokens)))


def features(model: Model, leaves: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Of an encoder [n, P, E], for pixels [n, H, W, 3]; a connector's if the model has one."""
    model = float32(model)
    encoder = model.encoder
    flat = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()}
    (rows, columns), p = encoder.grid, encoder.patch
    patches = pixels.reshape(len(pixels), rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(len(pixels), rows * columns, -1)
    images = Images(np.full((len(pixels), 1, 2), encoder.grid, np.int32), patches=patches)

    def run(flat, images):
        vlm = params.build(model, flat)
        if model.connector is None:
            return vlm.features((images,))[0].x
        return vlm.visual(images)[:, 0]

    return np.asarray(jax.jit(run)(flat, images))


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """The relative error of the whole, ||ours - theirs|| / ||theirs||."""
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= tolerance, error
