"""The conditions of a source: what they are, in which order they are stored, whose cells they have.

Shapes: N = cells of a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scale.types import Condition, SourceError


@dataclass(frozen=True, slots=True)
class CellCodes:
    """Which condition and batch the cells of a file belong to.

    Parameters
    ----------
    condition_N
        Index into :attr:`ConditionTable.conditions`; -1 = left out by ``where``.
    batch_N
        Index into :attr:`ConditionTable.batches`; -1 = there is no batch column.
    """

    condition_N: npt.NDArray[np.int32]
    batch_N: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ConditionTable:
    """All conditions in the order in which they are stored: controls first, then by cell type.

    Parameters
    ----------
    conditions, labels, num_cells
        One entry per condition: what it is, the source's label, cells after ``where``.
    batches
        Names of the batches, sorted.
    control
        Label of the control as the source writes it.
    batch_in_key
        Whether treated conditions are kept apart by batch.
    num_left_out
        Cells that ``where`` left out.
    """

    conditions: tuple[Condition, ...]
    labels: tuple[str, ...]
    num_cells: npt.NDArray[np.int64]
    batches: tuple[str, ...]
    control: str
    batch_in_key: bool
    num_left_out: int


def report_without_control(cell_types: Iterable[str]) -> None:
    """Raise the error for cell types without control cells, if there are any."""
    names = sorted(cell_types)
    if names:
        raise SourceError(
            f"no control cells in {len(names)} cell types: {', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}; every cell type needs some. Leave these out "
            "with where, or check columns.cell_type and control"
        )
