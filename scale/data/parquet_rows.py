"""Ranges of rows of parquet files that follow each other, with one row group in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.csr import row_pointer


class ParquetRows:
    """Some columns of several files as one long table.

    Parameters
    ----------
    parts
        The files, in the order of their rows.
    columns
        What is read of each; all files have them.
    """

    def __init__(self, parts: Sequence[Path], columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for part in parts:
            facts = pq.read_metadata(part)
            self._groups += [(part, i) for i in range(facts.num_row_groups)]
            sizes += [facts.row_group(i).num_rows for i in range(facts.num_row_groups)]
        self._start_P = row_pointer(np.array(sizes, np.int64))
        self._held: tuple[int, pa.Table | None] = (-1, None)

    def __len__(self) -> int:
        return int(self._start_P[-1])

    def read(self, start: int, stop: int) -> pa.Table:
        """Return rows ``start`` to before ``stop``."""
        first = int(np.searchsorted(self._start_P, start, side="right")) - 1
        last = int(np.searchsorted(self._start_P, stop, side="left"))
        pieces = []
        for group in range(first, last):
            before = int(self._start_P[group])
            pieces.append(
                self._load(group).slice(max(0, start - before), stop - max(before, start))
            )
        return pa.concat_tables(pieces)

    def _load(self, group: int) -> pa.Table:
        number, table = self._held
        if number != group or table is None:
            part, index = self._groups[group]
            with pq.ParquetFile(part) as file:
                table = file.read_row_group(index, columns=self._columns)
            self._held = group, table
        return table
