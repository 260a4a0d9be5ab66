"""Which cells are in which set, as a pure function of (seed, epoch, index).

A plan holds a few arrays with one entry per condition and nothing per cell: 100 million cells cost
2 MB. There is no state, no stored index list and no global random number, so the set with a given
number is the same on every rank, at every world size, in every thread and after every resume.
Rows are positions within a condition; which chunk holds a row is the store's business.

Shapes: B = sets asked for, S = cells per set, U = cells of the summary draw.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import DataConfig, MatchBatch, ShortSets, Weighting
from scale.data.codec import compiled
from scale.data.draws import (
    LARGEST_SORTED,
    Integers,
    cells_on_circle,
    derive_key,
    draw_distinct,
    feistel_many,
    keyed_order,
    mix,
    permute,
)
from scale.data.pools import assign_pools, divide_pool, draw_by_batch
from scale.draws import derive
from scale.types import PlanError

__all__ = ["PLAN_VERSION", "SetBlock", "SetPlan", "SetSpec", "keyed_order", "permute"]

PLAN_VERSION = 1
"""Changes whenever the same settings would give other cells."""
ORDER, CELLS, CONTROL, SUMMARY = 1, 2, 3, 4
"""Purposes of the random draws; the model's start at 11."""

Arrays = tuple[Any, ...]
_EXPONENT = {Weighting.cells: 1.0, Weighting.sqrt: 0.5, Weighting.conditions: 0.0}
_REPEAT_SALT = np.uint64(0x5E7F111)


@dataclass(frozen=True, slots=True)
class SetSpec:
    """The cells of one set. Controls may come from several control conditions.

    Parameters
    ----------
    epoch, index
        Place of the set in the plan.
    condition
        Condition whose cells are the target.
    is_control
        Whether the target is itself a control.
    treated_row
        Rows of the target within its condition, at most S.
    control_condition, control_row, summary_condition, summary_row
        Control cells to be transported and those of the summary; no cell is in both.
    """

    epoch: int
    index: int
    condition: int
    is_control: bool
    treated_row: Integers
    control_condition: Integers
    control_row: Integers
    summary_condition: Integers
    summary_row: Integers


@dataclass(frozen=True, slots=True)
class SetBlock:
    """The cells of several sets, padded; what the loader reads. Rows beyond a count are -1."""

    condition_B: Integers
    is_control_B: npt.NDArray[np.bool_]
    treated_row_BS: Integers
    control_condition_BS: Integers
    control_row_BS: Integers
    summary_condition_BU: Integers
    summary_row_BU: Integers
    treated_count_B: Integers
    control_count_B: Integers
    summary_count_B: Integers


class SetPlan:
    """The sets of an epoch and the cells of each set.

    Parameters
    ----------
    conditions
        Table of the store, one row per condition in order of id, with columns ``cell_type``,
        ``batch``, ``is_control`` and ``num_cells``.
    targets
        Ids of the treated conditions whose cells are to be predicted.
    controls
        Ids of the control conditions that may be drawn from.
    config
        ``weighting``, ``control_fraction``, ``match_batch``, ``minimum_control_cells``, ``short``.
    set_size, num_summary_cells
        S and U.
    seed
        Of every draw.
    shuffle
        False for validation and test: every target in order, every cell once, no weighting and no
        control sets.
    max_sets_per_condition
        Sets per target, for ``shuffle=False``.
    identity
        Further fields of the plan's hash: the store's fingerprint and the split's hash.

    Raises
    ------
    PlanError
        If there is nothing to plan, or a target has too few control cells.
    """

    def __init__(
        self,
        conditions: pd.DataFrame,
        targets: Sequence[int] | Integers,
        controls: Sequence[int] | Integers,
        config: DataConfig,
        *,
        set_size: int,
        num_summary_cells: int,
        seed: int,
        shuffle: bool = True,
        max_sets_per_condition: int | None = None,
        identity: dict[str, str] | None = None,
    ) -> None:
        self.set_size = set_size
        self.num_summary_cells = num_summary_cells
        self.seed = seed
        self.shuffle = shuffle
        self._config = config
        self.fields: dict[str, Any] = {
            **(identity or {}),
            "set_size": set_size,
            "num_summary_cells": num_summary_cells,
            "weighting": config.weighting.value,
            "control_fraction": config.control_fraction,
            "match_batch": config.match_batch.value,
            "minimum_control_cells": config.minimum_control_cells,
            "short": config.short.value,
            "seed": seed,
            "plan_version": PLAN_VERSION,
        }
        if not len(targets):
            raise PlanError("no condition to plan: the list of targets is empty")
        target = np.asarray(targets, np.int64)
        control = np.sort(np.asarray(controls, np.int64))
        num_cells = conditions["num_cells"].to_numpy(np.int64)
        with_control = shuffle and config.control_fraction > 0
        entry = np.concatenate([target, control]) if with_control else target
        pool_of_entry, self.pools = assign_pools(conditions, entry, len(target), control, config)
        cells = num_cells[entry]
        if shuffle:
            passes = np.maximum(1, np.rint(cells / set_size).astype(np.int64))
            slots = _slots(passes, cells, len(target), config)
        else:
            passes = -(-cells // set_size)
            slots = np.minimum(passes, max_sets_per_condition or passes.max())
        self._start = np.concatenate([[0], np.cumsum(slots)]).astype(np.int64)
        self._entry = entry
        self._is_control = np.arange(len(entry)) >= len(target)
        self._cells, self._passes, self._pool = cells, passes, pool_of_entry
        # conditions whose own batch is open, while their controls have one: matched cell by cell
        has_batch = conditions["batch"].notna().to_numpy()
        self.is_by_cell = np.zeros(len(conditions), np.bool_)
        if config.match_batch is not MatchBatch.ignore and has_batch[control].any():
            self.is_by_cell[target] = ~has_batch[target]
        self.has_repeats = config.short is ShortSets.repeat
        self._keyed = lru_cache(maxsize=2)(_small_epoch_order)

    @property
    def num_sets_per_epoch(self) -> int:
        """Sets of an epoch: the same in every epoch."""
        return int(self._start[-1])

    @property
    def plan_hash(self) -> str:
        """Hash of everything that decides which cells are in which set."""
        return sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()

    def plan(self, epoch: int, index: int) -> SetSpec:
        """Return the cells of set ``index`` of ``epoch``."""
        if not 0 <= index < self.num_sets_per_epoch:
            raise IndexError(f"set {index} of {self.num_sets_per_epoch} per epoch")
        block = self.block(np.array([epoch * self.num_sets_per_epoch + index]))
        control, summary = block.control_count_B[0], block.summary_count_B[0]
        return SetSpec(
            epoch=epoch,
            index=index,
            condition=int(block.condition_B[0]),
            is_control=bool(block.is_control_B[0]),
            treated_row=block.treated_row_BS[0, : block.treated_count_B[0]],
            control_condition=block.control_condition_BS[0, :control],
            control_row=block.control_row_BS[0, :control],
            summary_condition=block.summary_condition_BU[0, :summary],
            summary_row=block.summary_row_BU[0, :summary],
        )

    def block(self, set_index_B: Integers) -> SetBlock:
        """Return the cells of sets given by their number in the whole run.

        Set ``g`` is set ``g % num_sets_per_epoch`` of epoch ``g // num_sets_per_epoch``.
        """
        epoch_B, slot_B = self._slots_of(set_index_B)
        shape_S = (len(slot_B), self.set_size)
        shape_U = (len(slot_B), self.num_summary_cells)
        rows = [np.full(shape, -1, np.int64) for shape in (shape_S, shape_S, shape_S)]
        summary = [np.full(shape_U, -1, np.int64) for _ in range(2)]
        entry_B = np.searchsorted(self._start, slot_B, side="right") - 1
        count_B3 = np.zeros((len(slot_B), 3), np.int64)
        _fill_block(
            (np.uint64(self.seed & (2**64 - 1)), self.shuffle, self.has_repeats),
            (self._entry, self._is_control, self._cells, self._passes, self._pool, self._start),
            (self.pools.begin, self.pools.member, self.pools.first_cell, self.pools.size),
            (epoch_B, slot_B, entry_B),
            (*rows, *summary, count_B3),
        )
        return SetBlock(
            self._entry[entry_B], self._is_control[entry_B], *rows, *summary, *count_B3.T
        )

    def match_batches(
        self,
        block: SetBlock,
        b: int,
        set_index: int,
        code_N: npt.NDArray[np.uint16],
        batches: Sequence[str],
    ) -> None:
        """Draw the controls of set ``b`` of a block again, each from the batch of a treated cell.

        Parameters
        ----------
        block, b, set_index
            The set, in a condition whose cells are of several batches.
        code_N
            Batch code of each treated cell of the set.
        batches
            Names by code.
        """
        (epoch,), (slot,) = self._slots_of(np.array([set_index]))
        entry = int(np.searchsorted(self._start, slot, side="right")) - 1
        key = (int(epoch), int(self._entry[entry]), int(slot - self._start[entry]))
        size = (block.control_row_BS.shape[1], block.summary_row_BU.shape[1])
        drawn = draw_by_batch(
            self.pools,
            int(self._pool[entry]),
            (code_N, batches),
            size,
            (derive(self.seed, CONTROL, *key), derive(self.seed, SUMMARY, *key)),
            self._config,
        )
        targets = (
            (block.control_condition_BS, block.control_row_BS, block.control_count_B),
            (block.summary_condition_BU, block.summary_row_BU, block.summary_count_B),
        )
        for (condition, row), (condition_out, row_out, count_out) in zip(
            drawn, targets, strict=True
        ):
            condition_out[b], row_out[b] = -1, -1
            condition_out[b, : len(row)], row_out[b, : len(row)] = condition, row
            count_out[b] = len(row)

    def _slots_of(self, set_index_B: Integers) -> tuple[Integers, Integers]:
        """Return epoch and slot of each set."""
        length = self.num_sets_per_epoch
        epoch_B, index_B = np.divmod(np.asarray(set_index_B, np.int64), length)
        if not self.shuffle:
            return epoch_B, index_B
        slot_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B).tolist():
            is_here_B = epoch_B == epoch
            key = derive(self.seed, ORDER, epoch)
            if length <= LARGEST_SORTED:
                slot_B[is_here_B] = self._keyed(length, key)[index_B[is_here_B]]
            else:
                slot_B[is_here_B] = feistel_many(index_B[is_here_B], length, np.uint64(key))
        return epoch_B, slot_B


def _small_epoch_order(length: int, key: int) -> Integers:
    return keyed_order(length, key)


def _slots(passes: Integers, cells: Integers, num_treated: int, config: DataConfig) -> Integers:
    """Return how many sets of an epoch each entry gets; treated entries come first."""
    exponent = _EXPONENT[config.weighting]
    slots = passes.copy()
    if exponent < 1.0:
        weight = cells[:num_treated].astype(np.float64) ** exponent
        share = passes[:num_treated].sum() * weight / weight.sum()
        slots[:num_treated] = np.maximum(1, np.floor(share + 0.5))
    if len(passes) > num_treated:
        fraction = config.control_fraction
        wanted = np.floor(fraction / (1 - fraction) * slots[:num_treated].sum() + 0.5)
        # rounded on the running sum: the total is exact however small each pool's share is
        running = np.cumsum(cells[num_treated:]) / cells[num_treated:].sum() * wanted
        slots[num_treated:] = np.diff(np.floor(running + 0.5), prepend=0.0)
    return slots


# --- the kernel ---------------------------------------------------------------------------------


@compiled
def _repeat_rows(condition_N: Integers, row_N: Integers, count: int, key: np.uint64) -> int:
    """Fill the rest of a draw by keyed repeats of its own cells."""
    for i in range(count, len(row_N)):
        source = np.int64(mix(key ^ _REPEAT_SALT ^ np.uint64(i)) % np.uint64(count))
        condition_N[i] = condition_N[source]
        row_N[i] = row_N[source]
    return len(row_N)


@compiled
def _locate(cell_N: Integers, pool: Arrays, condition_N: Integers, row_N: Integers) -> None:
    """Turn numbers of cells within a pool into control conditions and rows."""
    member_M, first_cell_M = pool
    for i in range(len(cell_N)):
        m = np.searchsorted(first_cell_M, cell_N[i], side="right") - 1
        condition_N[i] = member_M[m]
        row_N[i] = cell_N[i] - first_cell_M[m]


@compiled
def _fill_block(
    settings: Arrays, entries: Arrays, pools: Arrays, sets: Arrays, out: Arrays
) -> None:
    """Write the cells of every set; one call for all of them, 25 us per set of 256 + 256 + 64."""
    seed, shuffle, repeat = settings
    condition_E, is_control_E, cells_E, passes_E, pool_E, start_E = entries
    begin_P, member_M, first_cell_M, size_M = pools
    epoch_B, slot_B, entry_B = sets
    treated_BS, control_condition_BS, control_BS, summary_condition_BU, summary_BU, count_B3 = out
    set_size = treated_BS.shape[1]
    for b in range(len(slot_B)):
        entry, epoch = entry_B[b], epoch_B[b]
        condition, num_cells = condition_E[entry], cells_E[entry]
        draw = slot_B[b] - start_E[entry]
        round_number, q = divmod(draw, passes_E[entry])
        begin, end = begin_P[pool_E[entry]], begin_P[pool_E[entry] + 1]
        pool = (member_M[begin:end], first_cell_M[begin:end])
        pool_size = first_cell_M[end - 1] + size_M[end - 1]

        want_3 = np.array([0, set_size, summary_BU.shape[1]])
        if is_control_E[entry]:
            want_3[0] = min(set_size, num_cells)
        share_3 = divide_pool(pool_size, want_3)
        num_treated = share_3[0] if is_control_E[entry] else min(set_size, num_cells)
        cells_key = derive_key(seed, CELLS, epoch, condition, round_number)
        if shuffle:
            cells_on_circle(num_cells, q * set_size, cells_key, treated_BS[b, :num_treated])
        else:
            num_treated = min(set_size, num_cells - q * set_size)
            for i in range(num_treated):
                treated_BS[b, i] = q * set_size + i

        taken = np.empty(0, np.int64)
        if is_control_E[entry]:
            own = np.searchsorted(pool[0], condition)
            taken = treated_BS[b, :num_treated] + pool[1][own]
        control = np.empty(share_3[1], np.int64)
        control_key = derive_key(seed, CONTROL, epoch, condition, draw)
        draw_distinct(pool_size, control_key, taken, control)
        _locate(control, pool, control_condition_BS[b], control_BS[b])
        summary = np.empty(share_3[2], np.int64)
        summary_key = derive_key(seed, SUMMARY, epoch, condition, draw)
        draw_distinct(pool_size, summary_key, np.concatenate((taken, control)), summary)
        _locate(summary, pool, summary_condition_BU[b], summary_BU[b])

        count_B3[b, 0], count_B3[b, 1], count_B3[b, 2] = num_treated, len(control), len(summary)
        if repeat:
            ignored = np.empty(set_size, np.int64)
            count_B3[b, 0] = _repeat_rows(ignored, treated_BS[b], num_treated, cells_key)
            count_B3[b, 1] = _repeat_rows(
                control_condition_BS[b], control_BS[b], len(control), control_key
            )
            count_B3[b, 2] = _repeat_rows(
                summary_condition_BU[b], summary_BU[b], len(summary), summary_key
            )
