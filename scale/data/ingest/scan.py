"""The first pass of ``prepare``: from columns of ``.obs`` to conditions, before any value is read.

Every mistake that labels can show is reported here: a missing column, a control that is not there,
labels that cannot be read. The result numbers the conditions in the order in which they are stored
and says for each cell of a file which one it belongs to; nothing per cell is kept between files.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.config import ColumnsConfig, ConditionBy
from scale.data.ingest.conditions import CellCodes, ConditionTable, report_without_control
from scale.data.ingest.source import SourceFile
from scale.types import Condition, Perturbation, SourceError, did_you_mean, nearest

logger = logging.getLogger(__name__)

MAX_NAMES = 65_534
"""Cell types or batches that 16-bit codes can tell apart, less the two reserved values."""
_CELLS_PER_BATCH = 64
"""Median cells per (cell type, perturbation, batch) from which on the batch is worth a key: one
full chunk. Below it, chunks keyed by batch would be mostly ragged."""
_LEFT_OUT = -1

Key = tuple[int, int, int]
"""Numbers of cell type, perturbation and batch in the scan's registers; batch -1 = none."""


class Scan:
    """Collects the labels of all files; then :meth:`finish`, then :meth:`codes` per file.

    Parameters
    ----------
    columns
        Columns of ``.obs``.
    control
        Label of the control, exact after stripping; for lists of (drug, dose, unit) the drug.
    where
        Column -> values that are kept.
    """

    def __init__(
        self, columns: ColumnsConfig, control: str, where: Mapping[str, list[str]]
    ) -> None:
        self._columns = columns
        self._control = control.strip()
        self._where = where
        # Numbers by name, in the order in which the names were first seen.
        self._perturbations: dict[Perturbation, int] = {}
        self._cell_types: dict[str, int] = {}
        self._batches: dict[str, int] = {}
        self._counts: Counter[Key] = Counter()
        self._label_cells: dict[int, Counter[str]] = {}
        self._spellings: dict[tuple[str, object], set[str]] = {}
        self._where_seen: dict[str, Counter[str]] = {name: Counter() for name in where}
        self._num_left_out = 0
        self._final: dict[Key, int] = {}
        self._batch_order: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        if not self._control:
            raise SourceError("control is empty; give the label of the control cells")

    def add(self, file: SourceFile) -> None:
        """Count the cells of a file by cell type, perturbation and batch."""
        packed_N, kept_N = self._packed_keys(file, is_counting=True)
        self._num_left_out += int((~kept_N).sum())
        unique, counts = np.unique(packed_N[kept_N], return_counts=True)
        for packed, count in zip(unique.tolist(), counts.tolist(), strict=True):
            self._counts[_unpack(packed)] += count

    def merge(self, other: Scan) -> None:
        """Take over what a scan of the files that come next has counted, as if by :meth:`add`."""
        registers = (
            (self._cell_types, other._cell_types),
            (self._perturbations, other._perturbations),
            (self._batches, other._batches),
        )
        targets: list[dict[int, int]] = []
        for own, theirs in registers:
            numbers: dict[Any, int] = own  # names of one register are all of one type
            targets.append({i: numbers.setdefault(name, len(own)) for name, i in theirs.items()})
        self._check_number_of_names()
        cell_type_of, perturbation_of, batch_of = targets
        for (cell_type, perturbation, batch), count in other._counts.items():
            key = cell_type_of[cell_type], perturbation_of[perturbation], batch_of.get(batch, -1)
            self._counts[key] += count
        for number, cells in other._label_cells.items():
            self._label_cells.setdefault(perturbation_of[number], Counter()).update(cells)
        for name, texts in other._spellings.items():
            self._spellings.setdefault(name, set()).update(texts)
        for column, seen in other._where_seen.items():
            self._where_seen[column].update(seen)
        self._num_left_out += other._num_left_out

    def _check_number_of_names(self) -> None:
        for role, register in (("cell_type", self._cell_types), ("batch", self._batches)):
            if len(register) > MAX_NAMES:
                raise SourceError(
                    f"column {getattr(self._columns, role)!r} (columns.{role}) has more than "
                    f"{MAX_NAMES:,} different values ({len(register):,}); is it the right column?"
                )

    def finish(self, condition_by: ConditionBy) -> ConditionTable:
        """Return the conditions; after this the scan knows their numbers.

        Raises
        ------
        SourceError
            If nothing is left, the control is missing, or a cell type has no control cells.
        """
        self._check_where()
        perturbations = list(self._perturbations)
        cell_types, batches = list(self._cell_types), list(self._batches)
        is_control = [self._is_control(p) for p in perturbations]
        self._check_controls(is_control)
        batch_in_key = _batch_in_key(condition_by, self._counts, is_control)
        merged: Counter[Key] = Counter()
        target: dict[Key, Key] = {}
        control_number = self._control_number(is_control)
        for key, count in self._counts.items():
            cell_type, perturbation, batch = key
            if is_control[perturbation]:
                perturbation = control_number
            elif not batch_in_key:
                batch = -1
            target[key] = (cell_type, perturbation, batch)
            merged[target[key]] += count

        def name_of(key: Key) -> tuple[bool, str, str, str]:
            batch = "" if key[2] < 0 else batches[key[2]]
            treated = not is_control[key[1]]
            return treated, cell_types[key[0]], batch, perturbations[key[1]].label

        ordered = sorted(merged, key=name_of)
        position = {key: i for i, key in enumerate(ordered)}
        self._final = {key: position[target[key]] for key in self._counts}
        names = sorted(batches)
        number_of = {name: number for number, name in enumerate(names)}
        self._batch_order = np.array([number_of[name] for name in batches], dtype=np.int32)
        labels = {number: self._label(number) for number in {key[1] for key in ordered}}
        self._report_spellings()
        return ConditionTable(
            conditions=tuple(
                Condition(
                    cell_types[key[0]],
                    perturbations[key[1]],
                    None if key[2] < 0 else batches[key[2]],
                    is_control[key[1]],
                )
                for key in ordered
            ),
            labels=tuple(labels[key[1]] for key in ordered),
            num_cells=np.array([merged[key] for key in ordered], dtype=np.int64),
            batches=tuple(names),
            control=labels[control_number],
            batch_in_key=batch_in_key,
            num_left_out=self._num_left_out,
        )

    def codes(self, file: SourceFile) -> CellCodes:
        """Return condition and batch of every cell of a file that was added before."""
        packed_N, kept_N = self._packed_keys(file, is_counting=False)
        unique, inverse = np.unique(packed_N[kept_N], return_inverse=True)
        keys = [_unpack(packed) for packed in unique.tolist()]
        condition_N = np.full(file.num_cells, _LEFT_OUT, dtype=np.int32)
        batch_N = condition_N.copy()
        if keys:
            final = np.array([self._final[key] for key in keys], dtype=np.int32)
            condition_N[kept_N] = final[inverse]
            if self._columns.batch is not None:
                batch = np.array([key[2] for key in keys], dtype=np.int32)
                batch_N[kept_N] = self._batch_order[batch][inverse]
        return CellCodes(condition_N, batch_N)

    # --- labels of one file ---------------------------------------------------------------------

    def _packed_keys(
        self, file: SourceFile, *, is_counting: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the packed :data:`Key` per cell and which cells are kept."""
        columns = self._columns
        kept_N = self._kept(file, is_counting=is_counting)
        cell_type_N = self._numbers(file, columns.cell_type, "cell_type", kept_N)
        perturbation_N = self._perturbation_numbers(file, kept_N, is_counting=is_counting)
        batch_N = np.full(file.num_cells, _LEFT_OUT, dtype=np.int64)
        if columns.batch is not None:
            batch_N = self._numbers(file, columns.batch, "batch", kept_N)
        return perturbation_N << 34 | cell_type_N << 17 | (batch_N + 1), kept_N

    def _kept(self, file: SourceFile, *, is_counting: bool) -> npt.NDArray[np.bool_]:
        kept_N = np.ones(file.num_cells, dtype=bool)
        for name, values in self._where.items():
            column = file.column(name, "where")
            texts = [text.strip() for text in column.names]
            if is_counting:
                self._where_seen[name].update(texts)
            is_wanted = np.array([text in set(values) for text in texts] + [False])
            kept_N &= is_wanted[column.codes_N]
        return kept_N

    def _numbers(
        self, file: SourceFile, name: str, role: str, kept_N: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Return the register numbers of a column of names."""
        register = self._cell_types if role == "cell_type" else self._batches
        column = file.column(name, f"columns.{role}")
        _check_complete(file, name, f"columns.{role}", column.codes_N[kept_N])
        numbers = np.full(len(column.names) + 1, _LEFT_OUT, dtype=np.int64)
        for code in np.unique(column.codes_N[kept_N]).tolist():
            text = column.names[code]
            if not text.strip():
                raise SourceError(
                    f"{file.name}: column {name!r} (columns.{role}) holds an empty text; expected "
                    "a name. Leave such cells out with where"
                )
            self._spellings.setdefault((role, text.strip()), set()).add(text)
            numbers[code] = register.setdefault(text.strip(), len(register))
        self._check_number_of_names()
        return numbers[column.codes_N]

    def _perturbation_numbers(
        self, file: SourceFile, kept_N: npt.NDArray[np.bool_], *, is_counting: bool
    ) -> npt.NDArray[np.int64]:
        """Return the register numbers of the perturbations, doses included."""
        name, dose_name = self._columns.perturbation, self._columns.dose
        column = file.column(name, "columns.perturbation")
        _check_complete(file, name, "columns.perturbation", column.codes_N[kept_N])
        dose_N = np.full(file.num_cells, np.nan)
        if dose_name is not None:
            dose_N = file.numbers(dose_name, "columns.dose", kept_N)
        doses, dose_code_N = np.unique(dose_N, return_inverse=True)  # NaN are one value
        pair_N = column.codes_N.astype(np.int64) * len(doses) + dose_code_N.reshape(-1)
        numbers_N = np.full(file.num_cells, _LEFT_OUT, dtype=np.int64)
        pairs, inverse, counts = np.unique(pair_N[kept_N], return_inverse=True, return_counts=True)
        found = np.empty(len(pairs), dtype=np.int64)
        for i, (pair, count) in enumerate(zip(pairs.tolist(), counts.tolist(), strict=True)):
            code, dose_code = divmod(pair, len(doses))
            text = column.names[code]
            perturbation = self._parse(file, text, float(doses[dose_code]))
            found[i] = self._perturbations.setdefault(perturbation, len(self._perturbations))
            if is_counting:
                self._spellings.setdefault(("perturbation", perturbation), set()).add(text)
                cells = self._label_cells.setdefault(int(found[i]), Counter())
                cells[text.strip()] += count
        numbers_N[kept_N] = found[inverse.reshape(-1)] if len(found) else _LEFT_OUT
        return numbers_N

    def _parse(self, file: SourceFile, text: str, dose: float) -> Perturbation:
        where = f"{file.name}: column {self._columns.perturbation!r}"
        if not text.strip():
            raise SourceError(
                f"{where} holds an empty label; expected a name. Leave such cells out with where"
            )
        if np.isinf(dose) or dose < 0:
            raise SourceError(
                f"{file.name}: column {self._columns.dose!r} (columns.dose) holds {dose:g} for "
                f"{text!r}; expected an amount of 0 or more"
            )
        if text.strip() == self._control:
            # Before anything else: the control may hold the separator, and has no dose.
            return Perturbation.parse(self._control)
        try:
            return Perturbation.parse(
                text,
                dose=None if np.isnan(dose) else dose,
                unit=self._columns.dose_unit,
                separator=self._columns.separator,
            )
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from error

    # --- checks over all files ------------------------------------------------------------------

    def _is_control(self, perturbation: Perturbation) -> bool:
        """Compare exactly: 'Trametinib (DMSO_TF solvate)' is a drug although it names a control."""
        if self._control.startswith("[("):
            return perturbation == Perturbation.parse(self._control)
        return all(component.name == self._control for component in perturbation.components)

    def _control_number(self, is_control: list[bool]) -> int:
        """Return the perturbation that stands for all spellings of the control: the commonest."""
        numbers = [number for number, claim in enumerate(is_control) if claim]
        sizes = {number: sum(self._label_cells[number].values()) for number in numbers}
        chosen = min(numbers, key=lambda n: (-sizes[n], self._label(n)))
        if len(numbers) > 1:
            logger.warning(
                "control %r has %d labels, merged into %r: %s",
                self._control,
                len(numbers),
                self._label(chosen),
                ", ".join(sorted(self._label(n) for n in numbers)),
            )
        return chosen

    def _label(self, number: int) -> str:
        """Return the source's commonest label of a perturbation."""
        cells = self._label_cells[number]
        return min(cells, key=lambda text: (-cells[text], text))

    def _check_where(self) -> None:
        for name, values in self._where.items():
            seen = self._where_seen[name]
            for value in values:
                if value not in seen:
                    raise SourceError(
                        f"where: column {name!r} has no value {value!r}; "
                        f"{did_you_mean(value, list(seen))}"
                    )
        if not self._counts:
            raise SourceError(
                f"where leaves no cell of {self._num_left_out:,}; relax it: {dict(self._where)}"
            )

    def _check_controls(self, is_control: list[bool]) -> None:
        if not any(is_control):
            cells: Counter[str] = Counter()
            for counted in self._label_cells.values():
                cells.update(counted)
            names = {c.name for p in self._perturbations for c in p.components}
            close = nearest(self._control, [*names, *cells])
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            commonest = ", ".join(label for label, _ in cells.most_common(10))
            raise SourceError(
                f"no control cells: {self._columns.perturbation!r} has no value "
                f"{self._control!r}; {hint}it has {commonest}. Set control"
            )
        with_control = {key[0] for key in self._counts if is_control[key[1]]}
        report_without_control(
            name for name, number in self._cell_types.items() if number not in with_control
        )

    def _report_spellings(self) -> None:
        """Say once which labels were merged."""
        merged = [
            " = ".join(repr(text) for text in sorted(texts))
            for texts in self._spellings.values()
            if len(texts) > 1
        ]
        if merged:
            logger.warning(
                "%d labels have more than one spelling and were merged: %s",
                len(merged),
                "; ".join(sorted(merged)[:10]) + ("; ..." if len(merged) > 10 else ""),
            )


def _unpack(packed: int) -> Key:
    """Undo the packing of :meth:`Scan._packed_keys`."""
    return packed >> 17 & 0x1FFFF, packed >> 34, (packed & 0x1FFFF) - 1


def _check_complete(
    file: SourceFile, name: str, setting: str, codes_N: npt.NDArray[np.int32]
) -> None:
    missing = int((codes_N < 0).sum())
    if missing:
        raise SourceError(
            f"{file.name}: column {name!r} ({setting}) is missing (NaN) for {missing:,} of "
            f"{len(codes_N):,} cells; fill it, or leave these cells out with where"
        )


def _batch_in_key(condition_by: ConditionBy, counts: Counter[Key], is_control: list[bool]) -> bool:
    """Decide whether treated conditions are kept apart by batch."""
    sizes = [count for key, count in counts.items() if not is_control[key[1]] and key[2] >= 0]
    if condition_by is ConditionBy.perturbation or not sizes:
        return False
    if condition_by is ConditionBy.batch:
        return True
    median = float(np.median(sizes))
    chosen = median >= _CELLS_PER_BATCH
    logger.info(
        "treated conditions are %s by batch (median %g cells per cell type, perturbation and "
        "batch; %d are needed)",
        "kept apart" if chosen else "not kept apart",
        median,
        _CELLS_PER_BATCH,
    )
    return chosen
