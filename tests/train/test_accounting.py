"""Costs of a training: what is counted is what a rank really holds and does."""

import pytest
import torch
from ranks import run_ranks
from toy_model import OPTIMIZER, ToyModel, micro_batches
from training_runs import pretrain, read_metrics, starts

from scale.config import ParallelConfig, Precision, compose
from scale.model.model import ScaleModel
from scale.model.sizes import first_stage_layers
from scale.runtime import World
from scale.tasks.info import _empty_vocabulary
from scale.train import parallel
from scale.train.accounting import Accounting, measure_ceiling, parameters_per_rank, state_bytes
from scale.train.engine import Engine

CPU = torch.device("cpu")


def held_and_counted(layout, precision, *, is_distributed):
    """Bytes of weights, gradients, average and AdamW after a step; and what the formula says."""
    model = ToyModel(precision=precision)
    engine = Engine(
        model,
        layout,
        OPTIMIZER,
        lr=1e-2,
        precision=precision,
        distributed_optimizer=is_distributed,
    )
    rank, size = layout.data_parallel_rank, layout.data_parallel_size
    batches = micro_batches(0, sets_per_batch=2, sets_per_micro_batch=1, rank=rank, size=size)
    engine.step(batches, step=1, lr=1e-2)
    tensors = [p.data for p in model.parameters()]
    tensors += [p.main_grad for p in model.parameters()]
    tensors += list(engine.average.weights.values())
    optimizer = engine.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            tensors += [p.data for p in group["params"]]
        for state in part.optimizer.state.values():
            tensors += [v for v in state.values() if torch.is_tensor(v) and v.ndim]
    stored = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    counted = sum(
        state_bytes(p.numel(), dtype, optimizer_ranks=size if is_distributed else 1)
        for p in model.parameters()
        for dtype in [Precision.bf16 if p.dtype is torch.bfloat16 else Precision.fp32]
    )
    return sum(stored.values()), counted


def held_by_a_rank(context):
    with context.layout() as layout:
        return [
            held_and_counted(layout, precision, is_distributed=is_distributed)
            for precision, is_distributed in (
                (Precision.fp32, False),
                (Precision.bf16, False),
                (Precision.fp32, True),
            )
        ]


def test_state_bytes_are_those_of_an_engine(tmp_path):
    first, second = run_ranks(held_by_a_rank, 2, tmp_path)
    for held, counted in first[:2] + second[:2]:
        assert held == counted
    spread = first[2][0] + second[2][0]
    assert spread == pytest.approx(first[2][1] + second[2][1], rel=0.05)  # buckets are padded
    assert spread < 2 * first[0][0]


def test_ranks_hold_their_share_of_the_model():
    names = _empty_vocabulary(50)
    sizes = ("model=tiny", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=5")
    settings = compose("pretrain", sizes, run_dir="-")
    parallel.start(ParallelConfig(), World(0, 1, 0), seed=0, device=CPU)
    model = ScaleModel(settings.model, settings.objective, names, seed=0)
    parallel.stop()
    count = {name: p.numel() for name, p in model.named_parameters()}
    whole = sum(count.values())
    assert parameters_per_rank(settings.model, names) == whole
    maps = sum(n for name, n in count.items() if ".linear_" in name and "blocks." in name)
    shared = parameters_per_rank(settings.model, names, tensor_size=2)
    assert whole - shared == maps // 2
    first = first_stage_layers(settings.model, 50, 2)
    stages = [0, 0]
    for name, number in count.items():
        layer = name.partition(".layers.")[2].partition(".")[0]
        is_late = int(layer) >= first if layer else name.startswith(("readout.", "blocks."))
        stages[is_late] += number
    assert parameters_per_rank(settings.model, names, num_stages=2) == max(stages)


def test_mfu_is_told_only_where_a_ceiling_was_measured():
    facts = {"num_parameters": 1, "flops_per_cell": 3e9, "world_size": 4}
    on_cpu = Accounting(**facts, ceiling_tflops_per_second=None)
    assert on_cpu.metrics(4000.0) == {"train/tflops_per_second": pytest.approx(3.0)}
    on_gpu = Accounting(**facts, ceiling_tflops_per_second=30.0)
    assert on_gpu.metrics(4000.0)["train/mfu"] == pytest.approx(0.1)
    assert on_gpu.record()["ceiling_tflops_per_second"] == 30.0


def test_ceiling_is_a_rate():
    for precision in Precision:
        assert 0 < measure_ceiling(CPU, precision, size=64) < 1e3


@pytest.mark.gpu
def test_mfu_of_a_run_is_a_share_of_the_measured_ceiling(tmp_path, toy_store_path):
    changes = ("trainer.device=cuda", "trainer.precision=bf16")
    assert pretrain(tmp_path / "run", toy_store_path, *changes) == 0
    (record,) = starts(tmp_path / "run")
    assert record["ceiling_tflops_per_second"] > 10
    for metrics in read_metrics(tmp_path / "run"):
        share = metrics["train/tflops_per_second"] / record["ceiling_tflops_per_second"]
        assert metrics["train/mfu"] == pytest.approx(share)
        assert 0 < share < 1
