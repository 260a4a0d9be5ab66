"""The step: equal on every layout, and stopped before the update by what is not finite."""

import hashlib
import re

import numpy as np
import pytest
import torch
from ranks import RankContext, run_ranks

from scale.config import Precision

STEPS = 10


def make_engine(layout, *, precision=Precision.fp32, seed=0, distributed=False):
    from toy_model import OPTIMIZER, ToyModel

    from scale.train.engine import Engine

    model = ToyModel(tensor_size=layout.tensor_model_parallel_size, precision=precision, seed=seed)
    return Engine(
        model, layout, OPTIMIZER, lr=1e-2, precision=precision, distributed_optimizer=distributed
    )


def share(layout, step, micro=1):
    from toy_model import micro_batches

    return micro_batches(
        step,
        sets_per_batch=4,
        sets_per_micro_batch=micro,
        rank=layout.data_parallel_rank,
        size=layout.data_parallel_size,
    )


def whole_gradients(engine):
    """Gradients by name; sharded ones are put together over the tensor parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    whole = {}
    for name, parameter in engine.model.named_parameters():
        grad = parameter.main_grad.clone()
        if getattr(parameter, "tensor_model_parallel", False):
            size = engine.layout.tensor_model_parallel_size
            parts = [torch.empty_like(grad) for _ in range(size)]
            dist.all_gather(parts, grad, group=parallel_state.get_tensor_model_parallel_group())
            grad = torch.cat(parts, dim=parameter.partition_dim)
        whole[name] = grad.double().numpy()
    return whole


def weights_hash(engine):
    digest = hashlib.sha256()
    state = engine.optimizer.optimizer.state
    for parameter in engine.model.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
        main = getattr(parameter, "main_param", parameter)
        if main is None:  # spread, and kept by another rank
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state[main]:
                digest.update(state[main][key].numpy().tobytes())
    for weight in engine.average.weights.values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def curve(context: RankContext, tensor_size: int, micro: int, distributed: bool = False):
    with context.layout(tensor_size=tensor_size, distributed_optimizer=distributed) as layout:
        engine = make_engine(layout, distributed=distributed)
        gradients = None
        if not distributed:  # there, a rank has the whole gradient of its share only
            engine.gradients(share(layout, 0, micro))
            gradients = whole_gradients(engine)
        steps = [
            engine.step(share(layout, n, micro), step=n + 1, lr=1e-2 / (n + 1))
            for n in range(STEPS)
        ]
        return {
            "loss": [s.loss for s in steps],
            "norm": [s.grad_norm for s in steps],
            "cells": steps[0].num_cells,
            "parts": steps[-1].parts,
            "gradients": gradients,
        }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(curve, 1, tmp_path_factory.mktemp("alone"), 1, 4)[0]


@pytest.mark.parametrize(
    ("size", "tensor_size", "micro", "distributed"),
    [
        (1, 1, 1, False),
        (2, 2, 2, False),
        (2, 1, 1, False),
        (4, 2, 2, False),
        (2, 1, 2, True),
        (4, 2, 1, True),
    ],
    ids=["accumulated", "tensor2", "data2", "tensor2_data2", "spread2", "tensor2_spread2"],
)
def test_layouts_take_the_same_steps(tmp_path, alone, size, tensor_size, micro, distributed):
    for told in run_ranks(curve, size, tmp_path, tensor_size, micro, distributed):
        # fp32 sums in another order; the curve of the loss is compared after ten updates too.
        np.testing.assert_allclose(told["loss"], alone["loss"], rtol=1e-5)
        np.testing.assert_allclose(told["norm"], alone["norm"], rtol=1e-5)
        assert told["cells"] == alone["cells"] == 16
        assert told["parts"]["double"] == pytest.approx(2 * told["loss"][-1])
        for name, gradient in (told["gradients"] or {}).items():
            np.testing.assert_allclose(
                gradient, alone["gradients"][name], rtol=1e-5, atol=1e-7, err_msg=name
            )


def test_logged_loss_is_not_divided_by_micro_batches(alone, tmp_path):
    accumulated = run_ranks(curve, 1, tmp_path, 1, 1)[0]
    assert accumulated["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-6)


def poisoned(context: RankContext, tensor_size: int, bad_rank: int, precision: Precision):
    from toy_model import with_nan

    from scale.train.engine import NonFiniteError

    with context.layout(tensor_size=tensor_size) as layout:
        engine = make_engine(layout, precision=precision)
        engine.step(share(layout, 0), step=1, lr=1e-2)
        before = weights_hash(engine)
        batches = share(layout, 1)
        if context.rank == bad_rank:
            batches = [with_nan(batches[0]), *batches[1:]]
        with pytest.raises(NonFiniteError) as caught:
            engine.step(batches, step=2, lr=1e-2)
        unchanged = weights_hash(engine) == before
        # The next batch is taken as if nothing had happened.
        after = engine.step(share(layout, 2), step=2, lr=1e-2)
        return str(caught.value), unchanged, np.isfinite(after.loss)


@pytest.mark.parametrize(
    ("tensor_size", "message"),
    [(1, r"non-finite loss at step 2 on rank 1 \(sets 5 to 7\)"), (2, "step 2")],
    ids=["data2", "tensor2"],
)
def test_what_is_not_finite_on_one_rank_stops_all(tmp_path, tensor_size, message):
    for text, unchanged, went_on in run_ranks(
        poisoned, 2, tmp_path, tensor_size, 1, Precision.fp32
    ):
        assert unchanged
        assert went_on
        assert re.search(message, text), text
        assert "stopped before the update" in text


def test_non_finite_gradient_stops_before_the_update(tmp_path):
    told = run_ranks(infinite_gradient, 1, tmp_path)[0]
    assert "non-finite gradient at step 1 (sets 0 to 3)" in told


def infinite_gradient(context: RankContext):
    from scale.train.engine import NonFiniteError

    with context.layout() as layout:
        engine = make_engine(layout)
        engine.model.readout.weight.register_hook(lambda grad: grad * float("inf"))
        before = weights_hash(engine)
        with pytest.raises(NonFiniteError) as caught:
            engine.step(share(layout, 0), step=1, lr=1e-2)
        assert weights_hash(engine) == before
        return str(caught.value)


def rounded(context: RankContext, tensor_size: int):
    with context.layout(tensor_size=tensor_size) as layout:
        engine = make_engine(layout, precision=Precision.bf16)
        losses = [engine.step(share(layout, n), step=n + 1, lr=1e-2).loss for n in range(4)]
        kinds = {p.dtype for p in engine.model.parameters()}
        return losses, len(kinds), engine.optimizer_kind


def test_bf16_blocks_train_with_fp32_copies(tmp_path, alone):
    losses, num_dtypes, kind = run_ranks(rounded, 1, tmp_path, 1)[0]
    assert kind == "float16"
    assert num_dtypes == 2
    np.testing.assert_allclose(losses[0], alone["loss"][0], rtol=2e-3)
    for told in run_ranks(rounded, 2, tmp_path, 2):
        np.testing.assert_allclose(told[0], losses, rtol=1e-2)
