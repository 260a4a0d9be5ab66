"""How Megatron-core is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def megatron_import() -> Iterator[None]:
    """Import Megatron-core without its remarks on Transformer Engine, Apex and torch.jit.

    Without CUDA also without torch's compiler, which it hands some functions to that no layer here
    uses: the compiler's own import is a third of the CPU time of a command's start.
    """
    target: Any = torch
    compiler = target.compile
    if not torch.cuda.is_available():
        target.compile = _leave_as_it_is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        target.compile = compiler


def _leave_as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return _leave_as_it_is if function is None else function
