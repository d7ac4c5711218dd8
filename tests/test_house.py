"""The house itself: what each floor may load, what is installed, what the commands say."""

import ast
import importlib.metadata
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
CORE = {"jax", "flax", "jaxtyping", "numpy"}  # all that models and parallel need

# Imports every module of the packages given, in a process where some distributions do not exist.
IMPORT_ALL = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for package in {packages!r}:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), package + "."):
        importlib.import_module(found.name)
"""


def import_without(absent: set[str], packages: list[str]) -> None:
    program = IMPORT_ALL.format(absent=absent, packages=packages)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def closure(names: set[str]) -> set[str]:
    """The distributions that installing `names` brings, themselves included."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def imports(folder: pathlib.Path) -> dict[str, str]:
    """Top-level modules imported anywhere under a folder -> a file that does."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], str(path.relative_to(ROOT)))
    return found


def third_party(folder: pathlib.Path) -> dict[str, str]:
    """The imports that are neither Python's nor ours."""
    known = {"vlm_jax", *sys.stdlib_module_names}
    return {top: file for top, file in imports(folder).items() if top not in known}


@pytest.fixture(scope="module")
def packaging() -> types.SimpleNamespace:
    """What setup.py declares; setuptools itself need not be installed."""
    declared = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.setup = declared.update
    stand_in.find_packages = lambda include: include
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stand_in)
        runpy.run_path(str(ROOT / "setup.py"))
    return types.SimpleNamespace(**declared)


def pins(python: str, *files: str) -> dict[str, str]:
    """Name -> exact version that the files install under a version of Python, each named once."""
    found = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            requirement = Requirement(line)
            environment = {"python_version": python}
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            exact = re.fullmatch(r"==([^*,]+)", str(requirement.specifier))
            assert exact, f"{file}: {line} is not an exact pin"
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{file}: {name} is pinned twice"
            found[name] = exact[1]
    return found


PINNED = {
    "": ["requirements.txt"],
    "dev": ["requirements.txt", "requirements-dev.txt"],
    "check": ["requirements.txt", "requirements-dev.txt", "requirements-check.txt"],
    "prepare": ["requirements-beam.txt"],  # in an environment of its own
}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", PINNED)
def test_the_pins_keep_to_the_ranges_of_setup(packaging, python, extra):
    pinned = pins(python, *PINNED[extra])
    wanted = packaging.extras_require[extra] if extra else packaging.install_requires
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            version = pinned[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{requirement} but {version} is pinned"


def test_what_is_imported_is_what_is_installed(packaging):
    imported = third_party(ROOT / "vlm_jax")
    providers = importlib.metadata.packages_distributions()
    providers = {top: {canonicalize_name(d) for d in providers.get(top, [top])} for top in imported}
    extras = {
        canonicalize_name(Requirement(line).name)
        for lines in packaging.extras_require.values()
        for line in lines
    }
    needed = {canonicalize_name(Requirement(line).name) for line in packaging.install_requires}
    undeclared = {t: imported[t] for t, names in providers.items() if not names & (needed | extras)}
    assert not undeclared, f"imported but not in setup.py: {undeclared}"
    unused = needed - set.union(*providers.values())
    assert not unused, f"in setup.py but imported nowhere in vlm_jax: {unused}"


def test_what_the_tests_and_tools_import_is_pinned():
    pinned = pins("3.12", *PINNED["check"]).keys()
    providers = importlib.metadata.packages_distributions()
    for folder in ("tests", "tools", "configs"):
        ours = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"configs", "tests", "tools"}
        for top, file in third_party(ROOT / folder).items():
            names = {canonicalize_name(name) for name in providers.get(top, [top])}
            assert top in ours or names & pinned, f"{file} imports {top}, which is not pinned"


def test_models_and_parallel_name_only_jax_flax_jaxtyping_and_numpy():
    # qwix where kernels are held in few bits, and there alone: an extra, imported by the function.
    for room, extra in (("models", {"qwix": "vlm_jax/models/quantised.py"}), ("parallel", {})):
        found = third_party(ROOT / "vlm_jax" / room)
        assert {k: v for k, v in found.items() if k not in CORE} == extra


def test_models_and_parallel_import_where_nothing_else_is_installed():
    kept = closure(CORE)
    providers = importlib.metadata.packages_distributions()
    absent = {
        top for top, names in providers.items() if not {canonicalize_name(n) for n in names} & kept
    }
    assert "grain" in absent and "ml_collections" in absent
    import_without(absent - {"vlm_jax"}, ["vlm_jax.models", "vlm_jax.parallel"])


def test_data_and_plain_data_import_where_jax_is_not_installed():
    plain = ["vlm_jax.presets", "vlm_jax.config", "vlm_jax.batch", "vlm_jax.errors"]
    import_without({"jax", "jaxlib", "flax", "optax", "orbax"}, ["vlm_jax.data", *plain])


def test_nothing_is_pickled():
    pickles = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
    assert not {k: v for k, v in imports(ROOT / "vlm_jax").items() if k in pickles}


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_make_demo_installs_the_run_requirements_only(tmp_path):
    shown = make("demo", f"VENV={tmp_path}/env").stdout
    assert re.findall(r"-r (\S+)", shown) == ["requirements.txt"]
    assert "-m vlm_jax.main --config=configs/tiny.py --workdir=runs/tiny" in shown


def test_make_says_what_to_do_where_no_python_is_found(tmp_path):
    result = make("demo", f"VENV={tmp_path}/env", "PYTHON=")
    assert result.returncode != 0
    assert "make PYTHON=/path/to/python3" in result.stderr
