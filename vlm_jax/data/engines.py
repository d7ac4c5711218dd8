"""Who does the work of a preparation: a table from an engine's name to what calls a function.

An engine calls one function with every task. The functions are pure: what they write depends on
the task alone, so it does not matter where they run, in what order, or whether one runs twice.
"""

import concurrent.futures
import multiprocessing
import os
import re
import shlex
import threading
from collections.abc import Callable, Sequence

from vlm_jax import errors
from vlm_jax.errors import ConfigError, StorageError, VlmError


def local(function: Callable, tasks: Sequence, *, workers: int = 0, beam_options: str = "") -> None:
    """Calls `function` with each task in this process, or in `workers` others of this machine."""
    if beam_options:
        raise ConfigError(f"the engine local was given --beam_options={beam_options}; use beam")
    if not workers:
        for task in tasks:
            function(task)
        return
    # Spawned: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        try:
            for done in [pool.submit(function, task) for task in tasks]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or it first does all the other tasks
            raise


def beam(function: Callable, tasks: Sequence, *, workers: int = 0, beam_options: str = "") -> None:
    """Calls `function` with each task on a runner of Apache Beam.

    Workers on other machines need this package and the folders of corpus and output at the same
    paths, such as a mounted bucket's.

    Args:
      function, tasks: sent to the workers, pickled by Beam.
      workers: of Beam's own in-process runner, where the options say nothing else.
      beam_options: as on a command line, e.g. "--runner=DataflowRunner --project=...".

    Raises:
      ConfigError: Apache Beam is not installed.
      StorageError: the runner failed; or what the function itself raised.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError(
            "the engine beam needs Apache Beam: pip install 'vlm_jax[prepare]', in an environment "
            f"of its own ({error})"
        ) from error
    if not tasks:
        return
    # Beam's own default would try to fetch a program.
    words = ["--runner=FnApiRunner"]
    if workers > 1:
        words += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    try:
        with apache_beam.Pipeline(
            options=PipelineOptions(words + shlex.split(beam_options))
        ) as pipeline:
            # Reshuffled: or a runner may fuse all tasks into one.
            _ = (
                pipeline
                | apache_beam.Create(list(tasks))
                | apache_beam.Reshuffle()
                | "work" >> apache_beam.Map(function)
            )
    except VlmError:
        raise
    except Exception as error:  # each runner raises what it likes, with our error in its text
        raise _meant(str(error)) from error


ENGINES = {"local": local, "beam": beam}


def _meant(text: str) -> VlmError:
    """The error that ended a pipeline, from the last line of the traceback that runners give."""
    last = [line for line in text.splitlines() if line.strip()][-1:] or ["no reason given"]
    named = re.match(r"(?:vlm_jax\.errors\.)?(\w+): (.*?)(?: \[while running .*)?$", last[0])
    kind = getattr(errors, named[1], None) if named else None
    if isinstance(kind, type) and issubclass(kind, VlmError):
        return kind(named[2])
    return StorageError(f"the Beam pipeline failed: {last[0]}")


def end_with_parent() -> None:
    """For a worker process: it would wait for work for ever once its parent was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
