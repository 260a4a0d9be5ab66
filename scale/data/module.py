"""The data of a run: store, split, vocabulary and plan behind one object.

``CellSetDataModule`` gives endless training batches that start at any set and do not depend on how
many ranks share them, and every cell of a held-out part in order.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from scale.config import DataConfig
from scale.data.control_pool import ControlPool
from scale.data.draws import Integers
from scale.data.features import read_features
from scale.data.loader import Normalisation, SetReader
from scale.data.rank_share import RankShare, run_of_batches
from scale.data.sampler import PLAN_VERSION, SetPlan
from scale.data.split import Split
from scale.data.store import CellSetStore
from scale.data.training_statistics import TrainingStatistics, principal_components, sample_cells
from scale.data.vocabulary import (
    check_names,
    extend_vocabulary,
    make_projection,
    make_table,
    make_vocabulary,
)
from scale.types import Batch, PlanError, Vocabulary

__all__ = [
    "CellSetDataModule",
    "TrainingStatistics",
    "extend_vocabulary",
    "training_conditions",
]

logger = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
_CPU = torch.device("cpu")


def _read_split(config: DataConfig) -> Split:
    return Split.everything() if config.split is None else Split.read(Path(config.split))


def _assign_parts(store: CellSetStore, split: Split, config: DataConfig) -> npt.NDArray[np.str_]:
    """Return the part of each condition: train, val, test or unused."""
    return split.assign(
        store.conditions,
        store.perturbations,
        labels=store.labels,
        unknown=config.unknown,
        heldout_controls=config.heldout_controls,
    )


def training_conditions(store: CellSetStore, config: DataConfig) -> list[int]:
    """Return the conditions whose cells are targets in training, in order of id."""
    is_train = _assign_parts(store, _read_split(config), config) == "train"
    if config.control_fraction == 0:
        is_train &= ~store.conditions["is_control"].to_numpy(bool)
    return [int(c) for c in np.flatnonzero(is_train)]


class CellSetDataModule:
    """Batches of cell sets for training, validation and test.

    Parameters
    ----------
    config
        Store, split and how sets are made.
    set_size, num_summary_cells
        Cells per set and of the summary draw.
    seed
        Of the plan and of the sample behind :meth:`statistics`.
    vocabulary
        That of a checkpoint, to which the store is aligned by name; None = made from the store.
    data_parallel_rank, data_parallel_size
        Which share of each training batch this process reads.
    device
        Where batches are wanted.
    plan_seed
        Of the plan alone; None = ``seed``.

    Raises
    ------
    StoreError, SplitError, PlanError
        See those; all of them before the first batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        set_size: int,
        num_summary_cells: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        device: torch.device = _CPU,
        plan_seed: int | None = None,
    ) -> None:
        self.config = config
        self.store = CellSetStore.open(
            config.store, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes
        )
        self._set_size, self._num_summary_cells = set_size, num_summary_cells
        self._seed, self._plan_seed = seed, seed if plan_seed is None else plan_seed
        self._rank, self._num_ranks = data_parallel_rank, data_parallel_size
        self._device = device
        self.split = _read_split(config)
        self._parts = _assign_parts(self.store, self.split, config)
        self._is_control = self.store.conditions["is_control"].to_numpy(bool)
        self._has_own_vocabulary = vocabulary is None
        if vocabulary is None:
            vocabulary = make_vocabulary(
                self.store,
                self._train_targets(),
                target_sum=config.target_sum,
                value_scale=config.value_scale,
                features=read_features(config.perturbation_features),
            )
        for name in ("target_sum", "value_scale"):
            ours, theirs = getattr(config, name), getattr(vocabulary, name)
            if ours != theirs:
                raise PlanError(
                    f"data.{name} is {ours:g}, the model was trained with {theirs:g}; set "
                    f"data.{name}={theirs:g}"
                )
        self.vocabulary = vocabulary
        projection = make_projection(self.store, vocabulary.genes)
        self._table = make_table(self.store, vocabulary)
        self._host_normalisation = Normalisation(config.target_sum, config.value_scale, projection)
        self._normalisation = Normalisation(
            config.target_sum,
            config.value_scale,
            None if projection is None else projection.to(device),
        )
        self._part_readers: dict[tuple[str, int | None], tuple[SetPlan, SetReader]] = {}
        if self._has_own_vocabulary:
            _ = self.train_plan

    # --- parts ------------------------------------------------------------------------------------

    def part_conditions(self, part: Part) -> list[int]:
        """Return the treated conditions of a part, in order of id."""
        return np.flatnonzero((self._parts == part) & ~self._is_control).tolist()

    def has_part(self, part: Part) -> bool:
        """Return whether a part has any treated condition."""
        return bool(self.part_conditions(part))

    def _controls(self, part: Part) -> list[int]:
        """Return the control conditions that sets of a part may draw from."""
        usable = (
            self._is_control & (self._parts == "train") if part == "train" else self._is_control
        )
        return np.flatnonzero(usable).tolist()

    def _train_targets(self) -> list[int]:
        treated = self.part_conditions("train")
        if not treated:
            counts = ", ".join(
                f"{len(self.part_conditions(part))} {part}" for part in ("val", "test")
            )
            raise PlanError(
                f"no training conditions: of {int((~self._is_control).sum())} treated conditions "
                f"in {self.store.address}, {self.split.name} makes {counts}, and leaves the "
                "rest unused; list some as train, or set data.split=null"
            )
        return treated + (self._controls("train") if self.config.control_fraction > 0 else [])

    # --- training ---------------------------------------------------------------------------------

    @cached_property
    def train_plan(self) -> SetPlan:
        """The plan of training sets."""
        targets = self._train_targets()
        if not self._has_own_vocabulary:
            check_names(self.store, self.vocabulary, targets)
        return SetPlan(
            self.store.conditions,
            self.part_conditions("train"),
            self._controls("train"),
            self.config,
            set_size=self._set_size,
            num_summary_cells=self._num_summary_cells,
            seed=self._plan_seed,
            identity={
                "store_fingerprint": self.store.fingerprint,
                "split_sha256": sha256("\n".join(self._parts.tolist()).encode()).hexdigest(),
            },
        )

    @cached_property
    def train_reader(self) -> SetReader:
        """Training batches by set number; see :class:`scale.data.loader.SetReader`."""
        self.control_pool.load()
        return self._reader(self.train_plan)

    @cached_property
    def control_pool(self) -> ControlPool:
        """The control cells that training draws from."""
        return ControlPool(self.store, self.train_plan.pools.member, self.config.control_pool_bytes)

    def _reader(self, plan: SetPlan) -> SetReader:
        return SetReader(self.store, plan, self._table, self._normalisation, device=self._device)

    def train_batches(
        self, *, consumed_sets: int, sets_per_batch: int, sets_per_micro_batch: int | None = None
    ) -> Iterator[list[Batch]]:
        """Return an endless iterator over optimizer steps: this rank's micro-batches of each.

        Step t reads sets [consumed_sets + t N, consumed_sets + (t + 1) N) whatever the number of
        ranks and the size of micro-batches are (Megatron's "single" order).

        Parameters
        ----------
        consumed_sets
            Sets that were trained on before, over all ranks.
        sets_per_batch
            Sets per step over all ranks, N.
        sets_per_micro_batch
            Sets per forward pass of a rank; None = all of its share.

        Raises
        ------
        PlanError
            If the sizes do not divide.
        """
        share = RankShare.of(
            sets_per_batch, sets_per_micro_batch, rank=self._rank, num_ranks=self._num_ranks
        )
        return self._steps(self.train_reader, share, consumed_sets)

    def _steps(
        self, reader: SetReader, share: RankShare, consumed_sets: int
    ) -> Iterator[list[Batch]]:
        with closing(self._ahead(reader, share.micro_batches(consumed_sets))) as batches:
            while True:
                yield [next(batches) for _ in range(share.num_micro_batches)]

    def _ahead(self, reader: SetReader, jobs: Iterator[Integers]) -> Generator[Batch, None, None]:
        return reader.batches(
            jobs, num_threads=self.config.reader_threads, depth=self.config.prefetch_batches
        )

    # --- validation and test ----------------------------------------------------------------------

    def part_batches(
        self, part: Part, *, max_sets_per_condition: int | None, sets_per_batch: int
    ) -> Iterator[Batch]:
        """Yield this rank's share of a part's sets, in order of the conditions.

        The share is a run of batches, so that at most its first and last condition are divided.

        Parameters
        ----------
        part
            ``val``, ``test`` or ``train``.
        max_sets_per_condition
            None = every cell of each condition, once.
        sets_per_batch
            Sets per batch; the last batch may have fewer.
        """
        if not self.has_part(part):
            raise PlanError(f"{self.split.name} has no {part} conditions in {self.store.address}")
        key = (part, max_sets_per_condition)
        if key not in self._part_readers:
            plan = SetPlan(
                self.store.conditions,
                self.part_conditions(part),
                self._controls(part),
                self.config,
                set_size=self._set_size,
                num_summary_cells=self._num_summary_cells,
                seed=self._plan_seed,
                shuffle=False,
                max_sets_per_condition=max_sets_per_condition,
            )
            self._part_readers[key] = plan, self._reader(plan)
        plan, reader = self._part_readers[key]
        jobs = run_of_batches(
            plan.num_sets_per_epoch, sets_per_batch, rank=self._rank, num_ranks=self._num_ranks
        )
        with closing(self._ahead(reader, jobs)) as batches:
            yield from batches

    # --- what a run records -----------------------------------------------------------------------

    def statistics(self, num_components: int = 30, max_cells: int = 4096) -> TrainingStatistics:
        """Return mean and principal components of a keyed sample of training cells."""
        values = sample_cells(
            self.store,
            sorted(self.part_conditions("train") + self._controls("train")),
            self._host_normalisation,
            max_cells=max_cells,
            seed=self._seed,
        )
        return principal_components(values, num_components)

    def state_dict(self, consumed_sets: int) -> dict[str, Any]:
        """Return the position in the plan, as a checkpoint keeps it."""
        plan = self.train_plan
        return {
            "plan_version": PLAN_VERSION,
            "seed": self._plan_seed,
            "consumed_sets": consumed_sets,
            "plan_hash": plan.plan_hash,
            "store_fingerprint": self.store.fingerprint,
            "plan": dict(plan.fields),
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """Return the sets that were consumed, if ``state`` is a position in this plan.

        Raises
        ------
        PlanError
            If it belongs to another plan, naming what differs. With ``data.allow_plan_change`` the
            run goes on at the next epoch boundary instead.
        """
        consumed = int(state["consumed_sets"])
        plan = self.train_plan
        if state["plan_hash"] == plan.plan_hash:
            return consumed
        theirs = state["plan"]
        differing = ", ".join(
            f"{name} was {theirs.get(name)!r} and is {plan.fields.get(name)!r}"
            for name in sorted({*theirs, *plan.fields})
            if theirs.get(name) != plan.fields.get(name)
        )
        if not self.config.allow_plan_change:
            raise PlanError(
                f"the checkpoint's position belongs to another plan of sets: {differing}; resume "
                "with the same settings, or set data.allow_plan_change=true to go on at the next "
                "epoch boundary"
            )
        length = plan.num_sets_per_epoch
        start = -(-consumed // length) * length
        logger.warning("plan changed (%s); going on at set %d, the next epoch", differing, start)
        return start

    def describe(self) -> list[str]:
        """Return what is printed before the first step: parts, sets, controls."""
        cells = self.store.conditions["num_cells"].to_numpy(np.int64)
        lines = [
            f"store {self.store.address}: {cells.sum():,} cells, {self.store.num_genes:,} genes"
        ]
        for part in ("train", "val", "test", "unused"):
            is_here = (self._parts == part) & ~self._is_control
            if is_here.any() or part == "val":
                note = "" if is_here.any() else " (no validation)"
                lines.append(
                    f"{part}: {is_here.sum():,} conditions, {cells[is_here].sum():,} cells{note}"
                )
        usable = self._controls("train")
        lines.append(
            f"controls: {cells[usable].sum():,} of {cells[self._is_control].sum():,} cells in "
            f"training, those of held-out contexts {self.config.heldout_controls.value}"
        )
        lines.append(self.control_pool.describe())
        plan = self.train_plan
        lines.append(
            f"plan: {plan.num_sets_per_epoch:,} sets per epoch of up to {self._set_size} cells"
        )
        if num_mixed := int(plan.is_by_cell.sum()):
            lines.append(
                f"{num_mixed} conditions have cells of several batches; each control is drawn from "
                "the batch of a treated cell"
            )
        if fell_back := plan.pools.fell_back:
            lines.append(
                f"{len(fell_back)} control pools have fewer than "
                f"{self.config.minimum_control_cells} cells; all batches of the cell type are used "
                f"instead: {', '.join(fell_back[:5])}{', ...' if len(fell_back) > 5 else ''}"
            )
        return lines

    def close(self) -> None:
        """End the reader threads and close the store."""
        for _, reader in self._part_readers.values():
            reader.close()
        if "train_reader" in self.__dict__:
            self.train_reader.close()
        if "control_pool" in self.__dict__:
            self.control_pool.close()
        self.store.close()
