"""Each item that Megatron-core is spared without CUDA is needed, and harmless when repeated."""

import pytest
import torch
from ranks import RankContext, run_ranks, save_weights

from scale.config import Precision
from scale.train import megatron_cpu

BY_PRECISION = {"type_strings": Precision.bf16}
"""What needs an item, where fp32 does not."""


def probe(context: RankContext, item: str | None, folder: str) -> str:
    """One step and a sharded save with an item left out; returns what went wrong."""
    from pathlib import Path

    from test_engine import make_engine, share

    megatron_cpu.install(skip=frozenset() if item is None else frozenset({item}))
    try:
        with context.layout() as layout:
            engine = make_engine(layout, precision=BY_PRECISION.get(item, Precision.fp32))
            engine.step(share(layout, 0), step=1, lr=1e-2)
            save_weights(Path(folder), engine)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def message_probe(context: RankContext, item: str | None) -> str:
    """A message between two pipeline stages, with an item left out."""
    from scale.model.backend import P2PCommunicator, block_config, pipeline_group

    megatron_cpu.install(skip=frozenset() if item is None else frozenset({item}))
    try:
        with context.layout(pipeline_model_parallel_size=2):
            sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 8}
            config = block_config(**sizes, precision=Precision.fp32, first_stage_layers=1)
            line, message = P2PCommunicator(pipeline_group(), config), torch.ones(3, 1, 8)
            if context.rank == 0:
                line.send_forward(message, is_last_stage=False)
            else:
                assert torch.equal(line.recv_forward((3, 1, 8), is_first_stage=False), message)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


BETWEEN_STAGES = {"synchronize"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
@pytest.mark.parametrize("item", megatron_cpu.ITEMS)
def test_item_is_still_needed(tmp_path, item):
    from importlib.metadata import version

    folder = tmp_path / "weights"
    folder.mkdir()
    if item in BETWEEN_STAGES:
        failure = run_ranks(message_probe, 2, tmp_path, item)[0]
    else:
        failure = run_ranks(probe, 1, tmp_path, item, str(folder))[0]
    assert failure, f"{item} is no longer needed by megatron-core {version('megatron-core')}"


def test_nothing_is_missing(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    assert run_ranks(probe, 1, tmp_path, None, str(folder)) == [""]
    assert run_ranks(message_probe, 2, tmp_path, None) == ["", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
def test_install_twice_is_install_once():
    original = torch.cuda.current_device
    with megatron_cpu.installed():
        megatron_cpu.install()
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).to("cuda").cuda().device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.current_device is original
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises(ValueError, match="no item streams; known: current_device"):
        megatron_cpu.install(skip=frozenset({"streams"}))


def group_probe(context: RankContext) -> tuple[int, bool]:
    """How many groups of gloo this rank made, and whether data and tensor groups are as asked."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    with context.layout(tensor_size=2):
        groups = {id(group) for group in dist.distributed_c10d._world.pg_map}
        tensor = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
        data = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        return len(groups), tensor == [0, 1] and data == [context.rank]


@pytest.mark.skipif(torch.cuda.is_available(), reason="groups are shared where there is no CUDA")
def test_groups_of_the_same_ranks_are_one(tmp_path):
    # two ranks have three sets of ranks: both, and each alone; a rank is in two of them
    assert run_ranks(group_probe, 2, tmp_path) == [(2, True), (2, True)]
