"""Training steps of a small model on any layout of ranks, and what they must have in common.

One model and one sequence of global batches for all; a rank returns numbers by the names of the
whole model, which :func:`whole_gradients` puts together.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from example_sets import batch, build, in_float64, shake, sizes, take
from ranks import RankContext

from scale.config import ObjectiveConfig, OptimizerConfig, Pairing, Precision
from scale.train.parallel import Layout
from scale.types import Batch

SETS_PER_BATCH = 8
_STARTS = itertools.count()
SMALL = {"num_layers": 2, "num_heads": 4, "num_summary_cells": 8}
# Gene blocks beside the set blocks; stages of 1 and 3 layers, or of 1, 1, 1 and 1.
DEEP = SMALL | {"num_layers": 4, "gene_layers": 1, "gene_hidden_size": 8}
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1, clip_norm=0.05)


@dataclass(frozen=True)
class Run:
    """A layout, and how the engine is set up on it."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: bool = False
    distributed: bool = False
    precision: Precision = Precision.fp32

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def start(self, context: RankContext):
        """Start its groups in these ranks, which may start others before and after."""
        meeting = f"{context.rendezvous}-{next(_STARTS)}"
        return replace(context, rendezvous=meeting).layout(
            tensor_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            recompute=self.recompute,
            distributed_optimizer=self.distributed,
        )


def global_batch(step: int) -> Batch:
    """Return the sets of a step: some with padding, all full in every other step."""
    lengths = (None, None) if step % 2 else ([8, 5, 8, 6, 8, 2, 7, 8], [4, 8, 7, 8, 2, 8, 6, 8])
    return batch(
        SETS_PER_BATCH,
        seed=10 * step,
        first_set=SETS_PER_BATCH * step,
        num_summary_cells=8,
        control_lengths=lengths[0],
        treated_lengths=lengths[1],
    )


def share(run: Run, layout: Layout, step: int, *, size: int = 4) -> list[Batch]:
    """Return this rank's micro-batches of a step, of at most so many sets.

    Not of one set each: an error in the order of memory shows with several only.
    """
    size = min(size, SETS_PER_BATCH // run.data)
    starts = range(layout.data_parallel_rank * size, SETS_PER_BATCH, run.data * size)
    sets = global_batch(step)
    return [take(sets, slice(start, start + size)) for start in starts]


ENDPOINT = ObjectiveConfig(
    pairing=Pairing.ot,
    mean_weight=1.0,
    point_weight=0.3,
    mmd_weight=0.2,
    masked_gene_fraction=0.25,
)


def make_engine(
    run: Run,
    layout: Layout,
    changes: dict,
    *,
    objective: ObjectiveConfig = ENDPOINT,
    in_double: bool = False,
):
    """Return an engine around the model, whose weights are shaken and depend on no layout."""
    from scale.train import engine

    model = build(
        sizes(**changes),
        objective,
        precision=run.precision,
        recompute=run.recompute,
        with_features=True,
    )
    shake(model)
    reduction = engine.DistributedDataParallelConfig
    if in_double:
        model.double().config.pipeline_dtype = torch.float64
        # The engine sums gradients in float32.
        engine.DistributedDataParallelConfig = lambda **options: reduction(
            **options | {"grad_reduce_in_fp32": False}
        )
    try:
        return engine.Engine(
            model,
            layout,
            OPTIMIZER,
            lr=OPTIMIZER.lr,
            precision=run.precision,
            distributed_optimizer=run.distributed,
        )
    finally:
        engine.DistributedDataParallelConfig = reduction


def take_steps(context: RankContext, run: Run, num_steps: int) -> dict:
    """Return losses and norms of the first steps, and what the model then predicts."""
    with run.start(context) as layout:
        engine = make_engine(run, layout, SMALL)
        steps = [
            engine.step(share(run, layout, n), step=n + 1, lr=OPTIMIZER.lr)
            for n in range(num_steps)
        ]
        with engine.averaged_weights():
            # More sets than the eight pieces in which two stages take them.
            lengths = [8, 8, 3, 8, 8, 5, 8, 8, 8]
            sets = batch(9, seed=77, num_summary_cells=8, control_lengths=lengths)
            sample = engine.model.eval().sample(sets, num_steps=2, guidance=1.5)
        return {
            "loss": [s.loss for s in steps],
            "norm": [s.grad_norm for s in steps],
            "point": [s.parts["point"] for s in steps],
            "cells": [s.num_cells for s in steps],
            "sample": sample.numpy(),
        }


def gradients(context: RankContext, run: Run) -> dict:
    """Return this rank's gradients of the first step, in float64, by name in the whole model."""
    with run.start(context) as layout:
        engine = make_engine(run, layout, DEEP, in_double=True)
        engine.gradients([in_float64(sets) for sets in share(run, layout, 0, size=2)])
        return {name: describe(p, p.main_grad) for name, p in engine.model.whole_named_parameters()}


def describe(parameter, values) -> tuple:
    """Return values with the axis and the number of halves by which they are cut, or None."""
    cut = getattr(parameter, "tensor_model_parallel", False)
    axis = (parameter.partition_dim, parameter.partition_stride) if cut else None
    return values.detach().numpy().copy(), axis


def whole(parts: list[tuple]) -> np.ndarray:
    """Put the shares of all tensor parallel ranks together."""
    axis = parts[0][1]
    if axis is None:
        return parts[0][0]
    dim, stride = axis
    halves = [np.split(values, stride, dim) for values, _ in parts]
    return np.concatenate([np.concatenate(rank, dim) for rank in zip(*halves, strict=True)], dim)


def whole_gradients(run: Run, ranks: list[dict]) -> dict[str, np.ndarray]:
    """Put the gradients of all ranks together; each stage has its own."""
    # ranks are numbered tensor parallel first, then data parallel, then by stage
    found: dict[str, np.ndarray] = {}
    for first in range(0, run.ranks, run.tensor * run.data):
        stage = ranks[first : first + run.tensor]
        for name in stage[0]:
            assert name not in found, f"{name} is on two stages"
            found[name] = whole([rank[name] for rank in stage])
    return found


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference of the gradient of a parameter."""
    assert found.keys() == expected.keys()
    return max(
        np.linalg.norm(found[name] - value) / (np.linalg.norm(value) + 1e-9)
        for name, value in expected.items()
    )
