"""What ``prepare`` did, in numbers, and as the table that closes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.ingest.conditions import ConditionTable

SMALL_POOL = 256
"""Control pools with fewer cells are pointed out: a set of the larger presets needs as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What ``prepare`` did.

    Parameters
    ----------
    path
        The store.
    counts
        ``read``, or ``recovered`` from log1p values.
    num_cells_in, num_cells
        Cells of the source and of the store.
    dropped
        Cells left out, by reason.
    dropped_conditions
        Treated conditions below ``minimum_cells`` with their number of cells.
    num_genes_in, num_genes
        Genes of the source and of the store.
    num_conditions, num_controls
        Treated conditions and control pools.
    small_pools
        Control pools below ``SMALL_POOL`` cells, with their number of cells.
    num_repeated
        Cells whose barcode another cell of the same condition has.
    bytes_per_cell
        Of the whole store.
    spilled_bytes
        Size of the cells on their way, which lay on disk beside the store.
    """

    path: Path
    counts: str
    num_cells_in: int
    num_cells: int
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_conditions: dict[str, int] = field(default_factory=dict)
    num_genes_in: int
    num_genes: int
    num_conditions: int
    num_controls: int
    small_pools: dict[str, int] = field(default_factory=dict)
    num_repeated: int = 0
    bytes_per_cell: float
    spilled_bytes: int

    def table(self) -> str:
        """Return the closing table, one fact a line."""
        rows = [
            ("cells in", f"{self.num_cells_in:,}"),
            *((f"  {reason}", f"-{count:,}") for reason, count in sorted(self.dropped.items())),
            ("cells stored", f"{self.num_cells:,}"),
            ("counts", self.counts),
            ("genes", f"{self.num_genes:,} of {self.num_genes_in:,}"),
            ("treated conditions", f"{self.num_conditions:,}"),
            ("control pools", f"{self.num_controls:,}"),
            (f"  below {SMALL_POOL} cells", _listed(self.small_pools)),
            ("conditions dropped", _listed(self.dropped_conditions)),
            ("repeated barcodes", f"{self.num_repeated:,}"),
            ("bytes per cell", f"{self.bytes_per_cell:,.0f}"),
            ("store", str(self.path)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"path": str(self.path)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PrepareReport:
        """Undo :meth:`to_json`."""
        return cls(**{**values, "path": Path(values["path"])})


@dataclass(frozen=True, slots=True)
class ConditionFacts:
    """Conditions as the report tells them: see :class:`PrepareReport`."""

    dropped_conditions: dict[str, int]
    num_conditions: int
    num_controls: int
    small_pools: dict[str, int]

    @classmethod
    def of(
        cls,
        conditions: ConditionTable,
        num_cells_C: npt.NDArray[np.int64],
        is_kept_C: npt.NDArray[np.bool_],
    ) -> ConditionFacts:
        """Count conditions by what became of them."""
        treated, pools = 0, 0
        small: dict[str, int] = {}
        lost: dict[str, int] = {}
        for condition, keep, size in zip(
            conditions.conditions, is_kept_C.tolist(), num_cells_C.tolist(), strict=True
        ):
            batch = "" if condition.batch is None else f", {condition.batch}"
            name = f"({condition.cell_type}, {condition.perturbation.label}{batch})"
            pools += condition.is_control and keep
            treated += keep and not condition.is_control
            if not keep:
                lost[name] = size
            elif condition.is_control and size < SMALL_POOL:
                small[name] = size
        return cls(lost, treated, pools, small)


def _listed(sizes: dict[str, int], shown: int = 5) -> str:
    """Return how many there are and the first of them."""
    if not sizes:
        return "0"
    names = "; ".join(f"{name} {size}" for name, size in list(sizes.items())[:shown])
    return f"{len(sizes):,}: {names}{'; ...' if len(sizes) > shown else ''}"
