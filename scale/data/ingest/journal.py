"""What a ``prepare`` has done so far: a line per finished task, so that a killed one goes on.

A task's files are synced before its line is written, and the line is synced before anything relies
on it. A line that was cut by a kill is dropped; a task without a line is done again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from scale.types import StoreError

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
SEALED = "sealed"
"""Name of the last task: all files are there, only the name is not."""
_SHOWN = 5


class Journal:
    """The journal of one store that is being made.

    Parameters
    ----------
    path
        The file; continued where it exists.
    root
        Folder that the files of tasks are named from.
    identity
        Everything that decides the store's content, by name: JSON values.

    Raises
    ------
    StoreError
        If the file belongs to a store of other content; the message names what differs.
    """

    def __init__(self, path: Path, root: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._root = path, root
        self._done: dict[str, dict[str, Any]] = {}
        lines = _whole_lines(path)
        if lines and lines[0] != identity:
            raise StoreError(
                f"{root} holds the rest of an unfinished store of other settings or inputs "
                f"({_differences(lines[0], identity)}); give the same settings to finish it, "
                "another store=, or restart=discard"
            )
        self._done = {str(line["task"]): line for line in lines[1:]}
        self.num_found = len(self._done)
        """Tasks that an earlier start has finished."""
        if not lines:
            self._append(dict(identity))

    @property
    def is_finished(self) -> bool:
        """Whether the last task is."""
        return SEALED in self._done

    def result(self, task: str, kind: type[_Result]) -> _Result | None:
        """Return what a finished task has returned, if it is finished and its files are whole.

        Parameters
        ----------
        task
            Name of the task.
        kind
            Dataclass of its results; its field ``files`` says how large each file is.
        """
        line = self._done.get(task)
        if line is None:
            return None
        for name, size in line["files"].items():
            file = self._root / name
            if not file.is_file() or file.stat().st_size != size:
                logger.warning("%s is not what it was; it is made again", file)
                return None
        return kind(**{name: value for name, value in line.items() if name != "task"})

    def record(self, task: str, result: Any) -> None:
        """Write down that a task is finished."""
        line = {"task": task, **dataclasses.asdict(result)}
        self._append(line)
        self._done[task] = line

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("ab") as handle:
            handle.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; a cut one at the end is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    lines = []
    for line in content[:end].splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the file system has lost a page; what follows is no better
            end = content.find(line)
            break
    if end < len(content):
        os.truncate(path, end)
    return lines


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [n for n in {**found, **wanted} if found.get(n) != wanted.get(n)]
    told = [f"{n} was {found.get(n)!r}, is {wanted.get(n)!r}" for n in names[:_SHOWN]]
    return "; ".join(told) + ("; ..." if len(names) > _SHOWN else "")
