"""Peak memory of importing a published checkpoint and of loading it onto devices.

    python benchmarks/import_memory.py

Writes a sharded Llama of 1.6B random bfloat16 parameters (about 10 GB of disk in all), imports it
in a process of its own, loads it in another onto one device and onto a mesh of four, and prints
the peak of each beside the parameters' bytes.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE, DEPTH = "llama3.2-1b", 22  # its width at 22 layers instead of 16
SHARD = 10**9
PIECE = 1 << 20
MEGABYTE = 1e6
ALLOWED = (1.15, 1e9)  # of the parameters' bytes, and bytes beside them


def publish(folder: pathlib.Path) -> int:
    """Writes the checkpoint; returns its parameters' bytes."""
    import jax
    import ml_dtypes
    import numpy as np

    from vlm_jax.config import Model
    from vlm_jax.models import params
    from vlm_jax.presets.decoders import decoder
    from vlm_jax.weights import files, registry, tables

    model = Model(decoder=decoder(SIZE, depth=DEPTH))
    known = registry.family("llama")
    wanted = tables.theirs_of(known.rows(model), params.abstract(model))
    noise = np.random.default_rng(0).normal(scale=0.02, size=PIECE).astype(ml_dtypes.bfloat16)
    shapes = {n: jax.ShapeDtypeStruct(t.shape, noise.dtype) for n, t in wanted.items()}

    def pieces(name: str):
        left = int(np.prod(shapes[name].shape))
        while left:
            yield noise[:left]
            left -= min(left, PIECE)

    folder.mkdir()
    files.write_shards(folder, shapes, pieces, SHARD)
    (folder / "config.json").write_text(json.dumps(known.write(model)))
    return sum(2 * int(np.prod(shape.shape)) for shape in shapes.values())


def load(folder: pathlib.Path, devices: int) -> None:
    """Loads the model onto a mesh and prints the process's peak memory in bytes."""
    import jax

    from vlm_jax.config import Parallel
    from vlm_jax.models import params
    from vlm_jax.parallel import mesh, sharding
    from vlm_jax.weights import store

    stored = store.open_model(folder)
    made = mesh.make(Parallel(data=1, fsdp=devices))
    places = sharding.named(made, params.abstract(stored.model), params.axes)
    leaves = store.load(stored, places)
    jax.block_until_ready(leaves)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def import_(source: pathlib.Path, target: pathlib.Path) -> None:
    """Imports and prints the process's peak memory in bytes."""
    from vlm_jax.weights import conversion

    conversion.import_folder(source, target)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(devices: int, *words: object) -> int:
    """Peak memory in bytes of a step of this program, run in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, *map(str, words)]
    return int(subprocess.check_output(command, env=environment, text=True).split()[-1])


def main() -> None:
    """Measures, or does one of the steps that are measured."""
    step, *words = sys.argv[1:] or ["measure"]
    if step == "import":
        return import_(*map(pathlib.Path, words))
    if step == "load":
        return load(pathlib.Path(words[0]), int(words[1]))
    with tempfile.TemporaryDirectory() as scratch:
        source, target = pathlib.Path(scratch) / "published", pathlib.Path(scratch) / "model"
        size = publish(source)
        limit = size * ALLOWED[0] + ALLOWED[1]
        print(f"parameters {size / MEGABYTE:,.0f} MB, allowed {limit / MEGABYTE:,.0f} MB")
        steps = {"import": (1, "import", source, target)}
        steps |= {f"load onto {n}": (n, "load", target, n) for n in (1, 4)}
        for name, (devices, *arguments) in steps.items():
            used = peak(devices, *arguments)
            print(f"{name:12} peak {used / MEGABYTE:,.0f} MB, {used / size:.2f} x parameters")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
