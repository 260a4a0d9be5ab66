"""One context of an evaluation: whose cells are compared with whose, and against which controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.draws import derive, mix64_array
from scale.evaluate.cache import TableCache
from scale.evaluate.cells import Rows
from scale.evaluate.checks import CellTable
from scale.evaluate.distances import Space, energy_distance, spread, squared_mmd, within_similarity
from scale.evaluate.scoring import Facts, gene_numbers
from scale.evaluate.sides import Control, Side, make_control, side_of_cells
from scale.evaluate.statistics import Floats, column_sums
from scale.evaluate.training import InputControl, Training

_NOISE_CELLS, _NOISE_DRAWS = 400, 20


def keyed_order(count: int, seed: int, *names: str) -> Rows:
    """Return a permutation of ``count`` positions: a pure function of seed and names."""
    key = derive(seed, *(crc32(name.encode()) for name in names))
    draws = mix64_array(np.arange(count, dtype=np.uint64) ^ np.uint64(key))
    return np.argsort(draws, kind="stable")


def generator(seed: int, *names: str) -> np.random.Generator:
    """Return random numbers that are a pure function of seed and names."""
    return np.random.default_rng(derive(seed, *(crc32(name.encode()) for name in names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all contexts share."""

    strict: bool
    min_significant: int
    max_cells: int
    seed: int
    space: Space
    direction_KD: Floats
    genes: tuple[str, ...]
    cache: TableCache | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Cells of one context, the observed side made from them, and what all methods share.

    Parameters
    ----------
    name, unit, labels
        Context, its independent unit, its perturbations in order.
    cells
        Observed cells of each perturbation.
    controls, inputs
        All observed control cells, and those that a prediction may start from.
    input_control, observed
        Prepared input control, and the observed side (against the reference half).
    """

    name: str
    unit: str
    labels: tuple[str, ...]
    cells: tuple[sp.csr_matrix, ...]
    controls: sp.csr_matrix
    inputs: InputControl
    input_control: Control
    observed: Side
    facts: Facts
    num_significant_P: npt.NDArray[np.int64]


def control_of(cells: sp.csr_matrix, settings: Settings, *names: str) -> Control:
    """Return prepared control cells; strict caps the cells of the gene test, cell_eval does not."""
    order = keyed_order(cells.shape[0], settings.seed, "control cells", *names)
    chosen = np.sort(order[: settings.max_cells])
    sampled = cells[chosen]
    return make_control(cells, sampled if settings.strict else cells, sampled, settings.space)


def side_of(cells: Sequence[sp.csr_matrix], control: Control, settings: Settings) -> Side:
    """Return a side made from cells."""
    return side_of_cells(cells, control, settings.space, max_points=settings.max_cells)


def observed_side(
    cells: Sequence[sp.csr_matrix], control: Control, settings: Settings, *names: str
) -> Side:
    """Return a side of observed cells, whose gene tables may be known from another evaluation."""
    tables = None
    if settings.cache is not None:
        tables = settings.cache.gene_tables(cells, control.tested, names)
    return side_of_cells(
        cells, control, settings.space, max_points=settings.max_cells, tables=tables
    )


def make_context(
    name: str,
    labels: Sequence[str],
    observed: CellTable,
    rows: Mapping[tuple[str, str], Rows],
    *,
    control: str,
    fold: npt.NDArray[np.int8] | None,
    training: Training,
    settings: Settings,
) -> Context:
    """Return a context with its observed side.

    Parameters
    ----------
    name, labels
        Context and its scored perturbations.
    observed, rows
        Observed cells, and row numbers of each (context, perturbation).
    control
        Label of the control.
    fold
        0 (input) or 1 (reference) for every observed control cell; None = all on both sides.
    training
        Training changes, for the mean response that residual metrics take off.
    settings
        What all contexts share.
    """
    control_rows = rows[(name, control)]
    if fold is None:
        inputs = input_of(observed, control_rows)
        controls = inputs.values
        input_control = reference = control_of(controls, settings, name, "input")
    else:
        inputs = input_of(observed, control_rows[fold[control_rows] == 0])
        controls = observed.values[control_rows]
        input_control = control_of(inputs.values, settings, name, "input")
        rest = controls[fold[control_rows] == 1]
        reference = control_of(rest, settings, name, "reference")
    cells = read_conditions(observed, [rows[(name, label)] for label in labels])
    side = observed_side(cells, reference, settings, name, "observed", *labels)
    assert side.cells is not None
    significant_P = side.cells.tests.significant_PG.sum(axis=1)
    energy = [
        energy_distance(input_control.points, points, input_control.within, within)
        for points, within in zip(side.cells.points, side.cells.within_P, strict=True)
    ]
    scale = spread(side.cells.points)
    within = within_similarity(input_control.points, scale)
    mmd = [squared_mmd(input_control.points, x, scale, within) for x in side.cells.points]
    noise = _noise(input_control, int(np.median(side.num_P)), scale, settings, name)
    facts = Facts(
        labels=tuple(labels),
        target_gene_P=gene_numbers(labels, settings.genes),
        strict=settings.strict,
        num_significant_P=significant_P,
        min_significant=settings.min_significant,
        effects_P=tuple(training.effects(name, label) for label in labels),
        reference_mean_G=training.reference_mean_G(name),
        reference_delta_G=None if training.mean_change is None else training.mean_change.delta_G,
        control_energy_P=np.array(energy),
        energy_noise=noise[0],
        control_mmd_P=np.array(mmd),
        mmd_noise=noise[1],
        spread=scale,
        direction_KD=settings.direction_KD,
    )
    return Context(
        name=name,
        unit=str(observed.unit[control_rows[0]]),
        labels=tuple(labels),
        cells=cells,
        controls=controls,
        inputs=inputs,
        input_control=input_control,
        observed=side,
        facts=facts,
        num_significant_P=significant_P,
    )


def _noise(
    control: Control, size: int, scale: float, settings: Settings, name: str
) -> tuple[float, float]:
    """Deviations of the energy distance and of the MMD of ``size`` control cells to other ones."""
    points = control.points[:_NOISE_CELLS]
    size = max(2, min(size, len(points) // 2))
    found = []
    for draw in range(_NOISE_DRAWS):
        order = keyed_order(len(points), settings.seed, "energy noise", name, str(draw))
        x, y = points[order[:size]], points[order[size:]]
        found.append((energy_distance(x, y), squared_mmd(x, y, scale)))
    energy, mmd = np.std(found, axis=0).tolist()
    return energy, mmd


def input_of(table: CellTable, rows: Rows) -> InputControl:
    """Return control cells of a table with their counts, where it has them."""
    counts = None if table.counts is None else table.counts[rows]
    return InputControl(table.values[rows], counts)


def read_conditions(table: CellTable, groups: Sequence[Rows]) -> tuple[sp.csr_matrix, ...]:
    """Return the cells of each group of rows, read at once: they are views of one matrix."""
    matrix = table.values[np.concatenate(groups)]
    cells, first = [], 0
    for rows in groups:
        indptr = matrix.indptr[first : first + len(rows) + 1]
        part = slice(indptr[0], indptr[-1])
        arrays = (matrix.data[part], matrix.indices[part], indptr - indptr[0])
        cells.append(sp.csr_matrix(arrays, shape=(len(rows), matrix.shape[1])))
        first += len(rows)
    return tuple(cells)


def mean_of_rows(table: CellTable, rows: Rows) -> Floats:
    """Return the mean of cells, of which there may be too many to hold at once."""
    sums = [column_sums(table.values[piece]) for piece in table.values.pieces(rows)]
    return np.asarray(np.sum(sums, axis=0) / len(rows))


def halves(context: Context, settings: Settings, split: int) -> tuple[Side, Side]:
    """Return the two halves of a context's conditions, each against its half of all controls."""
    named = list(zip(context.labels, context.cells, strict=True))
    sides = []
    for half in range(2):
        rows = _half(context.controls, settings, context, split, "", half)
        place = (context.name, f"half {split} {half}")
        control = control_of(context.controls[rows], settings, *place)
        cells = [c[_half(c, settings, context, split, label, half)] for label, c in named]
        sides.append(observed_side(cells, control, settings, *place, *context.labels))
    return sides[0], sides[1]


def _half(
    cells: sp.csr_matrix, settings: Settings, context: Context, split: int, label: str, half: int
) -> Rows:
    """Rows of one of two disjoint halves of floor(n / 2) rows."""
    order = keyed_order(cells.shape[0], settings.seed, "half", context.name, label, str(split))
    size = cells.shape[0] // 2
    return np.sort(order[half * size : (half + 1) * size])
