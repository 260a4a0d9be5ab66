"""The model itself, with cells of a store, on one process, two tensor and two data parallel."""

import numpy as np
import pytest
import torch
from ranks import RankContext, run_ranks
from training_runs import (
    config,
    pretrain,
    process,
    read_metrics,
    settings,
    starts,
)

from scale.train.manifest import newest_checkpoint

STEPS = 10


def curve(context: RankContext, tensor_size: int, store: str, run_dir: str):
    """Ten steps of the engine on the data module's batches."""
    from scale.tasks.training import build_model, open_data, set_statistics
    from scale.train.engine import Engine
    from scale.train.record import ModelRecord

    run = config(run_dir, store, "optimizer.clip_norm=0.1")
    with context.layout(tensor_size=tensor_size) as layout:
        record = ModelRecord(
            model=run.model, objective=run.objective, precision=run.trainer.precision
        )
        data = open_data(run.data, run.model, layout, seed=0, vocabulary=None)
        model = build_model(record, data.vocabulary, layout, seed=0)
        set_statistics(model, data)
        # The readout starts at zero, which would hide every fault of the blocks.
        torch.manual_seed(5)
        with torch.no_grad():
            model.readout.genes.weight.copy_(0.1 * torch.randn_like(model.readout.genes.weight))
        engine = Engine(model, layout, run.optimizer, lr=1e-3)
        batches = data.train_batches(consumed_sets=0, sets_per_batch=4, sets_per_micro_batch=None)
        steps = [
            engine.step(share, step=n + 1, lr=1e-3)
            for n, share in zip(range(STEPS), batches, strict=False)
        ]
        data.close()
        return [s.loss for s in steps], [s.grad_norm for s in steps]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, toy_store_path):
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(curve, 1, folder, 1, str(toy_store_path), str(folder))[0]


@pytest.mark.parametrize("tensor_size", [2, 1], ids=["tensor2", "data2"])
def test_layouts_have_one_curve(alone, toy_store_path, tmp_path, tensor_size):
    arguments = (tensor_size, str(toy_store_path), str(tmp_path))
    for losses, norms in run_ranks(curve, 2, tmp_path, *arguments):
        # fp32 sums in another order, carried through ten updates
        np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
        np.testing.assert_allclose(norms[0], alone[1][0], rtol=1e-5)
        np.testing.assert_allclose(norms, alone[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_size", [2, 1], ids=["tensor2", "data2"])
def test_torchrun_trains_as_one_process(toy_store_path, tmp_path, tensor_size):
    """The command of a cluster on two processes, then its checkpoint in one."""
    changes = ("trainer.max_steps=10", "optimizer.warmup_steps=0")
    alone, both, log = tmp_path / "alone", tmp_path / "both", tmp_path / "log"
    assert pretrain(alone, toy_store_path, *changes) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    layout = f"parallel.tensor_model_parallel_size={tensor_size}"
    command = [
        *("pretrain", *settings(toy_store_path, *changes), layout),
        *("name=both", f"hydra.run.dir={both}"),
    ]
    with process(log, *command, launcher=launcher) as running:
        assert running.wait(180) == 0, log.read_text()
    assert starts(both)[-1]["layout"]["tensor_model_parallel_size"] == tensor_size
    ours, theirs = read_metrics(both), read_metrics(alone)
    assert [m["step"] for m in ours] == list(range(1, 11))
    np.testing.assert_allclose(
        [m["train/loss"] for m in ours], [m["train/loss"] for m in theirs], rtol=1e-5
    )
    # What two ranks have saved goes on in one.
    assert newest_checkpoint(both).name == "step_00000010"
    assert pretrain(both, toy_store_path, *changes, "trainer.max_steps=12") == 0
    assert read_metrics(both)[-1]["step"] == 12
