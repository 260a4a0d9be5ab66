"""Process groups: how the ranks share the work, and which layouts are refused.

Megatron-core's parallel state is used at world size 1 too. Tensor parallel ranks share each set
block and, elsewhere, the cells of a set (sequence parallel); pipeline stages share out the set
blocks; data parallel ranks share the sets of a batch, and never split one. All ranks of one model
read the same sets: every tensor parallel rank, and every stage.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from scale.config import ModelConfig, ParallelConfig, TrainerConfig
from scale.model import products
from scale.model.megatron_import import megatron_import
from scale.model.sizes import check_shares, one_of
from scale.runtime import World
from scale.train import megatron_cpu

with megatron_import():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

logger = logging.getLogger(__name__)

T = TypeVar("T")

_started: list[Layout] = []
"""The layout of this process, once per call of ``start`` that was not yet stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks share the work, and which share is this rank's.

    Ranks are numbered tensor parallel fastest, so that peers of a set block stay on one node, then
    data parallel, then by pipeline stage.
    """

    world_size: int = 1
    rank: int = 0
    tensor_model_parallel_size: int = 1
    tensor_model_parallel_rank: int = 0
    pipeline_model_parallel_size: int = 1
    pipeline_model_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def losses_from(self) -> int:
        """First rank of the last pipeline stage: it and those after it have the losses."""
        return self.world_size - self.world_size // self.pipeline_model_parallel_size

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the files that exist once."""
        return self.rank == 0

    def describe(self) -> str:
        """Return the layout in words."""
        if self.world_size == 1:
            return f"one process on {self.device}"
        text = (
            f"{self.world_size} ranks = {self.data_parallel_size} data parallel x "
            f"{self.tensor_model_parallel_size} tensor parallel"
        )
        stages = self.pipeline_model_parallel_size
        return text if stages == 1 else f"{text} x {stages} pipeline stages"

    def record(self) -> dict[str, int]:
        """Return the sizes, for run.json and the manifest of a checkpoint."""
        return {
            "world_size": self.world_size,
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "data_parallel_size": self.data_parallel_size,
        }


def start(
    config: ParallelConfig,
    world: World,
    *,
    seed: int,
    device: torch.device,
    rendezvous: str = "env://",
    is_training: bool = True,
) -> Layout:
    """Join the process groups and seed Megatron's generators.

    Calls may be nested in one process (a model loaded for prediction while another trains) as long
    as they ask for the same layout; each needs its own :func:`stop`.

    Parameters
    ----------
    config
        Sizes and the timeout of collectives.
    world
        This process among how many.
    seed
        Of Megatron's generators; the weights and draws of the model have seeds of their own.
    device
        Where this rank computes.
    rendezvous
        Where several ranks meet: ``env://`` (torchrun, srun) or ``file:///path``. A process that
        is alone opens no port.
    is_training
        False leaves out what only steps need: without CUDA, a mode that changes what some calls of
        torch answer in this thread, and that somebody who only predicts should not see.

    Raises
    ------
    ValueError
        If the sizes do not fit the number of ranks, or another layout is running.
    """
    tensor_size = config.tensor_model_parallel_size
    num_stages = config.pipeline_model_parallel_size
    _check_sizes(config, world)
    if _started:
        running = _started[-1]
        if (world.size, tensor_size, num_stages) != (
            running.world_size,
            running.tensor_model_parallel_size,
            running.pipeline_model_parallel_size,
        ):
            raise ValueError(
                f"this process runs {running.describe()}; it cannot also run {world.size} ranks "
                f"with parallel.tensor_model_parallel_size={tensor_size} and "
                f"parallel.pipeline_model_parallel_size={num_stages}"
            )
    elif world.size > 1 and rendezvous == "env://" and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"{world.size} ranks, but MASTER_ADDR and MASTER_PORT are not set; start them with "
            "torchrun, or export both in the batch script"
        )
    megatron_cpu.install(frozenset() if is_training else megatron_cpu.FOR_STEPS)
    if device.type == "cpu":
        products.use_onednn()
    if _started:
        _started.append(_started[-1])
        return _started[-1]
    if tensor_size > 1:
        # Sends must be queued in program order; read when CUDA is first touched.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _join(config, world, device, rendezvous)
    with megatron_cpu.shared_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=num_stages,
            # Sub-groups do not inherit the timeout of the world: a hung peer stayed unnoticed.
            distributed_timeout_minutes=config.timeout_seconds / 60,
            create_gloo_process_groups=False,
        )
    model_parallel_cuda_manual_seed(seed % (1 << 31))
    layout = Layout(
        world_size=world.size,
        rank=world.rank,
        tensor_model_parallel_size=tensor_size,
        tensor_model_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_model_parallel_size=num_stages,
        pipeline_model_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        device=device,
    )
    _started.append(layout)
    return layout


def _join(config: ParallelConfig, world: World, device: torch.device, rendezvous: str) -> None:
    """Make the group of all ranks."""
    timeout = timedelta(seconds=config.timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size > 1:
        dist.init_process_group(
            backend,
            init_method=rendezvous,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
        return
    hook = sys.excepthook
    # TransformerBlock refuses to run without a group; a HashStore needs no port.
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    sys.excepthook = hook  # torch puts "[rank0]:" before every line of a traceback


def stop() -> None:
    """Leave the process groups and end their threads; does nothing if none was joined.

    A thread of gloo that drops a tensor while the interpreter ends aborts the process, so what
    still holds a group must let it go: Megatron-core's own names, and models, which are in cycles.
    """
    if not _started:
        return
    _started.pop()
    if not _started:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):  # one that was forgotten
                setattr(parallel_state, name, None)
        gc.collect()
        megatron_cpu.uninstall()
        products.stop_onednn()


def on_first_rank(layout: Layout, function: Callable[[], T]) -> T:
    """Return ``function()`` of rank 0 on every rank; an error it can name is raised on all.

    Files of a run are read and judged by one rank, so that no other sees them half written.
    """
    outcome: list[Any] = [None, None]
    if layout.rank == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _check_sizes(config: ParallelConfig, world: World) -> None:
    tensor_size = config.tensor_model_parallel_size
    num_stages = config.pipeline_model_parallel_size
    if world.size % tensor_size:
        fitting = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ValueError(
            f"parallel.tensor_model_parallel_size ({tensor_size}) must divide the {world.size} "
            f"ranks; use {one_of(fitting)}"
        )
    groups = world.size // tensor_size
    if groups % num_stages:
        fitting = [n for n in range(1, groups + 1) if groups % n == 0]
        raise ValueError(
            f"parallel.pipeline_model_parallel_size ({num_stages}) must divide the {world.size} "
            f"ranks over parallel.tensor_model_parallel_size ({tensor_size}); use {one_of(fitting)}"
        )
    if config.distributed_optimizer and groups == num_stages:
        raise ValueError(
            "parallel.distributed_optimizer spreads optimizer state over data-parallel ranks and "
            f"there is 1 ({world.size} ranks, {tensor_size} tensor parallel, {num_stages} pipeline "
            "stages); set it to false"
        )


def check_layout(model: ModelConfig, trainer: TrainerConfig, layout: Layout) -> None:
    """Refuse sizes that the layout cannot share out.

    Raises
    ------
    ValueError
        Naming the settings, their values, and values that would do.
    """
    data_size = layout.data_parallel_size
    check_shares(
        model,
        world_size=layout.world_size,
        tensor_size=layout.tensor_model_parallel_size,
        num_stages=layout.pipeline_model_parallel_size,
    )
    sets = trainer.sets_per_batch
    if sets % data_size:
        raise ValueError(
            f"trainer.sets_per_batch ({sets}) must be a multiple of the {data_size} data-parallel "
            f"ranks; use {sets // data_size * data_size or data_size}"
        )
    micro = micro_batch_sets(trainer, layout)
    if sets % (data_size * micro):
        share = sets // data_size
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ValueError(
            f"trainer.sets_per_micro_batch ({micro}) must divide the {share} sets of a rank "
            f"(trainer.sets_per_batch {sets} over {data_size}); use {one_of(fitting)}"
        )


def idle_share(trainer: TrainerConfig, layout: Layout) -> float:
    """Return the share of a step in which a pipeline stage waits for the others.

    With P stages and m micro-batches per rank, P - 1 of m + P - 1 turns.
    """
    share = trainer.sets_per_batch // layout.data_parallel_size
    num_waits = layout.pipeline_model_parallel_size - 1
    return num_waits / (share // micro_batch_sets(trainer, layout) + num_waits)


def micro_batch_sets(trainer: TrainerConfig, layout: Layout) -> int:
    """Return the sets of one forward pass of a rank."""
    return trainer.sets_per_micro_batch or trainer.sets_per_batch // layout.data_parallel_size


def replica_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the data parallel and the tensor parallel ranks of this rank."""
    return (
        parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )


def gather_over_sets(found: T) -> list[T]:
    """Return what each of the ranks that share out sets has found, in their order, on all."""
    return gather_over_ranks(found, parallel_state.get_data_parallel_group())


def gather_over_ranks(found: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each rank of a group, by default each rank, has found, in their order, on all."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, found, group=group)
    return every
