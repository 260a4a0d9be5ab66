"""Prediction over pipeline stages: a relay of pieces of a batch, without gradient.

Training goes through Megatron's schedule. A sampler needs what the last stage made of a batch on
the first stage, for its next step, so its passes are apart: the sets of one batch follow each other
through the stages, and what comes out is sent to all.

Shapes: B = sets in the batch, S = cells per set, R = rows of a message, G = genes, D = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from scale.model.backend import (
    P2PCommunicator,
    last_stage,
    pipeline_group,
    pipeline_rank,
    pipeline_size,
    tensor_parallel_size,
)
from scale.model.layers import NUM_MESSAGE_ROWS, CellsInBlocks, SetBlocks

PIECES_PER_STAGE = 4
"""With P stages, P - 1 of 5 P - 1 turns pass with a stage idle: at most a fifth."""


def message_rows(set_size: int) -> int:
    """Return the rows of a message between stages, over all ranks that share the cells."""
    return set_size + NUM_MESSAGE_ROWS * tensor_parallel_size()


@torch.no_grad()
def relay(
    enter: Callable[[slice], CellsInBlocks] | None,
    blocks: SetBlocks,
    leave: Callable[[CellsInBlocks], Tensor],
    *,
    shape_BSG: torch.Size,
    is_full: bool,
) -> Tensor:
    """Return what the last stage makes of a batch, on every stage; a collective of the stages.

    Parameters
    ----------
    enter
        Cells of some of the sets before the first block; None on a later stage.
    blocks
        The layers of this stage.
    leave
        From the cells after the last block to the result; called on the last stage.
    shape_BSG
        Of the result.
    is_full
        Whether all cells of all sets are real.
    """
    num_sets, set_size, _ = shape_BSG
    num_stages, config = pipeline_size(), blocks.config
    if enter is not None and num_stages == 1:
        return leave(blocks(enter(slice(None))))
    is_last = pipeline_rank() == num_stages - 1
    line = P2PCommunicator(pipeline_group(), config)
    results = []
    for sets in _pieces(num_sets, PIECES_PER_STAGE * num_stages):
        if enter is not None:
            cells = enter(sets)
        else:
            rows = message_rows(set_size) // tensor_parallel_size()
            shape = (rows, sets.stop - sets.start, config.hidden_size)
            message_RBD = line.recv_forward(shape, is_first_stage=False)
            cells = CellsInBlocks.of_message(message_RBD, is_full=is_full)
        cells = blocks(cells)
        if is_last:
            results.append(leave(cells))
        else:
            line.send_forward(cells.message(config.pipeline_dtype), is_last_stage=False)
    if is_last:
        result_BSG = torch.cat(results).contiguous()
    else:
        result_BSG = torch.empty(shape_BSG, dtype=config.pipeline_dtype, device=cells.x_SBD.device)
    dist.broadcast(result_BSG, src=last_stage(), group=pipeline_group())
    return result_BSG


def _pieces(num_sets: int, num_pieces: int) -> Iterator[slice]:
    """Yield at most so many runs of sets, whose lengths differ by no more than one."""
    num_pieces = min(num_sets, num_pieces)
    for i in range(num_pieces):
        yield slice(i * num_sets // num_pieces, (i + 1) * num_sets // num_pieces)
