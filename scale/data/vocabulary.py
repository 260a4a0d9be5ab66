"""Names of a store and of a model brought together.

A vocabulary holds the names that a model was trained with. It is made from training conditions
only, so that a perturbation or a context that is never trained on is unknown, not a random row of
a table.

Shapes: J = largest number of components of a perturbation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scale.data.compact import Projection
from scale.data.draws import Integers
from scale.data.features import FeatureTable, describe_names
from scale.data.genes import GeneVocabulary
from scale.data.store import CellSetStore
from scale.types import (
    ABSENT,
    CONTROL_COMPONENT,
    UNKNOWN_COMPONENT,
    PlanError,
    StoreError,
    Vocabulary,
)

logger = logging.getLogger(__name__)

UNKNOWN_NAME = "<unknown>"
"""Name of row 0 of the component table."""


@dataclass(frozen=True, slots=True)
class ConditionTable:
    """What a batch says of each condition of the store, by condition id.

    Parameters
    ----------
    component, dose
        [conditions, J]; see :class:`scale.types.Batch`.
    cell_type, batch
        [conditions]
    """

    component: npt.NDArray[np.int64]
    dose: npt.NDArray[np.float32]
    cell_type: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of some conditions, sorted."""

    components: list[str]
    cell_types: list[str]
    batches: list[str]
    perturbations: list[str]


def _names(store: CellSetStore, conditions: Sequence[int]) -> _Names:
    table = store.conditions.loc[list(conditions)]
    treated = [store.perturbations[p] for p in table["perturbation"][~table["is_control"]].unique()]
    return _Names(
        sorted({c.name for p in treated for c in p.components} - {store.control}),
        sorted(table["cell_type"].unique()),
        sorted(table["batch"].dropna().unique()),
        sorted({p.label for p in treated}),
    )


def make_vocabulary(
    store: CellSetStore,
    conditions: Sequence[int],
    *,
    target_sum: float,
    value_scale: float,
    features: FeatureTable | None = None,
) -> Vocabulary:
    """Return the vocabulary of a store for a model that is trained on some of its conditions.

    Parameters
    ----------
    store
        Open store.
    conditions
        Ids of the conditions whose cells are to be predicted in training.
    target_sum, value_scale
        How counts become values.
    features
        Features of perturbations; those of the store that have some are known by them.
    """
    names = _names(store, conditions)
    vocabulary = Vocabulary(
        genes=store.genes.symbols,
        components=(UNKNOWN_NAME, store.control, *names.components),
        cell_types=tuple(names.cell_types),
        batches=tuple(names.batches),
        perturbations=tuple(names.perturbations),
        target_sum=target_sum,
        value_scale=value_scale,
        **_source_names(store),
    )
    return _described(vocabulary, store, features)


def extend_vocabulary(
    vocabulary: Vocabulary,
    store: CellSetStore,
    conditions: Sequence[int],
    features: FeatureTable | None = None,
) -> Vocabulary:
    """Return a vocabulary to which the new names of a store are appended, sorted among themselves.

    Rows of the old names stay where they are, and the genes are kept. Column names, separator and
    the label of the control are the store's.

    Parameters
    ----------
    vocabulary
        That of the checkpoint.
    store
        Store to be trained on.
    conditions
        Ids of its training conditions; see :func:`scale.data.module.training_conditions`.
    features
        Features of its perturbations, of the same blocks as the checkpoint's if that has any.
    """
    names = _names(store, conditions)

    def extended(old: tuple[str, ...], new: Iterable[str]) -> tuple[str, ...]:
        return (*old, *(name for name in new if name not in set(old)))

    components = extended(vocabulary.components, names.components)
    new = replace(
        vocabulary,
        components=components,
        cell_types=extended(vocabulary.cell_types, names.cell_types),
        batches=extended(vocabulary.batches, names.batches),
        perturbations=tuple(sorted({*vocabulary.perturbations, *names.perturbations})),
        described=tuple(name for name in vocabulary.described if name not in set(components)),
        **_source_names(store),
    )
    return _described(new, store, features)


def _described(
    vocabulary: Vocabulary, store: CellSetStore, features: FeatureTable | None
) -> Vocabulary:
    """Return a vocabulary that knows all perturbations of the store that have features."""
    if features is None:
        return vocabulary
    names = {c.name for p in store.perturbations for c in p.components} - {store.control}
    return describe_names(vocabulary, features, names)


def _source_names(store: CellSetStore) -> dict[str, Any]:
    columns = store.columns
    return {
        "control": store.control,
        "perturbation_key": columns["perturbation"],
        "cell_type_key": columns["cell_type"],
        "batch_key": columns["batch"],
        "dose_key": columns.get("dose"),
        "separator": columns.get("separator"),
        "library_key": columns.get("library"),
    }


# --- alignment ----------------------------------------------------------------------------------


def make_table(store: CellSetStore, vocabulary: Vocabulary) -> ConditionTable:
    """Return what batches say of each condition; names out of the vocabulary become unknown."""
    row_of = vocabulary.row_of
    size = max(len(p.components) for p in store.perturbations)
    component = np.full((len(store.perturbations), size), ABSENT, np.int64)
    dose = np.full((len(store.perturbations), size), np.nan, np.float32)
    for p, perturbation in enumerate(store.perturbations):
        for j, part in enumerate(perturbation.components):
            component[p, j] = row_of.get(part.name, UNKNOWN_COMPONENT)
            dose[p, j] = np.nan if part.dose is None else part.dose
    conditions = store.conditions
    perturbation_id = conditions["perturbation"].to_numpy(np.int64)
    component, dose = component[perturbation_id], dose[perturbation_id]
    is_control = conditions["is_control"].to_numpy(bool)
    component[is_control] = [CONTROL_COMPONENT] + [ABSENT] * (size - 1)
    dose[is_control] = np.nan
    return ConditionTable(
        component,
        dose,
        _index_of(conditions["cell_type"], vocabulary.cell_types),
        _index_of(conditions["batch"], vocabulary.batches),
    )


def _index_of(values: Iterable[str | None], names: Sequence[str]) -> Integers:
    index = {name: i for i, name in enumerate(names)}
    return np.array([ABSENT if v is None else index.get(v, ABSENT) for v in values], np.int64)


def check_names(store: CellSetStore, vocabulary: Vocabulary, conditions: Sequence[int]) -> None:
    """Refuse training conditions whose names the vocabulary does not have.

    Raises
    ------
    PlanError
        Naming how many and the first of them.
    """
    names = _names(store, conditions)
    unknown = [
        f"{len(missing)} {what} ({', '.join(sorted(missing)[:5])})"
        for what, found, known in (
            ("perturbations", names.components, vocabulary.components),
            ("cell types", names.cell_types, vocabulary.cell_types),
            ("batches", names.batches, vocabulary.batches),
        )
        if (missing := set(found) - set(known))
    ]
    if unknown:
        raise PlanError(
            f"training conditions of {store.address} have names that the model's vocabulary lacks: "
            f"{'; '.join(unknown)}; append them with scale.data.vocabulary.extend_vocabulary, as "
            "scale finetune does, or leave the conditions out by the split"
        )


def make_projection(store: CellSetStore, genes: tuple[str, ...]) -> Projection | None:
    """Return where each stored gene goes in the vocabulary; None where they are the same.

    Raises
    ------
    StoreError
        If no gene is in both.
    """
    if store.genes.symbols == genes:
        return None
    alignment = GeneVocabulary(genes).align(store.genes.symbols)
    num_common = len(genes) - len(alignment.missing)
    if not num_common:
        raise StoreError(
            f"{store.address} has none of the model's {len(genes)} genes (the model's: {genes[0]}, "
            f"...; the store's: {store.genes.symbols[0]}, ...); use a store with the same kind of "
            "names"
        )
    if alignment.missing:
        logger.warning(
            "%d of the model's %d genes are not in %s and are 0 in every cell, as %s",
            len(alignment.missing),
            len(genes),
            store.address,
            ", ".join(alignment.missing[:5]),
        )
    return Projection(torch.from_numpy(alignment.projection(store.num_genes)), len(genes))
