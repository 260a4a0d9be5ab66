"""Copies of a weight that differ between ranks stop all ranks."""

import pytest
import torch
from layout_runs import SMALL, Run, make_engine, share
from ranks import RankContext, run_ranks

CASES = (
    (Run(data=2), "blocks.stack.layers.1.mlp.linear_fc2.weight"),
    (Run(tensor=2), "summary.cell_1.weight"),
    (Run(tensor=2), "blocks.stack.layers.1.modulation"),
)


def differ(context: RankContext) -> list[str]:
    """Change the last bit of one number on one rank, after the thousandth step."""
    from scale.train.replicas import ReplicaError, check_replicas

    found = []
    for run, name in CASES:
        with run.start(context) as layout:
            engine = make_engine(run, layout, SMALL)
            engine.step(share(run, layout, 0), step=1000, lr=1e-3)
            check_replicas(engine.model, step=1000)
            if context.rank == 1:
                weight = dict(engine.model.whole_named_parameters())[name].data.flatten()
                weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
            with pytest.raises(ReplicaError) as caught:
                engine.step(share(run, layout, 1), step=2000, lr=1e-3)
            found.append(str(caught.value))
    return found


def test_one_bit_on_one_rank_is_found_by_all(tmp_path):
    for told in run_ranks(differ, 2, tmp_path):
        for text, (_, name) in zip(told, CASES, strict=True):
            assert text.startswith(f"copies of {name} differ between ranks at step 2,000")


def stages(context: RankContext) -> None:
    run = Run(pipeline=2, data=2)
    with run.start(context) as layout:
        make_engine(run, layout, SMALL).step(share(run, layout, 0), step=1000, lr=1e-3)


def test_stages_have_weights_of_their_own(tmp_path):
    run_ranks(stages, 4, tmp_path)
