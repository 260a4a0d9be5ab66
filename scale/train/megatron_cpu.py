"""What Megatron-core must be spared where there is no CUDA device: each item with its reason.

Megatron-core is written for CUDA; upstream says that there is no path for a CPU. The engine runs
on it all the same, with gloo, so that a laptop and a test run the code that a GPU runs. This module
is the only place that changes how torch or Megatron answer, it changes nothing where CUDA is
available, and for each item a test fails when the item is no longer needed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scale.model.megatron_import import megatron_import

with megatron_import():
    from megatron.core.tensor_parallel import random as megatron_random

ITEMS: dict[str, str] = {
    "current_device": "buffers of gradients and gathers are made on torch.cuda.current_device()",
    "synchronize": "messages between pipeline stages wait for the device",
    "rng": "seeds of tensor-parallel regions are kept as states of the CUDA generator",
    "literals": "optimizer wrappers and schedules make tensors with device='cuda'",
    "type_strings": "the bf16 and the spread optimizer compare Tensor.type() with CUDA names",
}
"""Name of an item and why Megatron-core needs it."""

FOR_STEPS = frozenset({"literals", "type_strings"})
"""Items that a forward pass does without."""

_undo: list[Callable[[], None]] = []
_entered = threading.local()


def install(skip: frozenset[str] = frozenset()) -> None:
    """Make Megatron-core run without CUDA; does nothing where there is a device, or when repeated.

    Parameters
    ----------
    skip
        Items left out, for the tests that show each to be needed.
    """
    if torch.cuda.is_available():
        return
    unknown = skip - set(ITEMS)
    if unknown:
        raise ValueError(f"no item {', '.join(sorted(unknown))}; known: {', '.join(ITEMS)}")
    if not _undo:
        if "current_device" not in skip:
            _replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
        if "synchronize" not in skip:
            _replace(torch.cuda, "synchronize", lambda device=None: None)
        if "rng" not in skip:
            _replace_generator()
        _undo.append(lambda: None)  # marks the process as done even if everything is skipped
    # Function modes belong to a thread: a thread that trains enters its own, once.
    if getattr(_entered, "mode", None) is None and not skip >= FOR_STEPS:
        mode = _CpuMode(literals="literals" not in skip, type_strings="type_strings" not in skip)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _entered.mode = mode


def uninstall() -> None:
    """Put everything back, in the thread that installed it."""
    mode = getattr(_entered, "mode", None)
    if mode is not None:
        mode.__exit__(None, None, None)
        _entered.mode = None
    while _undo:
        _undo.pop()()


def paused() -> AbstractContextManager[Any]:
    """Return a context for what does without the function mode: passes, updates of weights.

    The mode is Python that runs at every call of torch: 5 % of a step of the tiny model in the
    forward pass, 1 % of one on 2,000 genes in the update, which asks for the gradient of each
    weight several times.
    """
    if getattr(_entered, "mode", None) is None:
        return nullcontext()
    paused: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return paused


@contextmanager
def installed(skip: frozenset[str] = frozenset()) -> Iterator[None]:
    """Install for the length of a ``with`` block."""
    install(skip)
    try:
        yield
    finally:
        uninstall()


@contextmanager
def shared_groups() -> Iterator[None]:
    """Let process groups of the same ranks be one group, where there is no CUDA device.

    Megatron-core makes about thirty groups, most of the same ranks. One of gloo has three threads
    of its own, and one of them wakes up a hundred times a second: together 3 % of a core, also of a
    process that is alone.
    """
    if torch.cuda.is_available():
        yield
        return
    made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): dist.group.WORLD}
    distributed: Any = dist
    new_group = distributed.new_group

    def shared(ranks: Sequence[int], *arguments: Any, **options: Any) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = new_group(list(ranks), *arguments, **options)
        return made[key]

    distributed.new_group = shared
    try:
        yield
    finally:
        distributed.new_group = new_group


def _replace(owner: Any, name: str, value: object) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original))


def _replace_generator() -> None:
    """Let the states of tensor-parallel regions be states of the CPU generator."""
    generator = torch.default_generator

    def get_state(*arguments: object, **options: object) -> Tensor:
        return generator.get_state()

    def set_state(state: Tensor, *arguments: object, **options: object) -> None:
        generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(seed)

    _replace(megatron_random, "_get_cuda_rng_state", get_state)
    _replace(megatron_random, "_set_cuda_rng_state", set_state)
    _replace(torch.cuda, "get_rng_state", get_state)
    _replace(torch.cuda, "manual_seed", manual_seed)
    # The two generators are one here, so every draw in a region would be reported.
    log = logging.getLogger(megatron_random.__name__)
    log.addFilter(_expected)
    _undo.append(lambda: log.removeFilter(_expected))


def _expected(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CpuMode(TorchFunctionMode):
    """Reads ``cuda`` as ``cpu`` in calls of torch, and answers types with their CUDA names."""

    def __init__(self, *, literals: bool, type_strings: bool) -> None:
        super().__init__()
        self._literals = literals
        self._type_strings = type_strings

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs) if kwargs else {}
        if self._literals:
            if func is torch.Tensor.cuda:
                return args[0]
            if _is_cuda(options.get("device")):
                options["device"] = torch.device("cpu")
            elif func is torch.Tensor.to:
                args = tuple(torch.device("cpu") if _is_cuda(a) else a for a in args)
        answer = func(*args, **options)
        if self._type_strings and func is torch.Tensor.type and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer
