"""A checkpoint of one layout goes on in any other: weights, average, moments, place in the data.

``spread`` is an optimizer whose state is spread over the data parallel ranks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankContext, run_ranks
from training_runs import all_weights, config

from scale.config import Precision, PretrainConfig

LAYOUTS = {
    "alone": (1, {}),
    "tensor2": (2, {"tensor_size": 2}),
    "data2": (2, {}),
    "data4": (4, {}),
    "spread2": (2, {"distributed_optimizer": True}),
    "pipeline2": (2, {"pipeline_model_parallel_size": 2}),
    "tensor2_spread2": (4, {"tensor_size": 2, "distributed_optimizer": True}),
    "pipeline2_spread2": (4, {"pipeline_model_parallel_size": 2, "distributed_optimizer": True}),
}
FP32 = (
    ("tensor2", "alone"),
    ("tensor2", "pipeline2"),
    ("data2", "alone"),
    ("data2", "data4"),
    ("data2", "tensor2"),
    ("spread2", "alone"),
    ("pipeline2", "alone"),
    ("pipeline2", "pipeline2"),
    ("pipeline2", "spread2"),
)
FP32_OF_FOUR = (
    ("spread2", "tensor2_spread2"),
    ("tensor2_spread2", "pipeline2"),
    ("pipeline2_spread2", "pipeline2_spread2"),
    ("pipeline2_spread2", "tensor2"),
)
BF16 = (("tensor2", "alone"), ("spread2", "alone"), ("tensor2", "spread2"))
TABLE = [
    *(pytest.param(a, b, Precision.fp32, id=f"{a}-to-{b}") for a, b in FP32),
    *(
        pytest.param(a, b, Precision.fp32, id=f"{a}-to-{b}", marks=pytest.mark.slow)
        for a, b in FP32_OF_FOUR
    ),
    *(pytest.param(a, b, Precision.bf16, id=f"{a}-to-{b}-bf16") for a, b in BF16),
]
STEPS = 3


def train(
    context: RankContext,
    settings: dict,
    precision: Precision,
    run: PretrainConfig,
    resume_from: str | None,
):
    """Take three steps, save, and take three more; or load, save at once, and take three more."""
    from scale.tasks.training import build_model, open_data, set_statistics
    from scale.train.checkpoint import CheckpointWrite, load_checkpoint
    from scale.train.engine import Engine
    from scale.train.record import ModelRecord, TrainingState

    with context.layout(**settings) as layout:
        record = ModelRecord(model=run.model, objective=run.objective, precision=precision)
        data = open_data(run.data, run.model, layout, seed=0, vocabulary=None)
        model = build_model(record, data.vocabulary, layout, seed=0)
        if resume_from is None:
            set_statistics(model, data)
        shake(model, everything=resume_from is not None)
        engine = Engine(
            model,
            layout,
            run.optimizer,
            lr=1e-3,
            precision=precision,
            distributed_optimizer=settings.get("distributed_optimizer", False),
        )
        state = TrainingState(step=0, consumed_sets=0, data={})
        if resume_from is not None:
            state = load_checkpoint(Path(resume_from), engine)
        batches = data.train_batches(
            consumed_sets=data.check_state(state.data) if state.data else 0,
            sets_per_batch=4,
            sets_per_micro_batch=1,
        )
        told = []

        def step(number: int) -> None:
            micro_batches = next(batches)
            sets = [int(n) for batch in micro_batches for n in batch.set_index_B]
            result = engine.step(micro_batches, step=number, lr=1e-3)
            told.append((result.loss, result.grad_norm, sets))

        for number in range(state.step + 1, STEPS + 1):
            step(number)
        consumed = 4 * STEPS
        write = CheckpointWrite(
            Path(run.run_dir),
            engine,
            TrainingState(step=STEPS, consumed_sets=consumed, data=data.state_dict(consumed)),
            record=record,
            vocabulary=data.vocabulary,
        )
        write.write()
        checkpoint = write.finish(keep_last=1)
        for number in range(STEPS + 1, 2 * STEPS + 1):
            step(number)
        data.close()
        return str(checkpoint), told[-STEPS:]


def shake(model: torch.nn.Module, *, everything: bool) -> None:
    """Replace the readout, whose zeros at the beginning would hide every fault of the blocks.

    Or all weights, by others on each rank: then all must come from the checkpoint.
    """
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if everything or name == "readout.genes.weight":
                weight.copy_(0.1 * torch.randn_like(weight))


def settings_of(run_dir: Path, store: Path) -> PretrainConfig:
    return config(run_dir, store, "optimizer.clip_norm=0.1", "model.num_layers=2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy_store_path):
    """(layout, precision) -> what each rank told of an uninterrupted run; run once each."""
    runs: dict[tuple[str, Precision], list] = {}

    def get(name: str, precision: Precision):
        if (name, precision) not in runs:
            size, settings = LAYOUTS[name]
            folder = tmp_path_factory.mktemp(name)
            run = settings_of(folder / "run", toy_store_path)
            runs[name, precision] = run_ranks(train, size, folder, settings, precision, run, None)
        return runs[name, precision]

    return get


def global_sets(ranks: list, number: int) -> set[int]:
    """Return the sets that all ranks together took in a step."""
    return {n for _, told in ranks for n in told[number][2]}


@pytest.mark.parametrize(("before", "after", "precision"), TABLE)
def test_run_goes_on_in_another_layout(saved, toy_store_path, tmp_path, before, after, precision):
    first = saved(before, precision)
    checkpoint = first[0][0]
    size, settings = LAYOUTS[after]
    run = settings_of(tmp_path / "run", toy_store_path)
    resumed = run_ranks(train, size, tmp_path, settings, precision, run, checkpoint)
    # What was loaded is what was saved, to the bit: also the moments and the fp32 copies.
    ours, theirs = all_weights(Path(checkpoint)), all_weights(Path(resumed[0][0]))
    assert ours.keys() == theirs.keys()
    prefixes = {key.split(".")[1] for key in ours if key.startswith("optimizer.")}
    assert prefixes == {"exp_avg", "exp_avg_sq"} | (
        {"fp32"} if precision is Precision.bf16 else set()
    )
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    loss, norm = {Precision.fp32: (1e-6, 1e-5), Precision.bf16: (1e-2, 1e-2)}[precision]
    if before == after:
        loss = norm = 0.0
    for number in range(STEPS):
        assert global_sets(resumed, number) == global_sets(first, number)
    for _, told in resumed:
        np.testing.assert_allclose([t[0] for t in told], [t[0] for t in first[0][1]], rtol=loss)
        np.testing.assert_allclose([t[1] for t in told], [t[1] for t in first[0][1]], rtol=norm)
