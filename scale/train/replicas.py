"""Whether ranks that hold the same weights still do.

Copies of a weight follow the same updates on every rank. A fault of a device's memory, or of a sum
of gradients, lets them drift apart without a sign in the loss of any rank.

Shapes: W = weights of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale.train.parallel import gather_over_ranks, replica_groups

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(FloatingPointError):
    """Copies of a weight differ between ranks."""


@torch.no_grad()
def check_replicas(model: nn.Module, *, step: int) -> None:
    """Compare a checksum of every weight over the ranks that hold it; a collective of all ranks.

    Data parallel ranks have equal weights; tensor parallel ranks, those that are not cut.

    Raises
    ------
    ReplicaError
        On every rank, naming the weights.
    """
    chunk: Any = model
    named = dict(chunk.whole_named_parameters())
    sum_W = torch.stack([_checksum(parameter) for parameter in named.values()])
    is_cut_W = torch.tensor(
        [getattr(p, "tensor_model_parallel", False) for p in named.values()], device=sum_W.device
    )
    data_parallel, tensor_parallel = replica_groups()
    differs_W = _differs(sum_W, data_parallel)
    differs_W |= _differs(sum_W.masked_fill(is_cut_W, 0), tensor_parallel)
    found = [name for name, differs in zip(named, differs_W.tolist(), strict=True) if differs]
    differing = sorted({name for names in gather_over_ranks(found) for name in names})
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ReplicaError(
            f"copies of {', '.join(differing[:3])}{more} differ between ranks at step {step:,}; "
            "the run stops, and goes on from its last checkpoint when it is started again"
        )


def _checksum(parameter: Tensor) -> Tensor:
    bits: Tensor = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
    return bits.sum(dtype=torch.int64)


def _differs(sum_W: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return which sums are not the same on all ranks of a group."""
    both_2W = torch.stack([sum_W, -sum_W])
    dist.all_reduce(both_2W, dist.ReduceOp.MAX, group=group)
    return both_2W.sum(0) != 0
