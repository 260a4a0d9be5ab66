"""Layouts: who is who, what is refused, and a peer that hangs or dies."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankContext, run_ranks

from scale.config import ModelConfig, ParallelConfig, TrainerConfig, compose
from scale.model.sizes import first_stage_layers
from scale.runtime import World
from scale.train import parallel
from scale.train.parallel import Layout, check_layout

CPU = torch.device("cpu")


def coordinates(context: RankContext, tensor_size: int, num_stages: int = 1) -> tuple[int, ...]:
    with context.layout(tensor_size=tensor_size, pipeline_model_parallel_size=num_stages) as layout:
        total = torch.ones(1)
        dist.all_reduce(total)
        return (
            layout.tensor_model_parallel_rank,
            layout.data_parallel_rank,
            layout.data_parallel_size,
            int(total),
            layout.pipeline_model_parallel_rank,
            layout.losses_from,
        )


HUNG_SECONDS = 60.0
"""Longest time that a rank hangs; it ends when the other has noticed."""


def hang(context: RankContext, noticed: Path) -> float:
    with context.layout(tensor_size=2, timeout_seconds=1.5):
        from megatron.core import parallel_state

        started = time.monotonic()
        if context.rank == 1:
            while not noticed.exists() and time.monotonic() - started < HUNG_SECONDS:
                time.sleep(0.1)
            return 0.0
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
        noticed.touch()
        return time.monotonic() - started


def test_ranks_are_numbered_tensor_parallel_first_and_stages_last(tmp_path):
    assert run_ranks(coordinates, 2, tmp_path, 2) == [(0, 0, 1, 2, 0, 0), (1, 0, 1, 2, 0, 0)]
    assert run_ranks(coordinates, 2, tmp_path, 1) == [(0, 0, 2, 2, 0, 0), (0, 1, 2, 2, 0, 0)]
    product = run_ranks(coordinates, 4, tmp_path, 2)
    assert [p[:2] for p in product] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    staged = run_ranks(coordinates, 4, tmp_path, 1, 2)
    assert [(p[1], p[4], p[5]) for p in staged] == [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)]


def test_hung_peer_is_noticed_in_a_subgroup(tmp_path):
    # The timeout of the world does not reach sub-groups; without the second one this took 30 min.
    waited = run_ranks(hang, 2, tmp_path, tmp_path / "noticed")[0]
    assert 1.0 < waited < HUNG_SECONDS / 2


def test_world_of_one_starts_twice_and_stops_twice():
    alone = World(0, 1, 0)
    first = parallel.start(ParallelConfig(), alone, seed=1, device=CPU)
    assert parallel.start(ParallelConfig(), alone, seed=1, device=CPU) is first
    parallel.stop()
    assert dist.is_initialized()
    parallel.stop()
    assert not dist.is_initialized()
    parallel.stop()


def test_sizes_that_do_not_fit_the_world_are_refused():
    with pytest.raises(ValueError, match=r"size \(3\) must divide the 4 ranks; use 1, 2 or 4"):
        parallel.start(
            ParallelConfig(tensor_model_parallel_size=3), World(0, 4, 0), seed=0, device=CPU
        )
    with pytest.raises(ValueError, match=r"pipeline_model_parallel_size \(3\) .* use 1 or 2"):
        parallel.start(
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3),
            World(0, 4, 0),
            seed=0,
            device=CPU,
        )
    with pytest.raises(ValueError, match="distributed_optimizer .* there is 1 .* 2 pipeline"):
        parallel.start(
            ParallelConfig(pipeline_model_parallel_size=2, distributed_optimizer=True),
            World(0, 2, 0),
            seed=0,
            device=CPU,
        )
    with pytest.raises(ValueError, match="distributed_optimizer .* there is 1"):
        parallel.start(
            ParallelConfig(distributed_optimizer=True), World(0, 1, 0), seed=0, device=CPU
        )
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        parallel.start(ParallelConfig(), World(0, 2, 0), seed=0, device=CPU)
    assert not dist.is_initialized()


MODEL = ModelConfig(
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    ffn_hidden_size=384,
    set_size=32,
    num_summary_cells=32,
    lr=1e-3,
)


def test_sizes_that_the_layout_cannot_share_out_are_refused():
    trainer = TrainerConfig(max_steps=1, sets_per_batch=100)
    layout = Layout(world_size=8, data_parallel_size=8)
    with pytest.raises(ValueError, match=r"\(100\) must be a multiple of the 8 .* use 96"):
        check_layout(MODEL, trainer, layout)
    trainer = replace(trainer, sets_per_batch=96, sets_per_micro_batch=5)
    with pytest.raises(ValueError, match=r"\(5\) must divide the 12 sets .* use 1, 2, 3, 4, 6 or"):
        check_layout(MODEL, trainer, layout)
    check_layout(MODEL, replace(trainer, sets_per_micro_batch=4), layout)
    layout = Layout(world_size=3, tensor_model_parallel_size=3)
    with pytest.raises(ValueError, match=r"size \(3\) must divide model.num_heads \(4\); use 1$"):
        check_layout(MODEL, trainer, layout)
    layout = Layout(world_size=8, tensor_model_parallel_size=8)
    with pytest.raises(ValueError, match=r"divide model.num_heads \(4\); use 1, 2 or 4"):
        check_layout(MODEL, trainer, layout)


def test_stages_that_the_model_cannot_fill_are_refused():
    trainer = TrainerConfig(max_steps=1, sets_per_batch=4)
    layout = Layout(world_size=4, pipeline_model_parallel_size=4)
    with pytest.raises(ValueError, match=r"\(4\) must be at most model.num_layers \(3\).* 1 or 2"):
        check_layout(MODEL, trainer, layout)
    layout = Layout(world_size=2, pipeline_model_parallel_size=2)
    check_layout(MODEL, trainer, layout)
    with pytest.raises(ValueError, match=r"set_size \(256\) to be at most model.hidden_size \(128"):
        check_layout(replace(MODEL, set_size=256), trainer, layout)


def test_layout_in_words_and_in_records():
    layout = Layout(
        world_size=8,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        data_parallel_size=2,
    )
    assert layout.describe() == "8 ranks = 2 data parallel x 2 tensor parallel x 2 pipeline stages"
    assert layout.record()["pipeline_model_parallel_size"] == 2
    # one turn of waiting beside the 4 micro-batches of a rank
    trainer = TrainerConfig(max_steps=1, sets_per_batch=8, sets_per_micro_batch=1)
    assert parallel.idle_share(trainer, layout) == 1 / 5
    assert parallel.idle_share(trainer, Layout()) == 0


@pytest.mark.parametrize(
    ("preset", "num_stages", "first"),
    [("base", 1, 12), ("base", 2, 3), ("xl", 2, 7), ("base", 3, 2), ("xl", 4, 3)],
)
def test_first_stage_has_fewer_layers_for_its_encoder(preset, num_stages, first):
    # The encoder's work is that of 5 of base's layers, and 10 of xl's.
    model = compose("pretrain", [f"model={preset}", "data.store=x"], run_dir=Path("x")).model
    found = first_stage_layers(model, 2000, num_stages)
    assert found == first
    assert num_stages == 1 or (model.num_layers - found) % (num_stages - 1) == 0
