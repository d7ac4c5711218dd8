"""Writes requirements*.txt: exact versions of all that the targets of the Makefile install.

    python tools/pins.py python3.11 python3.12

Each Python resolves setup.py in a clean environment, one stage after the other, each stage held to
the versions of the one before. Apache Beam needs older versions than the rest: it has an
environment of its own. Where the first Python's version differs from the second's, both
lines carry a marker.
"""

import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of each environment: file -> the extras of setup.py that it adds, and what it is for
ENVIRONMENTS = (
    {
        "requirements.txt": ("", "`make demo` installs"),
        "requirements-dev.txt": ("dev", "`make test` installs after requirements.txt"),
        "requirements-check.txt": ("check", "`make check` installs after requirements-dev.txt"),
    },
    {"requirements-beam.txt": ("prepare,dev", "`make beam` installs in an environment of its own")},
)
HEADER = """\
# Exact versions of what {who}, resolved on Linux x86-64 from setup.py.
# Written by `make pins` (tools/pins.py); change setup.py, not this file.
"""
# The CUDA libraries of torch follow the build that pip finds: a CPU build has none.
UNPINNED = ("cuda-", "nvidia-", "triton")


def freeze(python: pathlib.Path) -> dict[str, str]:
    """Installed distributions as name -> version, without vlm_jax, CUDA and local labels."""
    listing = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
    pins = dict(line.split("==") for line in listing.splitlines() if "==" in line)
    # `+cpu` names a build that only some indexes have; plain pip must find the version too.
    return {
        name: version.split("+")[0]
        for name, version in pins.items()
        if not name.startswith(UNPINNED)
    }


def resolve(
    python: str, stages: dict[str, tuple[str, str]], folder: pathlib.Path
) -> list[dict[str, str]]:
    """The pins that each stage of an environment adds under one Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin/python"
    constraints = folder / "constraints.txt"
    added, known = [], {}
    for extras, _ in stages.values():
        constraints.write_text("".join(f"{n}=={v}\n" for n, v in known.items()))
        target = f"{ROOT}[{extras}]" if extras else str(ROOT)
        command = [inside, "-m", "pip", "install", "-q", "--no-compile", "-c", constraints, target]
        subprocess.run(command, check=True)
        pins = freeze(inside)
        added.append({name: pins[name] for name in pins if name not in known})
        known = pins
    return added


def merge(old: dict[str, str], new: dict[str, str]) -> str:
    """Lines of a requirements file for both sides of Python 3.12."""
    lines = []
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) == new.get(name):
            lines.append(f"{name}=={old[name]}")
            continue
        if name in old:
            lines.append(f'{name}=={old[name]}; python_version < "3.12"')
        if name in new:
            lines.append(f'{name}=={new[name]}; python_version >= "3.12"')
    return "\n".join(lines) + "\n"


def main(pythons: list[str]) -> None:
    if len(pythons) != 2:
        sys.exit(f"expected two Pythons, 3.11 and a newer one, got {pythons}")
    for stages in ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as scratch:
            pins = [
                resolve(p, stages, pathlib.Path(scratch, str(i))) for i, p in enumerate(pythons)
            ]
        for (file, (_, who)), old, new in zip(stages.items(), *pins):
            (ROOT / file).write_text(HEADER.format(who=who) + merge(old, new))


if __name__ == "__main__":
    main(sys.argv[1:])
