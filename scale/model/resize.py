"""Trained weights for a larger vocabulary: new names in a finetune, or another list of genes.

Only whole weights are touched, so this works on the state of any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from scale.types import CONTROL_COMPONENT, UNKNOWN_COMPONENT, CheckpointError, Vocabulary

_TABLES = "condition.component_table", "condition.cell_type_table", "condition.batch_table"
_ENCODER: dict[str, Callable[[Tensor], Tensor]] = {
    "patch_TPE": lambda x: x.flatten(0, 1),
    "genes.weight": lambda x: x.T,
}
_READOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "genes.weight": lambda x: x,
    "genes.bias": lambda x: x,
}
_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_G": lambda x: x,
    "basis_GP": lambda x: x,
}
_GENE_AXES = {
    **{f"encoder.{name}": rows for name, rows in _ENCODER.items()},
    **{f"point_encoder.{name}": rows for name, rows in _ENCODER.items()},
    **{f"readout.{name}": rows for name, rows in _READOUT.items()},
    **_STATISTICS,
}
"""Weights with one row per gene, and how to see them as such."""
_GENE_AXES_OF_LATENT = {
    **{f"latent.encoder.{name}": rows for name, rows in _ENCODER.items()},
    **{f"latent.decoder.{name}": rows for name, rows in _READOUT.items()},
    "latent.reference_NG": lambda x: x.T,
    "latent.offset_G": lambda x: x,
    "latent.slow_dispersion_G": lambda x: x,
    **_STATISTICS,
}
"""The same of a model whose path lies in latent space: its autoencoder alone touches genes."""
_ENCODERS = "encoder.", "point_encoder.", "latent.encoder."
"""What reads genes."""
_FEATURE_MAP = "condition.features."
_FEATURES = "condition.features.feature_CV"
_PER_PATCH = "encoder.identity_TE", "point_encoder.identity_TE", "latent.encoder.identity_TE"


def extend_state(
    fresh: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    old: Vocabulary,
    new: Vocabulary,
) -> dict[str, Tensor]:
    """Return the state of a model for ``new`` with what was trained for ``old``.

    Rows of a table move with their names. A new name keeps a fresh row of its own, since names that
    start at one point are told apart only slowly; one with features starts at the row of the
    unknown, as it was predicted before. Features of a name that has none in ``fresh`` are those of
    the checkpoint; their map stays fresh where that had none.

    Where the genes differ, the weights of a gene move with its symbol, and patches keep their
    identity by place. A new gene is neither read nor changed at first (weights of zero), so that
    what was learned of the others holds; if no gene is known, fresh weights read them all.

    Parameters
    ----------
    fresh
        ``state_dict`` of a new model for ``new``, of the same sizes.
    trained
        ``state_dict`` of the trained model, on the same layout of ranks.
    old, new
        Their vocabularies.

    Raises
    ------
    CheckpointError
        If the two models differ in more than the vocabulary; the message names the first weight.
    """
    tables = dict(zip(_TABLES, _table_names(old, new), strict=True))
    same_genes = old.genes == new.genes
    axes = _GENE_AXES_OF_LATENT if "latent.offset_G" in fresh else _GENE_AXES
    result: dict[str, Tensor] = {}
    for name, start in fresh.items():
        if not isinstance(start, Tensor):  # Megatron's empty extra states
            result[name] = start
            continue
        if name.startswith(_FEATURE_MAP) and not old.num_features:
            result[name] = start
            continue
        if name not in trained:
            raise CheckpointError(f"the checkpoint lacks {name}; it was made by another model")
        value = trained[name]
        if name in tables:
            value = _move_table(start, value, *tables[name])
            if name == _TABLES[0] and old.num_features:
                _start_at_unknown(value, _moved_features(fresh, trained, old, new), old, new)
        elif name == _FEATURES:
            value = _moved_features(fresh, trained, old, new)
        elif not same_genes and name in _PER_PATCH:
            value = _move_patches(start, value)
        elif not same_genes:
            empty = torch.zeros_like(start) if name.startswith(_ENCODERS) else start
            value = _move_genes(start, value, old.genes, new.genes, axes.get(name), empty)
        if value.shape != start.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint and {tuple(start.shape)} "
                "here; sizes of the model cannot change"
            )
        result[name] = value.to(start.dtype)
    return result


_Names = tuple[Sequence[str], Sequence[str], int]


def _table_names(old: Vocabulary, new: Vocabulary) -> list[_Names]:
    """Return names by row of each table before and after, and its number of special rows."""
    # A batch column can be missing: then the table is the null row alone.
    return [
        (old.components, new.components, CONTROL_COMPONENT + 1),
        (("", *old.cell_types), ("", *new.cell_types), 1),
        (("", *old.batches), ("", *new.batches), 1),
    ]


def _move_table(
    start: Tensor, value: Tensor, old: Sequence[str], new: Sequence[str], num_special: int
) -> Tensor:
    table = start.clone()
    # Special rows move by place, whatever the control is called.
    table[:num_special] = value[:num_special]
    row = {name: i for i, name in enumerate(old) if i >= num_special}
    places = [(i, row[name]) for i, name in enumerate(new) if i >= num_special and name in row]
    if places:
        to, of = zip(*places, strict=True)
        table[list(to)] = value[list(of)].to(table)
    return table


def _start_at_unknown(table: Tensor, feature_CV: Tensor, old: Vocabulary, new: Vocabulary) -> None:
    """Give new names with features the row that stood for them when only those were known."""
    has_features = feature_CV.any(1).tolist()
    known = set(old.components)
    for row, name in enumerate(new.components):
        if has_features[row] and name not in known:
            table[row] = table[UNKNOWN_COMPONENT]


def _moved_features(
    fresh: Mapping[str, Tensor], trained: Mapping[str, Tensor], old: Vocabulary, new: Vocabulary
) -> Tensor:
    """Return the features of the new names: those given anew, else those of the checkpoint."""
    start, value = fresh[_FEATURES], trained[_FEATURES]
    moved = start.clone()
    has_own = start.any(1).tolist()
    for name, row in new.row_of.items():
        if not has_own[row] and name in old.row_of:
            moved[row] = value[old.row_of[name]]
    return moved


def _move_patches(start: Tensor, value: Tensor) -> Tensor:
    """Return what stands for patches, by place."""
    kept = start.clone()
    shared = min(len(start), len(value))
    kept[:shared] = value[:shared]
    return kept


def _move_genes(
    start: Tensor,
    value: Tensor,
    old: Sequence[str],
    new: Sequence[str],
    as_rows: Callable[[Tensor], Tensor] | None,
    unknown: Tensor,
) -> Tensor:
    """Return a weight with the genes of the new list, rows of ``unknown`` for those without.

    A weight without genes stays as it was; if no gene is known, it is the one to start with.
    """
    if as_rows is None:
        return value
    row = {gene: i for i, gene in enumerate(old)}
    places = [(i, row[gene]) for i, gene in enumerate(new) if gene in row]
    if not places:
        return start
    moved = unknown.clone()
    to, of = zip(*places, strict=True)
    # a view of the copy, so this writes into it
    as_rows(moved)[list(to)] = as_rows(value)[list(of)]
    return moved
