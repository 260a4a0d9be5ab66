"""The one input file that a process has open: the next piece is mostly of the same file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from scale.data.ingest.source import Source, SourceFile


@dataclass(slots=True)
class _Opened:
    key: object = None
    file: SourceFile | None = None
    stack: ExitStack | None = None


_opened = _Opened()


def opened(source: Source) -> SourceFile:
    """Return the open file of a source; the one that was open before is closed."""
    key = id(source) if source.path is None else (type(source), source.path)
    if _opened.file is None or _opened.key != key:
        close_opened()
        stack = ExitStack()
        _opened.file = stack.enter_context(source.open())
        _opened.key, _opened.stack = key, stack
    return _opened.file


def close_opened() -> None:
    """Close the file that is open, if there is one."""
    if _opened.stack is not None:
        _opened.stack.close()
    _opened.key = _opened.file = _opened.stack = None
