"""A study: every cell of a config file of configs/studies/, and the table of what they came to.

python -m vlm_jax.study --config=configs/studies/smol.py --workdir=runs/studies/smol

`--cells=mlp,linear` runs these alone. Each is a run in a folder of its own, as `main` makes it. The
same command again goes on where it was cut off, and leaves alone what is done.
"""

import runpy
from collections.abc import Sequence

from absl import flags

from vlm_jax import doors
from vlm_jax.errors import ConfigError, StorageError

_FILE = flags.DEFINE_string("config", None, "File of configs/studies/.", allow_override=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.", allow_override=True)
_CELLS = flags.DEFINE_list("cells", [], "The cells to run; by default all of them.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Runs what is not done, and compares."""
    from vlm_jax.studies import cells, table

    doors.no_arguments(argv)
    workdir = doors.folder(_WORKDIR.value)
    study = _read(_FILE.value)
    every, wanted = cells.of(study, workdir), cells.of(study, workdir, _CELLS.value)
    try:
        cells.run(_FILE.value, wanted)
    finally:  # what is done is worth its table, whatever became of the rest
        try:
            print(table.write(workdir, every))
        except OSError as error:
            raise StorageError(f"{workdir}: the table cannot be written: {error}") from error


def _read(file: str) -> dict:
    try:
        return runpy.run_path(file)
    except OSError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    doors.run(main)
