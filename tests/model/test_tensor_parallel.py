"""Two ranks that share the cells and weights of a set compute what one computes.

Weights are shaken: at the initial ones the readout is zero, and so is every gradient before it,
whatever is broken. The loss of one step is blind to a wrong gradient: gradients are compared.
"""

from pathlib import Path

import numpy as np
import pytest
from example_sets import batch, build, in_float64, shake, sizes
from layout_runs import describe, whole
from ranks import RankContext, run_ranks, save_weights

from scale.config import ObjectiveConfig, OptimizerConfig

CASES = {
    "linear": {},
    "patches": {"gene_layers": 1},
}
OBJECTIVE = ObjectiveConfig(mean_weight=1.0, mmd_weight=0.2, masked_gene_fraction=0.25)
FAULTS = ("unmarked table", "modulation not spread", "gather sums gradients")


def masked_batch():
    return batch(control_lengths=[8, 5, 6], treated_lengths=[4, 8, 6])


def measure(changes: dict, fault: str | None = None) -> dict:
    """Return loss, sample and this rank's gradients in float64, after Megatron's reduction."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    model = shake(build(sizes(**changes), OBJECTIVE)).double()
    if fault == "unmarked table":
        model.blocks.stack.layers[1].modulation.sequence_parallel = False
    sets = in_float64(masked_batch())
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=False), model
    )
    wrapped.zero_grad_buffer()
    losses = wrapped(sets)
    losses.total.backward()
    finalize_model_grads([wrapped])
    return {
        "loss": losses.total.item(),
        "sample": model.eval().sample(sets, num_steps=2, guidance=1.5).numpy(),
        "gradients": {n: describe(p, p.main_grad) for n, p in model.named_parameters()},
    }


def both_cases(context: RankContext, folder: Path) -> dict:
    """Run all cases in one start of the ranks; faults are put in by replacing what they break."""
    from scale.model import layers, model
    from scale.model.backend import gather_from_sequence_parallel_region

    def gather_with_sum(x):
        gathered = gather_from_sequence_parallel_region(
            x.transpose(0, 1).contiguous(), tensor_parallel_output_grad=True
        )
        return gathered.transpose(0, 1)

    results = {}
    with context.layout(tensor_size=2):
        for name, changes in CASES.items():
            results[name] = measure(changes)
        results["unmarked table"] = measure({}, "unmarked table")
        kept, layers.spread_over_cells = layers.spread_over_cells, lambda x: x
        results["modulation not spread"] = measure({})
        layers.spread_over_cells = kept
        kept, model.gather_cells = model.gather_cells, gather_with_sum
        results["gather sums gradients"] = measure({})
        model.gather_cells = kept
        results["engine"] = engine_step(context, folder)
        results["weights"] = {
            n: describe(p, p) for n, p in build(sizes(gene_layers=1)).named_parameters()
        }
        results["refused"] = refusals()
    return results


def refusals() -> list[str]:
    found = []
    for changes in ({"set_size": 9}, {"num_heads": 1}, {"num_summary_cells": 5}):
        with pytest.raises(ValueError, match=f"must divide model.{next(iter(changes))}") as caught:
            build(sizes(**changes))
        found.append(str(caught.value))
    return found


def engine_step(context: RankContext | None, folder: Path | None = None) -> dict:
    """Take the engine's first step; save the weights in ``folder``, or load what is there."""
    from scale.train.engine import Engine
    from scale.train.parallel import Layout
    from scale.train.sharded import load_state

    size = 2 if context else 1
    layout = Layout(
        world_size=size,
        rank=context.rank if context else 0,
        tensor_model_parallel_size=size,
        tensor_model_parallel_rank=context.rank if context else 0,
    )
    model = shake(build(sizes(gene_layers=1)))
    engine = Engine(model, layout, OptimizerConfig(), lr=1e-3)
    result = engine.step([masked_batch()], step=1, lr=1e-3)
    if context:
        save_weights(folder, engine)
    elif folder:
        shake(model, seed=5)  # other weights, so that all must come from the file
        load_state(folder, engine)
    sample = model.eval().sample(masked_batch(), num_steps=1)
    return {"loss": result.loss, "norm": result.grad_norm, "sample": sample.numpy()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "weights").mkdir()
    return run_ranks(both_cases, 2, folder, folder / "weights")


@pytest.fixture(scope="module")
def one(alone):
    return {name: measure(changes) for name, changes in CASES.items()}


def worst_gradient(one: dict, two: list[dict], name: str, case: str) -> float:
    """Return the largest relative difference of a whole gradient."""
    errors = []
    for parameter, (expected, _) in one[case]["gradients"].items():
        found = whole([rank[name]["gradients"][parameter] for rank in two])
        errors.append(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-9))
    return max(errors)


@pytest.mark.parametrize("case", CASES)
def test_loss_sample_and_gradients_equal_those_of_one_rank(one, two, case):
    for rank in two:
        assert rank[case]["loss"] == pytest.approx(one[case]["loss"], rel=1e-12)
        np.testing.assert_allclose(rank[case]["sample"], one[case]["sample"], atol=1e-10)
    assert worst_gradient(one, two, case, case) < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_whole_weights_have_the_same_gradient_on_both_ranks(two, case):
    for name, (values, axis) in two[0][case]["gradients"].items():
        if axis is None:
            np.testing.assert_allclose(
                values, two[1][case]["gradients"][name][0], rtol=1e-9, atol=1e-12, err_msg=name
            )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_layout_shows_in_the_gradients_and_not_in_the_loss(one, two, fault):
    assert two[0][fault]["loss"] == pytest.approx(one["linear"]["loss"], rel=1e-12)
    assert worst_gradient(one, two, fault, "linear") > 0.05


# Megatron calls a function of torch by its old name.
@pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning")
def test_step_of_the_engine_and_its_weights_on_one_rank(alone, two, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = next(base.glob("ranks*/weights"))
    found = engine_step(None, folder)
    for rank in two:
        assert rank["engine"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
        assert rank["engine"]["norm"] == pytest.approx(found["norm"], rel=1e-5)
        np.testing.assert_allclose(rank["engine"]["sample"], found["sample"], atol=1e-5)


def test_initial_weights_are_shares_of_those_of_one_rank(alone, two):
    expected = dict(build(sizes(gene_layers=1)).named_parameters())
    cut = 0
    for name, parameter in expected.items():
        parts = [rank["weights"][name] for rank in two]
        np.testing.assert_array_equal(whole(parts), parameter.detach().numpy(), err_msg=name)
        cut += parts[0][1] is not None
    assert cut == 8  # four linear maps in each of two set blocks; gene blocks are whole


def test_sizes_that_cannot_be_shared_are_refused(two):
    assert len(two[0]["refused"]) == 3
