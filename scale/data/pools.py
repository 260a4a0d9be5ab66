"""Which control cells a condition may draw from.

A pool is the control cells of one cell type and batch. Where a batch has too few of them, all
batches of the cell type stand in, and the run says so before its first step. Where the cells of a
condition come from several batches, each control is drawn from the batch of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import DataConfig, MatchBatch
from scale.data.codec import compiled
from scale.data.draws import Integers, draw_distinct
from scale.draws import mix64
from scale.types import PlanError


@dataclass(frozen=True, slots=True)
class Pools:
    """Control cells by pool: the control conditions of one pool stand side by side.

    Parameters
    ----------
    begin
        First member of each pool, and the number of members at the end.
    member, first_cell, size
        Control condition, number of cells of the pool before it, cells in it.
    batch
        Batch of each member, or None.
    fell_back
        Pools of a whole cell type that stand in for a batch with too few controls.
    """

    begin: Integers
    member: Integers
    first_cell: Integers
    size: Integers
    batch: tuple[str | None, ...]
    fell_back: tuple[str, ...]


def assign_pools(
    conditions: pd.DataFrame,
    entry: Integers,
    num_targets: int,
    control: Integers,
    config: DataConfig,
) -> tuple[Integers, Pools]:
    """Return the pool of every entry, and the pools."""
    cell_type = conditions["cell_type"].astype(str).to_numpy()
    batch = [None if pd.isna(value) else str(value) for value in conditions["batch"]]
    num_cells = conditions["num_cells"].to_numpy(np.int64)
    members: dict[tuple[str, str | None], list[int]] = {}
    by_cell_type: dict[str, list[int]] = {}
    for c in control.tolist():
        members.setdefault((cell_type[c], batch[c]), []).append(c)
        by_cell_type.setdefault(cell_type[c], []).append(c)

    lists: list[list[int]] = []
    numbers: dict[tuple[int, ...], int] = {}
    fell_back: dict[str, None] = {}

    def choose(cell_type: str, batch: str | None) -> tuple[int, int]:
        """Return number and cells of the pool of a cell type and batch."""
        pool = by_cell_type.get(cell_type, [])
        if config.match_batch is not MatchBatch.ignore and batch is not None:
            own = members.get((cell_type, batch), [])
            if num_cells[own].sum() >= config.minimum_control_cells:
                pool = own
            else:
                fell_back[f"({cell_type}, {batch}): {num_cells[own].sum()}"] = None
        number = numbers.setdefault(tuple(pool), len(lists))
        if number == len(lists):
            lists.append(pool)
        return number, int(num_cells[pool].sum())

    chosen: dict[tuple[str, str | None], tuple[int, int]] = {}
    pool_of_entry = np.empty(len(entry), np.int64)
    uncovered: dict[str, None] = {}
    for i, c in enumerate(entry.tolist()):
        key = (cell_type[c], batch[c])
        if key not in chosen:
            chosen[key] = choose(*key)
        pool_of_entry[i], size = chosen[key]
        if size < (2 if i < num_targets else 3):
            uncovered[f"{key[0]} ({size})"] = None
    _refuse(uncovered, fell_back, config)
    member = np.array([c for pool in lists for c in pool], np.int64)
    first_cell = [np.cumsum(num_cells[pool]) - num_cells[pool] for pool in lists]
    return pool_of_entry, Pools(
        begin=np.cumsum([0, *map(len, lists)]).astype(np.int64),
        member=member,
        first_cell=np.concatenate(first_cell).astype(np.int64),
        size=num_cells[member],
        batch=tuple(batch[c] for c in member.tolist()),
        fell_back=tuple(fell_back),
    )


def _refuse(uncovered: dict[str, None], fell_back: dict[str, None], config: DataConfig) -> None:
    if uncovered:
        raise PlanError(
            f"cell types with too few control cells (found in brackets, at least 3 needed): "
            f"{', '.join(uncovered)}; prepare the store with their controls, leave them out by "
            "the split, or set data.heldout_controls=shared if the split holds them out"
        )
    if fell_back and config.match_batch is MatchBatch.require:
        raise PlanError(
            f"data.match_batch is require, but these (cell type, batch) have fewer than "
            f"data.minimum_control_cells ({config.minimum_control_cells}) control cells: "
            f"{', '.join(fell_back)}; use data.match_batch=prefer or lower the minimum"
        )


@compiled
def divide_pool(available: int, want_3: Integers) -> Integers:
    """Divide a pool over three disjoint draws: all they want, else as evenly as they want."""
    share_3 = np.zeros(3, np.int64)
    left = available
    is_open_3 = want_3 > 0
    while is_open_3.any():
        draw = -1
        for candidate in range(3):  # the smallest wish first, the first of equal ones
            if is_open_3[candidate] and (draw < 0 or want_3[candidate] < want_3[draw]):
                draw = candidate
        share_3[draw] = min(want_3[draw], left // is_open_3.sum())
        left -= share_3[draw]
        is_open_3[draw] = False
    return share_3


def draw_by_batch(
    pools: Pools,
    pool: int,
    cells: tuple[npt.NDArray[np.uint16], Sequence[str]],
    sizes: tuple[int, int],
    keys: tuple[int, int],
    config: DataConfig,
) -> list[tuple[Integers, Integers]]:
    """Return control and summary cells with the composition of batches of the treated cells.

    Control j is drawn from the batch of treated cell j; where there are more controls than treated
    cells, the treated cells are gone through again. A batch with fewer than
    ``minimum_control_cells`` controls is served from all batches, by what other draws leave.

    Parameters
    ----------
    pools, pool
        The pool of the condition: all control conditions of its cell type.
    cells
        Batch code of each treated cell, and names by code.
    sizes, keys
        Cells wanted and random key, for the control and for the summary draw.
    config
        ``match_batch`` and ``minimum_control_cells``.

    Raises
    ------
    PlanError
        If ``match_batch`` is require and a batch has too few controls.
    """
    span = slice(pools.begin[pool], pools.begin[pool + 1])
    member, first, size = pools.member[span], pools.first_cell[span], pools.size[span]
    member_of = {pools.batch[m]: m - span.start for m in range(span.start, span.stop)}
    code_N, names = cells
    place_N = np.full(len(code_N), -1)
    for code in np.unique(code_N).tolist():
        name = names[code] if code < len(names) else None
        m = -1 if name is None else member_of.get(name, -1)
        if m >= 0 and size[m] >= config.minimum_control_cells:
            place_N[code_N == code] = m
        elif config.match_batch is MatchBatch.require:
            raise PlanError(
                f"data.match_batch is require, but of batch {name} there are "
                f"{size[m] if m >= 0 else 0} control cells (control conditions "
                f"{member.tolist()[:5]}); use data.match_batch=prefer or lower "
                "data.minimum_control_cells"
            )
    wanted = [place_N[np.arange(n) % len(place_N)] for n in sizes]
    cell = [np.full(n, -1, np.int64) for n in sizes]
    taken = np.empty(0, np.int64)
    for m in sorted(set(place_N.tolist()), reverse=True):  # all batches (-1) last
        start, available = (0, int(first[-1] + size[-1])) if m < 0 else (first[m], size[m])
        here = [np.flatnonzero(w == m) for w in wanted]
        used = taken[(taken >= start) & (taken < start + available)] - start
        share = divide_pool(available - len(used), np.array([0, len(here[0]), len(here[1])]))
        for draw, count in enumerate(share[1:].tolist()):
            out = np.empty(count, np.int64)
            key = np.uint64(mix64(keys[draw] ^ (m + 1)))
            draw_distinct(available, key, used, out)
            cell[draw][here[draw][:count]] = out + start
            used = np.concatenate([used, out])
            taken = np.concatenate([taken, out + start])
    located = []
    for drawn in cell:
        kept = drawn[drawn >= 0]
        m_N = np.searchsorted(first, kept, side="right") - 1
        located.append((member[m_N], kept - first[m_N]))
    return located
