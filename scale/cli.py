"""The command line: ``scale <task> key=value ...``.

The name of the task and of every setting is checked before anything heavy is imported. Hydra then
composes the settings, ``to_dataclass`` checks their values, and only after that the module of the
task is imported and run. Errors a user can act on become one line; the traceback of any other goes
to the log of the run (to the screen with ``SCALE_DEBUG=1``).
"""

import gc
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scale.config import SCHEMAS, config_dir, register, to_dataclass
from scale.help import TASKS, overview, task_help
from scale.overrides import check_keys, explain
from scale.runtime import EXIT_AGAIN, EXIT_ERROR, StopSignal, World, package_version
from scale.types import did_you_mean

EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C, as a shell reports it."""

_STOPPABLE = ("pretrain", "finetune", "demo")
"""Tasks that leave at the end of a step when told to; a signal ends the others at once."""
_OPTIONS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn"),
    *("--config-path", "-cp", "--experimental-rerun"),
)
_OPTIONS = ("--resolve", "-r", "--run", "--multirun", "-m", "--info", "-i", "--hydra-help")
_INFO_CHOICES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    The status is also appended to the file that ``SCALE_STATUS_FILE`` names, for launchers that do
    not hand it on.

    Parameters
    ----------
    arguments
        What stands behind ``scale``; None = ``sys.argv``.
    """
    status = _run(list(sys.argv[1:] if arguments is None else arguments))
    if status == EXIT_AGAIN:
        StopSignal.ignore()
    if file := os.environ.get("SCALE_STATUS_FILE"):
        with Path(file).open("a") as handle:
            handle.write(f"{status}\n")
    return status


def _run(given: list[str]) -> int:
    """Run one command and return its exit status."""
    if not given or given[0] in ("--help", "-h", "help"):
        print(overview(), end="")
        return 0
    if given[0] in ("--version", "-V", "version"):
        print(f"scale {package_version()}")
        return 0
    task, *rest = given
    if task in ("-sc", "--shell-completion"):
        return _complete(rest)
    if task not in SCHEMAS:
        return _fail("scale", f"no task {task!r}; {did_you_mean(task, list(TASKS))}")
    if any(argument in ("--help", "-h") for argument in rest):
        print(task_help(task), end="")
        return 0
    try:
        rest = _check_arguments(task, rest)
    except ValueError as error:
        return _fail("scale", str(error))
    try:
        return _compose_and_run(task, rest)
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        return _fail(f"scale {task}", explain(error, config_dir()))
    except KeyboardInterrupt:
        return _fail(f"scale {task}", "interrupted", EXIT_INTERRUPTED)


def _check_arguments(task: str, arguments: Sequence[str]) -> list[str]:
    """Check the names of options and settings; return the arguments as Hydra wants them."""
    checked: list[str] = []
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        is_value = before in _OPTIONS_WITH_VALUE or (
            before in ("--info", "-i") and argument in _INFO_CHOICES
        )
        if is_value:
            checked.append(argument)
        elif argument.startswith("-"):
            name = argument.partition("=")[0]
            if name not in (*_OPTIONS_WITH_VALUE, *_OPTIONS):
                key = name.lstrip("-").replace("-", "_")
                raise ValueError(
                    f"no option {name!r}; settings are written key=value, as {key or 'name'}=..."
                )
            checked.append(argument)
        else:
            checked += check_keys(SCHEMAS[task], [argument])
    return checked


def _compose_and_run(task: str, arguments: Sequence[str]) -> int:
    """Let Hydra compose the settings, then run the task on them, once or once per sweep job."""
    if not sys.warnoptions:  # what a library will change one day is no news to a user
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
    stop = StopSignal()
    if task in _STOPPABLE:
        stop.install()  # before torch is imported: a signal that comes first would kill
    statuses: list[int] = []
    typed = list(sys.argv)

    def job(config: DictConfig) -> None:
        sys.argv = typed  # run.json records what was typed
        if stop.received is None or not statuses:
            statuses.append(_run_task(task, config, stop))

    _call_hydra(task, arguments, job)
    return max(statuses, default=0)


def _call_hydra(task: str, arguments: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    """Call Hydra with arguments of our choice, which raises its errors instead of printing them."""
    register()
    typed, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["scale", *arguments]
    try:
        hydra.main(config_path=str(config_dir()), config_name=task, version_base=None)(job)()
    finally:
        sys.argv = typed
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _complete(arguments: Sequence[str]) -> int:
    """Answer a shell: the tasks for the first word, Hydra's choices for the others.

    ``eval "$(scale -sc install=bash)"`` switches it on.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    task = words[1] if len(words) > 2 or (len(words) == 2 and line.endswith(" ")) else None
    if arguments[:1] == ["query=bash"] and task not in SCHEMAS:
        print(*TASKS)
        return 0
    if task is not None:
        os.environ["COMP_LINE"] = line.replace(f" {task}", "", 1)
    _call_hydra(task or "pretrain", ["-sc", *arguments], lambda _: None)
    return 0


def _run_task(task: str, config: DictConfig, stop: StopSignal) -> int:
    """Check the settings, import the task and run it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)  # of this job, also in a sweep
    try:
        settings = to_dataclass(config)
    except (ValueError, TypeError, AttributeError) as error:
        _remove_if_empty(run_dir)
        return _fail(f"scale {task}", explain(error, config_dir()))
    run_dir = _relative(run_dir)
    settings.run_dir = str(run_dir)

    def call() -> int:
        run: Callable[..., int] = importlib.import_module(f"scale.tasks.{task}").run
        return run(settings, stop) if task in _STOPPABLE else run(settings)

    return guard(call, task, None if task == "info" else run_dir)


def guard(call: Callable[[], int], task: str, run_dir: Path | None) -> int:
    """Call a task; turn an error into one line and a status.

    Parameters
    ----------
    call
        The task with its settings.
    task
        Its name, for the message.
    run_dir
        Where the traceback of an unexpected error is kept; None = nowhere.
    """
    status = _status_of(call, task, run_dir)
    if status == EXIT_AGAIN:
        print(f"scale {task}: stopped with a checkpoint; the same command goes on", file=sys.stderr)
    elif status == EXIT_ERROR:
        gc.collect()  # the error held on to process groups: see scale.train.parallel.stop
    return status


def _status_of(call: Callable[[], int], task: str, run_dir: Path | None) -> int:
    try:
        return call()
    except BrokenPipeError:  # the reader of our output has gone, as in `scale info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001  the screen gets one line, the log the rest
        if os.environ.get("SCALE_DEBUG") == "1":
            traceback.print_exc()
        text = _describe(error)
        if run_dir is not None:
            log = _write_traceback(task, run_dir, error)
            text += "" if log is None else f" (traceback in {log})"
            _remove_if_empty(run_dir)
        _add_to_log(text)
        return _fail(f"scale {task}", text)


def _relative(path: Path) -> Path:
    """Return the path from here, so that no file of a run holds an absolute one without need."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _remove_if_empty(run_dir: Path) -> None:
    """Remove the directory that Hydra has made for a task that did nothing."""
    if run_dir.is_dir() and not any(run_dir.iterdir()) and run_dir.resolve() != Path.cwd():
        run_dir.rmdir()


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells the user what to do.

    That holds for errors of files, memory and numbers, and for a ``ValueError`` that this package
    raised; one from deep inside a library is somebody's mistake and needs its traceback.
    """
    if isinstance(error, OSError | MemoryError | FloatingPointError):
        return True
    if not isinstance(error, ValueError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("scale.")


def _describe(error: Exception) -> str:
    """Return one line about an error."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named so that torch is not imported
        return "out of GPU memory; lower trainer.sets_per_micro_batch or trainer.sets_per_batch"
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + text if text else ''}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if _is_expected(error):
        return text or type(error).__name__
    return f"unexpected {type(error).__name__}{': ' + text if text else ''}"


def _write_traceback(task: str, run_dir: Path, error: Exception) -> Path | None:
    """Append the traceback of an unexpected error to the run's log; return where it stands."""
    if _is_expected(error):
        return None
    rank = World.from_env().rank
    log = run_dir / (f"{task}.log" if rank == 0 else f"rank-{rank}.log")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with log.open("a") as handle:
            traceback.print_exception(error, file=handle)
    except OSError:  # the disk is full, or the directory cannot be written
        return None
    return log


def _add_to_log(text: str) -> None:
    """Write the line on the screen also into the log of the run, if the task has opened one."""
    record = logging.makeLogRecord({"levelname": "ERROR", "levelno": logging.ERROR, "msg": text})
    for handler in logging.getLogger("scale").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _fail(who: str, text: str, status: int = EXIT_ERROR) -> int:
    """Print one line and return the exit status."""
    world = World.from_env()
    rank = f"rank {world.rank}: " if world.size > 1 else ""
    print(f"{who}: {rank}{text}", file=sys.stderr)
    return status
