"""Training of ``model=base`` in bf16 on one GPU: cells/s, MFU, data wait, memory, trace.

scripts/benchmarks/step.py --parts gpu [--folder DIR] [--json FILE]

The loader reads a store of drawn cells (set A of data_sets.py with 60,000 cells), as ``scale
pretrain`` reads it; a step is ``Engine.step``. Steps are timed together, from a synchronised start
to a synchronised end, reading included; the first ones, which choose kernels, are left out. Sets
per micro-batch are swept with the layers of torch, then the best is repeated with those of
Transformer Engine where it imports. MFU is the model's arithmetic (three forward passes) over the
ceiling, a bf16 matrix product measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scale.config import Backend, PretrainConfig, compose

if TYPE_CHECKING:
    from scale.train.engine import Engine
    from scale.types import Batch

SETS_PER_MICRO_BATCH = (8, 16, 32)
NUM_CELLS = 60_000
WARM_STEPS, TIMED_STEPS, TRACED_STEPS = 6, 20, 3
OVERRIDES = ("model=base", "trainer=gpu", "trainer.sets_per_batch=32")


@dataclass(frozen=True, slots=True)
class Training:
    """An engine and the steps it is fed with."""

    engine: Engine
    batches: Iterator[list[Batch]]
    flops_per_cell: float

    def steps(self, first: int, count: int) -> tuple[int, float]:
        """Take steps; return the treated cells they saw and the seconds blocked in the loader."""
        cells, waited = 0, 0.0
        for step in range(first, first + count):
            asked = time.perf_counter()
            micro_batches = next(self.batches)
            waited += time.perf_counter() - asked
            cells += self.engine.step(micro_batches, step=step, lr=1e-4).num_cells
        return cells, waited


def make_store(folder: Path, num_cells: int) -> Path:
    """Return a store of drawn cells."""
    from data_sets import SET_A
    from step_commands import make_files

    # few conditions, so that sets of 256 cells are full
    return make_files(folder, SET_A.sized(num_cells, num_cells // 1_000, num_lines=2)).store


def measure_gpu(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return the figures of the fastest size of micro-batch; nothing where there is no GPU."""
    from scale.config import Precision
    from scale.train.accounting import measure_ceiling

    if not torch.cuda.is_available():
        print("gpu: torch finds no CUDA device; this part is left out")
        return {}
    device = torch.device("cuda", 0)
    store = make_store(folder, NUM_CELLS)
    ceiling = measure_ceiling(device, Precision.bf16)
    print(f"{torch.cuda.get_device_name(device)}: {ceiling:,.0f} TFLOP/s in a bf16 product")
    sizes = SETS_PER_MICRO_BATCH[-1:] if quick else SETS_PER_MICRO_BATCH
    rows = [measure(device, ceiling, settings(store, Backend.local, size)) for size in sizes]
    done = [row for row in rows if "cells_per_second" in row]
    if not done:
        raise RuntimeError(f"no size of micro-batch fits into the memory: {rows}")
    best = max(done, key=lambda row: float(row["cells_per_second"]))
    size = int(best["sets_per_micro_batch"])
    if has_transformer_engine():
        rows.append(measure(device, ceiling, settings(store, Backend.te, size)))
    trace = folder / "step-trace.json"
    measure(device, ceiling, settings(store, Backend.local, size), trace=trace)
    return {
        "device": torch.cuda.get_device_name(device),
        "mfu": best["mfu"],
        "cells_per_second": best["cells_per_second"],
        "data_wait_fraction": best["data_wait_fraction"],
        "peak_memory_gb": best["peak_memory_gb"],
        "matmul_ceiling_tflops": ceiling,
        "gpu_rows": rows,
    }


def settings(store: Path, backend: Backend, sets_per_micro_batch: int) -> PretrainConfig:
    """Return the settings of a training."""
    config: PretrainConfig = compose(
        "pretrain",
        [
            *OVERRIDES,
            f"data.store={store}",
            "data.split=null",
            f"model.backend={backend.value}",
            f"trainer.sets_per_micro_batch={sets_per_micro_batch}",
        ],
        run_dir=store.with_suffix(".run"),
    )
    return config


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine imports."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        print(f"Transformer Engine is left out: {error}")
        return False
    return True


def measure(
    device: torch.device, ceiling: float, config: PretrainConfig, *, trace: Path | None = None
) -> dict[str, Any]:
    """Train some steps; return the figures, or that memory was short."""
    from scale.runtime import World
    from scale.tasks.training import build_model, open_data, set_statistics
    from scale.train import parallel
    from scale.train.engine import Engine
    from scale.train.parallel import micro_batch_sets
    from scale.train.record import ModelRecord

    trainer, is_cuda = config.trainer, device.type == "cuda"
    layout = parallel.start(config.parallel, World(0, 1, 0), seed=0, device=device)
    data = open_data(config.data, config.model, layout, seed=0, vocabulary=None)
    row: dict[str, Any] = {
        "backend": config.model.backend.value,
        "sets_per_micro_batch": micro_batch_sets(trainer, layout),
        "sets_per_step": trainer.sets_per_batch,
    }
    try:
        record = ModelRecord(
            model=config.model, objective=config.objective, precision=trainer.precision
        )
        model = build_model(record, data.vocabulary, layout, seed=0)
        set_statistics(model, data)
        engine = Engine(model, layout, config.optimizer, lr=1e-4, precision=trainer.precision)
        batches = data.train_batches(
            consumed_sets=0,
            sets_per_batch=trainer.sets_per_batch,
            sets_per_micro_batch=micro_batch_sets(trainer, layout),
        )
        training = Training(engine, batches, model.flops_per_cell())
        if trace is None:
            row |= timed(training, device, ceiling)
        else:
            traced(training, trace, is_cuda=is_cuda)
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    finally:
        data.close()
        parallel.stop()
        if is_cuda:
            torch.cuda.empty_cache()
    print(row)
    return row


def timed(training: Training, device: torch.device, ceiling: float) -> dict[str, float]:
    """Return the figures of timed steps."""
    is_cuda = device.type == "cuda"
    training.steps(1, WARM_STEPS)
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    cells, waited = training.steps(1 + WARM_STEPS, TIMED_STEPS)
    if is_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    rate = cells / seconds
    return {
        "ms_per_step": seconds / TIMED_STEPS * 1e3,
        "cells_per_second": rate,
        "mfu": rate * training.flops_per_cell / (ceiling * 1e12),
        "data_wait_fraction": waited / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda else 0.0,
    }


def traced(training: Training, trace: Path, *, is_cuda: bool) -> None:
    """Print the operators that take longest and write a trace for chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    training.steps(1, WARM_STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        training.steps(1 + WARM_STEPS, TRACED_STEPS)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))
    profiler.export_chrome_trace(str(trace))
    print(f"trace: {trace}")
