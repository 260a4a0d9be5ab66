"""Which genes a store keeps: all, those of a list, or the most variable ones.

Apart from ``genes.py``, which knows no settings, conditions or splits. With a split only its
training conditions and their controls decide; a choice over all cells has seen the test cells, so
the store says which of the two it was.

Shapes: C = conditions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import GeneChoice, GenesConfig, HeldoutControls, Unknown
from scale.data.genes import GeneVocabulary, StreamingMoments, most_variable
from scale.data.ingest.conditions import ConditionTable
from scale.data.split import Split
from scale.data.split_file import TRAIN
from scale.types import SourceError, SplitError

logger = logging.getLogger(__name__)

Columns = npt.NDArray[np.int64]
Moments = Callable[[npt.NDArray[np.bool_]], StreamingMoments]
"""Makes one pass over the cells of the conditions that are wanted."""


@dataclass(frozen=True, slots=True)
class ChosenGenes:
    """Which genes are stored, and what is known of all of them.

    Parameters
    ----------
    columns
        Positions in the vocabulary of the source, in the order in which genes are stored.
    table
        One row per gene of the source: symbol, ensembl_id, column (-1 = not stored), and where the
        cells decided also num_cells, mean, variance and dispersion_norm.
    fit_on
        Which cells decided: ``all``, or ``train`` of a split; None = the choice saw no cell.
    """

    columns: Columns
    table: pd.DataFrame
    fit_on: Literal["all", "train"] | None


def choose_genes(
    settings: GenesConfig,
    genes: GeneVocabulary,
    conditions: ConditionTable,
    minimum_cells: int,
    moments: Moments,
) -> ChosenGenes:
    """Return the genes to store.

    Parameters
    ----------
    settings
        The choice and its numbers.
    genes
        Genes of the source.
    conditions
        All conditions of the source.
    minimum_cells
        Treated conditions with fewer cells are not stored and do not decide.
    moments
        Called once if the cells decide, with the conditions whose cells do; the result must be of
        ``settings.flavor``.

    Raises
    ------
    SourceError
        If a list cannot be read or names genes that the source lacks, or if no gene varies.
    SplitError
        If the split cannot be read or has no training conditions.
    """
    columns: Columns = np.arange(len(genes), dtype=np.int64)
    table = pd.DataFrame({"symbol": genes.symbols, "ensembl_id": genes.ensembl_ids, "column": -1})
    fit_on: Literal["all", "train"] | None = None
    if settings.choice is GeneChoice.list:
        columns = choose_list(genes, Path(str(settings.file)), max_missing=settings.max_missing)
    elif settings.choice is GeneChoice.hvg and settings.num < len(genes):
        fit_on = "all" if settings.split is None else "train"
        found = moments(_deciding_conditions(settings, conditions, minimum_cells))
        if found.flavor is not settings.flavor:
            raise ValueError(f"moments of flavor {found.flavor}, expected {settings.flavor}")
        statistics = found.table()
        is_chosen_G = most_variable(statistics["dispersion_norm"].to_numpy(), settings.num)
        columns = np.flatnonzero(is_chosen_G)
        table = pd.concat([table, statistics], axis=1)
    table.loc[columns, "column"] = np.arange(len(columns))
    logger.info("genes: %d of %d (%s)", len(columns), len(genes), settings.choice.value)
    return ChosenGenes(columns, table, fit_on)


def choose_list(genes: GeneVocabulary, path: Path, *, max_missing: int = 0) -> Columns:
    """Return the positions of the genes of a list file, in the order of the file.

    Parameters
    ----------
    genes
        Genes of the source; the file may give symbols or Ensembl identifiers.
    path
        One name a line; lines that start with ``#`` are comments.
    max_missing
        Names that the source may lack; they are left out, with a warning.

    Raises
    ------
    SourceError
        If the file cannot be read, names a gene twice, or names more genes that the source does
        not have.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"genes.file={path} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    position = {name: i for i, name in enumerate(genes.symbols)}
    if genes.ensembl_ids is not None:
        position = {name: i for i, name in enumerate(genes.ensembl_ids)} | position
    unknown = [name for name in names if name not in position]
    if len(unknown) > max_missing or len(unknown) == len(names):
        raise SourceError(
            f"genes.file={path}: {len(unknown):,} of {len(names):,} genes are not in the source"
            f"{_first(unknown)}; expected one name of .var_names per line. To go on without up to "
            f"N of them, set genes.max_missing=N (now {max_missing})"
        )
    if unknown:
        logger.warning(
            "genes.file=%s: %d of %d genes are not in the source and are left out: %s",
            path,
            len(unknown),
            len(names),
            ", ".join(unknown),
        )
    chosen = np.array([position[name] for name in names if name in position], dtype=np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise SourceError(f"genes.file={path} names a gene more than once; remove the repetition")
    return chosen


def _deciding_conditions(
    settings: GenesConfig, conditions: ConditionTable, minimum_cells: int
) -> npt.NDArray[np.bool_]:
    """Return per condition whether its cells decide which genes are variable."""
    is_control_C = np.array([c.is_control for c in conditions.conditions])
    is_wanted_C = conditions.num_cells >= np.where(is_control_C, 1, minimum_cells)
    if settings.split is None:
        return np.asarray(is_wanted_C)
    split = Split.read(Path(settings.split))
    is_wanted_C &= _parts(split, conditions) == TRAIN
    if not (is_wanted_C & ~is_control_C).any():
        raise SplitError(
            f"genes.split={settings.split} leaves no training condition of minimum_cells "
            f"({minimum_cells}) cells or more, of {int((~is_control_C).sum()):,} treated ones"
        )
    logger.info(
        "genes are chosen on %d of %d conditions, those that %s trains on and their controls",
        int(is_wanted_C.sum()),
        len(is_wanted_C),
        settings.split,
    )
    return np.asarray(is_wanted_C)


def _parts(split: Split, conditions: ConditionTable) -> npt.NDArray[np.str_]:
    """Return the part of each condition; controls of contexts that are held out whole have none.

    Names that the source lacks are a warning: published lists have them, and a name without cells
    holds back nothing.
    """
    numbers = {p: i for i, p in enumerate({c.perturbation: None for c in conditions.conditions})}
    table = pd.DataFrame(
        {
            "cell_type": [c.cell_type for c in conditions.conditions],
            "perturbation": [numbers[c.perturbation] for c in conditions.conditions],
            "batch": [c.batch for c in conditions.conditions],
            "is_control": [c.is_control for c in conditions.conditions],
        }
    )
    label_of = {
        c.perturbation: label
        for c, label in zip(conditions.conditions, conditions.labels, strict=True)
    }
    return split.assign(
        table,
        list(numbers),
        labels=[label_of[perturbation] for perturbation in numbers],
        unknown=Unknown.warn,
        heldout_controls=HeldoutControls.excluded,
    )


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
