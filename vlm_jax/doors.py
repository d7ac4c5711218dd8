"""What every door shares: flags in, one call, an exit code (sysexits) and a message for people."""

import contextlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from vlm_jax import config as configs
from vlm_jax import schema
from vlm_jax.errors import ConfigError, VlmError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a door: a refusal ends with its exit code and its message, not with a traceback."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every rename
        try:
            main(argv)
        except VlmError as error:
            _refuse(error)

    app.run(guarded, flags_parser=_parse)


def no_arguments(argv: Sequence[str]) -> None:
    """Raises ConfigError where words follow the flags: most are flags without their dashes."""
    if len(argv) > 1:
        raise ConfigError(f"unexpected arguments {' '.join(argv[1:])!r}; flags start with --")


def config(flag: flags.FlagHolder) -> configs.Config:
    """The checked config of a `--config` flag.

    Raises:
      ConfigError: the file cannot be read, what it holds is wrong, or a stage has a value of its
        own for a field that was overridden.
    """
    try:
        found = configs.resolve(flag.value)
    except OSError as error:  # ml_collections reports a missing file when its value is read
        raise ConfigError(str(error)) from error
    configs.refuse_hidden(found, config_flags.get_override_values(flags.FLAGS[flag.name]))
    return found


def folder(value: str) -> Path:
    """The folder that a flag names.

    Raises:
      ConfigError: it is a URL.
    """
    if "://" in value:
        raise ConfigError(f"{value} is a URL; expected a folder, such as a mounted bucket's")
    return Path(value).expanduser().absolute()


def smaller_variant(flag: flags.FlagHolder) -> str:
    """How to run the `local` variant of the config of a `--config` flag; "" without one."""
    path, _, variant = flags.FLAGS[flag.name].config_filename.partition(":")
    words = "-".join(filter(None, [variant, "local"]))
    with contextlib.suppress(Exception):  # a file without variants may refuse the word as it likes
        if runpy.run_path(path)["get_config"](words):
            return f"--config={path}:{words} runs the same structure at tiny widths"
    return ""


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    # Config files and ml_collections raise what they like for a wrong file, variant or override.
    except (flags.Error, AttributeError, KeyError, ValueError, OSError) as error:
        _refuse(ConfigError(_explain(argv, error)))


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Names the override that no field of the config answers to, or else says what was raised."""
    known = schema.paths(configs.Config, "config")
    for argument in argv:
        override = re.match(r"--(config\.[^=\s]+)", argument)
        path = override and re.sub(r"\[.*", "", override[1])
        if path and path not in known and not path.startswith("config.data.mixture."):
            return schema.unknown_key(path, known)
    return f"{error} (python -m ... --help lists the flags)"


def _refuse(error: VlmError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
