"""Writes tests/goldens/torch_{legacy,zip}.pth: what TENSORS of test_torch_legacy.py says.

    PYTHONPATH=. python tests/weights/make_torch_goldens.py

Needs torch (2.13.0 made those of the repository).
"""

import collections

import torch
from test_torch_legacy import GOLDENS, TENSORS


def state() -> dict:
    """The tensors as torch's; one is a transposed view, two share a storage, one is a parameter."""
    made = collections.OrderedDict()
    for name, array in TENSORS.items():
        if array.dtype.name == "bfloat16":
            made[name] = torch.from_numpy(array.astype("float32")).to(torch.bfloat16)
        else:
            made[name] = torch.from_numpy(array.copy())
    made["transposed"] = torch.from_numpy(TENSORS["transposed"].T.copy()).t()
    made["middle"] = made["whole"][2:5]
    made["parameter"] = torch.nn.Parameter(made["parameter"])
    made._metadata = {"": {"version": 1}}
    return made


def main() -> None:
    """Writes both containers."""
    for name, zipped in {"legacy": False, "zip": True}.items():
        torch.save(state(), GOLDENS / f"torch_{name}.pth", _use_new_zipfile_serialization=zipped)


if __name__ == "__main__":
    main()
