"""Every layout of ranks trains as one process does: the same losses, gradients and predictions.

More than one tensor parallel rank share cells as well (sequence parallel): "tensor2" is both, there
is no other tensor parallel layout. Weights are shaken: at the initial ones the readout is zero, and
so is every gradient before it, whatever is broken. The loss of one step is blind to a wrong
gradient, so gradients are compared, in float64.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from example_sets import shake
from layout_runs import (
    SMALL,
    Run,
    gradients,
    make_engine,
    share,
    take_steps,
    whole_gradients,
    worst,
)
from ranks import RankContext, run_ranks
from training_runs import SPLIT, config, pretrain, process, read_metrics, settings, starts

from scale.config import Precision
from scale.train.manifest import newest_checkpoint

STEPS = 10
LAYOUTS = {
    "alone": Run(),
    "tensor2": Run(tensor=2),
    "pipeline2": Run(pipeline=2),
    "data2": Run(data=2),
    "tensor4": Run(tensor=4),
    "data4": Run(data=4),
    "tensor2_pipeline2": Run(tensor=2, pipeline=2),
    "tensor2_data2": Run(tensor=2, data=2),
    "pipeline2_data2": Run(pipeline=2, data=2),
}
DEEPER = LAYOUTS | {"pipeline4": Run(pipeline=4)}
RECOMPUTED = {n: LAYOUTS[n] for n in ("alone", "tensor2", "pipeline2", "tensor2_pipeline2")}
ALONE = Run()


def variants(run: Run) -> list[Run]:
    """Return a layout without and with all that saves memory."""
    return [run, replace(run, recompute=True, distributed=run.data > 1)]


def measure(context: RankContext) -> dict[str, dict[Run, dict]]:
    """Train on every layout of as many ranks, one after the other."""
    layouts = [run for run in LAYOUTS.values() if run.ranks == context.size]
    deeper = [run for run in DEEPER.values() if run.ranks == context.size]
    rounded = [replace(run, precision=Precision.bf16) for run in layouts if run.ranks < 4]
    recomputed = [replace(run, recompute=True) for run in deeper if run in RECOMPUTED.values()]
    return {
        "steps": {v: take_steps(context, v, STEPS) for run in layouts for v in variants(run)},
        "first": {run: take_steps(context, run, 1) for run in rounded},
        "gradients": {run: gradients(context, run) for run in (*deeper, *recomputed)},
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank measured, by the number of ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    return {size: run_ranks(measure, size, folder) for size in (1, 2, 4)}


def named(layouts: dict[str, Run]) -> list:
    return [pytest.param(run, id=name) for name, run in layouts.items() if run != ALONE]


@pytest.mark.parametrize("run", named(LAYOUTS))
@pytest.mark.parametrize("variant", [0, 1], ids=["plain", "saving_memory"])
def test_ten_steps_are_those_of_one_process(told, run, variant):
    run = variants(run)[variant]
    expected = told[1][0]["steps"][ALONE]
    for rank in told[run.ranks]:
        found = rank["steps"][run]
        # float32 sums in another order, carried through ten updates: 4e-7 seen
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-6)
        np.testing.assert_allclose(found["point"], expected["point"], rtol=2e-6)
        np.testing.assert_allclose(found["norm"][0], expected["norm"][0], rtol=1e-6)
        np.testing.assert_allclose(found["norm"], expected["norm"], rtol=1e-5)
        np.testing.assert_allclose(found["sample"], expected["sample"], atol=2e-6)
        assert found["cells"] == expected["cells"]


@pytest.mark.parametrize("run", named(DEEPER))
def test_gradients_are_those_of_one_process(told, run):
    found = whole_gradients(run, [rank["gradients"][run] for rank in told[run.ranks]])
    assert worst(found, whole_gradients(ALONE, [told[1][0]["gradients"][ALONE]])) < 1e-11


@pytest.mark.parametrize("run", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recompute_changes_no_gradient(told, run):
    for rank in told[run.ranks]:
        plain, recomputed = (rank["gradients"][r] for r in (run, replace(run, recompute=True)))
        for name, (values, _) in plain.items():
            if name.startswith("encoder."):
                # The gradient of a gene block lies in memory in another order, and is summed in it.
                np.testing.assert_allclose(recomputed[name][0], values, rtol=1e-9, atol=1e-15)
            else:
                np.testing.assert_array_equal(recomputed[name][0], values, err_msg=name)


@pytest.mark.parametrize("run", named({n: r for n, r in LAYOUTS.items() if r.ranks == 2}))
def test_first_step_in_bf16(told, run):
    alone, run = (replace(r, precision=Precision.bf16) for r in (ALONE, run))
    expected = told[1][0]["first"][alone]
    for rank in told[2]:
        for key in ("loss", "norm"):
            np.testing.assert_allclose(rank["first"][run][key], expected[key], rtol=2e-3)


# --- faults must be found -------------------------------------------------------------------------


def faulty(context: RankContext) -> dict:
    """Break the sum of the condition's gradient over two stages of two ranks, in two ways."""
    from scale.model import layers
    from scale.model.backend import copy_to_tensor_model_parallel_region

    run, results = Run(tensor=2, pipeline=2), {}
    spread, of_message = layers.spread_over_cells, layers.CellsInBlocks.of_message
    # Megatron's own: it loses the sum of a gradient that is not contiguous.
    layers.spread_over_cells = copy_to_tensor_model_parallel_region
    results["sum lost"] = gradients(context, run)
    layers.spread_over_cells = spread

    def spread_again(message_RBD, *, is_full):
        cells = of_message(message_RBD, is_full=is_full)
        return replace(cells, modulation_B6D=spread(cells.modulation_B6D))

    layers.CellsInBlocks.of_message = spread_again
    results["summed twice"] = gradients(context, run)
    layers.CellsInBlocks.of_message = of_message
    return results


def test_a_fault_in_the_condition_of_later_stages_is_found(told, tmp_path):
    run, ranks = Run(tensor=2, pipeline=2), run_ranks(faulty, 4, tmp_path)
    expected = whole_gradients(ALONE, [told[1][0]["gradients"][ALONE]])
    for fault in ranks[0]:
        found = whole_gradients(run, [rank[fault] for rank in ranks])
        assert worst(found, expected) > 0.05, fault


def threads_after(context: RankContext, run: Run, error: str | None) -> list[str]:
    """Train on a layout, leave it, with an error or without, and name this process's threads."""
    from scale.cli import guard

    def train(layout) -> int:
        engine = make_engine(run, layout, SMALL)
        engine.step(share(run, layout, 0), step=1, lr=1e-2)
        if error is not None:
            raise ValueError(error)
        return 0

    def task() -> int:
        with run.start(context) as layout:
            return train(layout)

    assert guard(task, "pretrain", None) == (0 if error is None else 1)
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="threads of C++ are read from /proc")
@pytest.mark.parametrize("error", [None, "bad"], ids=["finished", "failed"])
@pytest.mark.parametrize(
    "run", [LAYOUTS["pipeline2"], LAYOUTS["tensor2"]], ids=["pipeline2", "tensor2"]
)
def test_no_thread_of_a_group_outlives_its_layout(tmp_path, run, error):
    """One that drops a tensor while the interpreter ends would abort the process."""
    for names in run_ranks(threads_after, 2, tmp_path, run, error):
        assert not [name for name in names if "gloo" in name]


def poisoned(context: RankContext) -> list[tuple[str, bool, bool]]:
    """One stage has a gradient that is not finite, or all losses of a batch are not."""
    from scale.train.engine import NonFiniteError

    run, outcomes = Run(pipeline=2), []
    with run.start(context) as layout:
        for kind in ("gradient", "loss"):
            engine = make_engine(run, layout, SMALL)
            engine.step(share(run, layout, 0), step=1, lr=1e-2)
            before = [p.detach().clone() for p in engine.model.parameters()]
            batches = share(run, layout, 1)
            hook = None
            if kind == "gradient" and layout.pipeline_model_parallel_rank == 0:
                weight = engine.model.encoder.genes.weight
                hook = weight.register_hook(lambda gradient: gradient * float("inf"))
            if kind == "loss" and layout.pipeline_model_parallel_rank == 0:
                batches[0] = replace(batches[0], summary_BUG=batches[0].summary_BUG * float("nan"))
            with pytest.raises(NonFiniteError) as caught:
                engine.step(batches, step=2, lr=1e-2)
            after = list(engine.model.parameters())
            unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            if hook is not None:
                hook.remove()
            went_on = np.isfinite(engine.step(share(run, layout, 1), step=2, lr=1e-2).loss)
            outcomes.append((str(caught.value), unchanged, bool(went_on)))
    return outcomes


def test_what_is_not_finite_on_one_stage_stops_all_stages(tmp_path):
    for outcomes in run_ranks(poisoned, 2, tmp_path):
        (gradient, *first), (loss, *second) = outcomes
        assert "non-finite gradient at step 2 (sets 8 to 15)" in gradient
        assert "non-finite loss at step 2 on rank 1 (sets 8 to 15)" in loss
        assert all((*first, *second))


# --- with a store ---------------------------------------------------------------------------------


def curve(context: RankContext, runs: list[Run], store: str, run_dir: str) -> list[tuple]:
    """Three steps on the data module's batches, then the validation of the average."""
    from scale.tasks.training import build_model, open_data, set_statistics
    from scale.tasks.validation import Validation
    from scale.train.engine import Engine
    from scale.train.record import ModelRecord

    results = []
    for run in runs:
        split = f"data.split={run_dir}/split.toml"
        settings = config(run_dir, store, "model.num_layers=2", split)
        with run.start(context) as layout:
            record = ModelRecord(
                model=settings.model,
                objective=settings.objective,
                precision=settings.trainer.precision,
            )
            data = open_data(settings.data, settings.model, layout, seed=0, vocabulary=None)
            model = build_model(record, data.vocabulary, layout, seed=0)
            set_statistics(model, data)
            shake(model)
            engine = Engine(model, layout, settings.optimizer, lr=1e-2)
            batches = data.train_batches(consumed_sets=0, sets_per_batch=4, sets_per_micro_batch=2)
            steps = [
                engine.step(share, step=n + 1, lr=1e-2)
                for n, share in zip(range(3), batches, strict=False)
            ]
            validate = Validation(data, settings.validation, record.objective, sets_per_batch=3)
            with engine.averaged_weights():
                metrics = validate(model, 3)
            data.close()
            results.append(([s.loss for s in steps], [s.grad_norm for s in steps], metrics))
    return results


def test_batches_and_validation_of_a_store_on_two_ranks(toy_store_path, tmp_path):
    (tmp_path / "split.toml").write_text(SPLIT)
    paths = (str(toy_store_path), str(tmp_path))
    losses, norms, metrics = run_ranks(curve, 1, tmp_path, [ALONE], *paths)[0][0]
    for rank in run_ranks(
        curve, 2, tmp_path, [r for r in LAYOUTS.values() if r.ranks == 2], *paths
    ):
        for found in rank:
            np.testing.assert_allclose(found[0], losses, rtol=1e-5)
            np.testing.assert_allclose(found[1], norms, rtol=1e-5)
            assert found[2] == pytest.approx(metrics, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor_size", "num_stages"), [(2, 1), (1, 2), (1, 1)], ids=["tensor2", "pipeline2", "data2"]
)
def test_torchrun_trains_as_one_process(toy_store_path, tmp_path, tensor_size, num_stages):
    """The command of a cluster on two processes, then its checkpoint in one."""
    split = tmp_path / "split.toml"
    split.write_text(SPLIT)
    changes = (
        *("trainer.max_steps=10", "optimizer.warmup_steps=0", "model.num_layers=2"),
        *("trainer.sets_per_micro_batch=1", f"data.split={split}"),
    )
    alone, both, log = tmp_path / "alone", tmp_path / "both", tmp_path / "log"
    assert pretrain(alone, toy_store_path, *changes) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [
        *("pretrain", *settings(toy_store_path, *changes)),
        f"parallel.tensor_model_parallel_size={tensor_size}",
        f"parallel.pipeline_model_parallel_size={num_stages}",
        *("parallel.recompute=true", "name=both", f"hydra.run.dir={both}"),
    ]
    with process(log, *command, launcher=launcher) as running:
        assert running.wait(180) == 0, log.read_text()
    layout = starts(both)[-1]["layout"]
    assert layout["tensor_model_parallel_size"] == tensor_size
    assert layout["pipeline_model_parallel_size"] == num_stages
    ours, theirs = read_metrics(both), read_metrics(alone)
    assert [m["step"] for m in ours] == list(range(1, 11))
    for name in ("train/loss", "val/energy_distance", "val/pearson_delta"):
        np.testing.assert_allclose(
            [m[name] for m in ours if name in m], [m[name] for m in theirs if name in m], rtol=1e-5
        )
    # What two ranks have saved goes on in one.
    assert newest_checkpoint(both).name == "step_00000010"
    assert pretrain(both, toy_store_path, *changes, "trainer.max_steps=12") == 0
    assert read_metrics(both)[-1]["step"] == 12
