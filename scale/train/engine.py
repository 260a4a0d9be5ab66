"""One optimizer step out of a list of micro-batches, on any layout of ranks.

One engine for a laptop and a cluster: Megatron-core's distributed data parallel, schedule,
reduction of gradients and optimizer wrappers, at world size 1 too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale.config import OptimizerConfig, Precision
from scale.model.megatron_import import megatron_import
from scale.train import megatron_cpu, optim
from scale.train.parallel import Layout
from scale.train.replicas import check_replicas
from scale.types import Batch

with megatron_import():
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func


REPLICA_STEPS = 1000
"""Steps between two comparisons of the weights that ranks hold copies of."""


class LossesLike(Protocol):
    """What the forward pass of a model returns on the last pipeline stage."""

    total: Tensor
    """Mean over the sets of the micro-batch."""
    parts: dict[str, Tensor]
    num_sets: int


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite; weights and moments are as they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step tells; the same on every rank."""

    loss: float
    """Mean over the sets of the global batch."""
    parts: dict[str, float]
    grad_norm: float
    """Global, before clipping."""
    num_cells: int
    """Treated cells of the global batch; the control cell of each comes with it."""
    data_wait_seconds: float
    """Of the rank that waited longest."""
    rank_seconds: list[float]
    """What each rank took for its data and passes, before it waited for the others."""
    stop_requested: bool
    """Whether any rank was asked to stop."""


class Engine:
    """A model in Megatron's data parallel wrapper, its optimizer, schedule and moving average.

    Parameters
    ----------
    model
        A Megatron model chunk: ``forward(batch)`` returns losses, ``config`` is its
        ``TransformerConfig``, ``loss_names`` are those of the parts. On pipeline stages before the
        last, ``forward`` returns the tensor for the next stage, of ``message_rows(set_size)`` rows
        over all tensor parallel ranks.
    layout
        From :func:`start`.
    config
        Decay, betas, clipping, moving average.
    lr
        Peak learning rate.
    precision
        Of the blocks.
    distributed_optimizer
        Spread optimizer state over data parallel ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        config: OptimizerConfig,
        *,
        lr: float,
        precision: Precision = Precision.fp32,
        distributed_optimizer: bool = False,
    ) -> None:
        self.model = model
        self.layout = layout
        self.precision = precision
        self.distributed_optimizer = distributed_optimizer
        self._config = config
        settings: Any = model.config
        self._wrapped = DistributedDataParallel(
            config=settings,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer
            ),
            module=model,
        )
        self.optimizer = optim.build_optimizer(
            self._wrapped, config, lr=lr, precision=precision, distributed=distributed_optimizer
        )
        self.average = optim.MovingAverage(model, config.ema_decay)
        self._passes_done = 0.0
        settings.finalize_model_grads_func = self._reduce_gradients
        settings.grad_scale_func = self.optimizer.scale_loss
        self._schedule = get_forward_backward_func()

    @property
    def optimizer_kind(self) -> str:
        """Name of the optimizer's wrapper: states of different kinds do not interchange."""
        if self.distributed_optimizer:
            return "distributed"
        return "float16" if self.precision is Precision.bf16 else "fp32"

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has its moving average."""
        return self.average.applied()

    def step(
        self,
        batches: list[Batch],
        *,
        step: int,
        lr: float,
        data_wait_seconds: float = 0.0,
        stop_requested: bool = False,
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches; a collective of all ranks.

        Parameters
        ----------
        batches
            Micro-batches of equal numbers of sets; the same on all ranks that share a model.
        step
            Number of this step; the first is 1.
        lr
            Rate of this step.
        data_wait_seconds, stop_requested
            Of this rank; they travel with the loss, so that no further message is needed.

        Raises
        ------
        NonFiniteError
            On every rank, before anything was changed, if a loss or the gradient is not finite on
            any of them.
        ReplicaError
            On every rank, if weights differ that should be equal; seen every 1,000 steps.
        """
        began = time.monotonic()
        losses = self.gradients(batches)
        own = data_wait_seconds + self._passes_done - began
        told = self._gather(batches, losses, data_wait_seconds, own, stop=stop_requested)
        self._refuse_non_finite(told, step)
        with megatron_cpu.paused():
            overflow = self.optimizer.prepare_grads()
            grad_norm = optim.clip_gradients(self.optimizer, self._config.clip_norm)
        if overflow or not math.isfinite(grad_norm):
            # The norm is reduced over all ranks, so all of them come here. Clipping has touched
            # gradients only.
            first, last = int(told.numbers[:, 0].min()), int(told.numbers[:, 1].max())
            raise NonFiniteError(
                f"non-finite gradient at step {step:,} (sets {first} to {last}); stopped before "
                "the update"
            )
        optim.set_rate(self.optimizer, lr=lr, weight_decay=self._config.weight_decay)
        with megatron_cpu.paused():
            self.optimizer.step_with_ready_grads()
            self.average.update(step - 1)
        if step % REPLICA_STEPS == 0 and self.layout.world_size > 1:
            check_replicas(self.model, step=step)
        means = self._scored(told.losses).mean(dim=0).tolist()
        return StepResult(
            loss=means[0],
            parts=dict(zip(told.names, means[1:], strict=True)),
            grad_norm=grad_norm,
            num_cells=int(self._scored(told.numbers)[:, 2].sum())
            // self.layout.tensor_model_parallel_size,
            data_wait_seconds=float(told.numbers[:, 3].max()),
            rank_seconds=told.numbers[:, 4].tolist(),
            stop_requested=bool(told.numbers[:, 5].any()),
        )

    def gradients(self, batches: list[Batch]) -> list[LossesLike]:
        """Leave the mean gradient of the global batch in ``main_grad``; return this rank's losses.

        Losses are copies: the schedule divides what the forward pass returned in place. There are
        none on a pipeline stage before the last.
        """
        self._wrapped.train()
        with megatron_cpu.paused():
            self._wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
        kept: list[LossesLike] = []

        def forward(
            batch: Iterator[Batch], chunk: nn.Module
        ) -> tuple[Tensor, Callable[..., Any] | None]:
            with megatron_cpu.paused():
                result: LossesLike | Tensor = chunk(next(batch))
            if isinstance(result, Tensor):
                return result, None
            kept.append(result)
            return result.total.clone(), lambda total: (total, None)

        num_sets, set_size = batches[0].control_mask_BS.shape
        model: Any = self.model
        self._schedule(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=self._wrapped,
            num_microbatches=len(batches),
            # The shape of a message between stages, of which all micro-batches have one.
            seq_length=model.message_rows(set_size),
            micro_batch_size=num_sets,
            forward_only=False,
        )
        return kept

    def _reduce_gradients(self, *arguments: Any, **options: Any) -> None:
        """Sum gradients over ranks, once it is noted when this rank's own passes were done."""
        if self.layout.device.type == "cuda" and self.layout.world_size > 1:
            torch.cuda.synchronize(self.layout.device)
        self._passes_done = time.monotonic()
        finalize_model_grads(*arguments, **options)

    def _gather(
        self, batches: list[Batch], losses: list[LossesLike], wait: float, own: float, *, stop: bool
    ) -> _Told:
        """Exchange losses and facts of the step in one small message: a row per rank."""
        model: Any = self.model
        names: list[str] = list(model.loss_names)
        device = batches[0].set_index_B.device
        means = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
        if losses:
            means = torch.stack(
                [
                    torch.stack([entry.total.detach(), *(entry.parts[n] for n in names)]).double()
                    for entry in losses
                ]
            ).mean(dim=0)
        sets = torch.cat([batch.set_index_B for batch in batches])
        cells = sum(
            batch.treated_mask_BS.sum() for batch in batches if batch.treated_mask_BS is not None
        )
        facts = torch.tensor([wait, own, float(stop)], dtype=torch.float64, device=device)
        row = torch.cat(
            [
                means,
                torch.stack(
                    [sets.min(), sets.max(), torch.as_tensor(cells, device=device)]
                ).double(),
                facts,
            ]
        )
        rows = [torch.empty_like(row) for _ in range(self.layout.world_size)]
        dist.all_gather(rows, row)
        table = torch.stack(rows).cpu()
        return _Told(names, table[:, : 1 + len(names)], table[:, 1 + len(names) :])

    def _scored(self, rows: Tensor) -> Tensor:
        """Return the rows of the ranks that have losses: those of the last pipeline stage."""
        return rows[self.layout.losses_from :]

    def _refuse_non_finite(self, told: _Told, step: int) -> None:
        finite = torch.isfinite(told.losses).all(dim=1)
        if finite.all():
            return
        rank = int((~finite).nonzero()[0])
        first, last = (int(n) for n in told.numbers[rank, :2])
        sets = f"set {first}" if first == last else f"sets {first} to {last}"
        raise NonFiniteError(
            f"non-finite loss at step {step:,} on rank {rank} ({sets}); stopped before the update"
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What all ranks told each other after the backward pass; a row per rank."""

    names: list[str]
    losses: Tensor
    """The loss, then its parts; zeros before the last pipeline stage."""
    numbers: Tensor
    """First set, last set, treated cells, seconds of data wait and of own work, stop flag."""
