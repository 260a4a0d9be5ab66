"""What is asked of a model: an AnnData seen through the model's names, and the conditions to make.

Here stands everything that can be wrong with an input: columns, labels, genes and the scale of
the values. What comes out is control cells on the model's genes and a list of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scale.data.genes import GeneVocabulary
from scale.types import Perturbation, Vocabulary, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKeys:
    """Columns of a query's ``.obs`` and the label of its control; None = as in training."""

    perturbation: str | None = None
    cell_type: str | None = None
    batch: str | None = None
    library: str | None = None
    control: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One condition to simulate.

    Parameters
    ----------
    cell_type, batch
        Context of the control cells to start from; batch None = any.
    perturbation
        What is done to them.
    label
        How the perturbation is written in the output.
    num_cells
        Cells to return.
    """

    cell_type: str
    batch: str | None
    perturbation: Perturbation
    label: str
    num_cells: int


@dataclass(frozen=True, slots=True)
class Controls:
    """Control cells of a query on the model's genes: values are log1p / value_scale."""

    values: sp.csr_matrix
    library: npt.NDArray[np.float32]
    obs: pd.DataFrame
    """cell_type, batch, may_start (False for cells kept back as the reference of an evaluation)."""


class Query:
    """An AnnData seen through the model's names: its controls, and what can be asked of it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        adata: AnnData,
        keys: QueryKeys,
        cell_type: str | None,
        max_missing_genes: float,
    ) -> None:
        self.vocabulary = vocabulary
        self.control = (keys.control or vocabulary.control).strip()
        self.perturbation_key = keys.perturbation or vocabulary.perturbation_key
        self.cell_type_key = keys.cell_type or vocabulary.cell_type_key
        self.batch_key = keys.batch or vocabulary.batch_key
        obs = adata.obs
        self._labels = self._read_labels(obs, keys)
        if cell_type is not None:
            self._cell_types = pd.Series(cell_type, index=obs.index)
        else:
            self._cell_types = _text_column(obs, self.cell_type_key, "cell_type_key")
        if keys.batch is not None or (self.batch_key is not None and self.batch_key in obs):
            self._batches = _text_column(obs, str(self.batch_key), "batch_key")
        else:
            self._batches = pd.Series(None, index=obs.index, dtype=object)
        is_control = np.flatnonzero((self._labels == self.control).to_numpy())
        if not len(is_control):
            raise ValueError(
                f"no control cells: {self.perturbation_key!r} has no value {self.control!r}; "
                f"{did_you_mean(self.control, sorted(set(self._labels)))}. Set control"
            )
        self.controls, self.missing_genes = _read_controls(
            vocabulary, adata, is_control, keys.library, max_missing_genes
        )
        self.controls.obs["cell_type"] = self._cell_types.to_numpy()[is_control]
        self.controls.obs["batch"] = self._batches.to_numpy()[is_control]

    def _read_labels(self, obs: pd.DataFrame, keys: QueryKeys) -> pd.Series:
        if keys.perturbation is None and self.perturbation_key not in obs:
            logger.info(
                "no column %r in .obs: all %d cells are taken as controls",
                self.perturbation_key,
                len(obs),
            )
            return pd.Series(self.control, index=obs.index)
        return _text_column(obs, self.perturbation_key, "perturbation_key")

    def requests(
        self, labels: Sequence[str] | None, dose: float | None, num_cells: int | None
    ) -> list[Request]:
        """One request per (context with controls, label)."""
        vocabulary = self.vocabulary
        wanted = list(vocabulary.perturbations if labels is None else labels)
        counts = pd.crosstab(self._cell_types, self._labels)
        requests = []
        for cell_type in sorted(set(self.controls.obs["cell_type"])):
            for label in wanted:
                perturbation = Perturbation.parse(label, dose=dose, separator=vocabulary.separator)
                vocabulary.component_rows(perturbation)
                if vocabulary.dose_key is not None and perturbation.doses:
                    # as in the source: the names here, the dose in a column of its own
                    label = (vocabulary.separator or "+").join(perturbation.names)
                observed = int(counts.loc[cell_type].get(label, 0))
                size = num_cells or observed or int(counts.loc[cell_type][self.control])
                requests.append(Request(cell_type, None, perturbation, label, size))
        return requests

    def rename(self, obs: pd.DataFrame) -> pd.DataFrame:
        """Put the columns of the prediction under the names of the input."""
        obs.loc[obs["is_control"].astype(bool), "perturbation"] = self.control
        names = {"perturbation": self.perturbation_key, "cell_type": self.cell_type_key}
        if self.vocabulary.dose_key is not None:
            obs = obs.rename(columns={"dose": self.vocabulary.dose_key})
        else:
            obs = obs.drop(columns="dose")
        if self.batch_key is not None:
            names["batch"] = self.batch_key
        else:
            obs = obs.drop(columns="batch")
        for name in names:
            obs[name] = obs[name].astype("category")
        obs["source_cell"] = obs["source_cell"].astype(str)
        obs = obs.rename(columns=names)
        obs.index = pd.Index([f"cell-{i}" for i in range(len(obs))])
        return obs


def _text_column(obs: pd.DataFrame, name: str, setting: str) -> pd.Series:
    if name not in obs:
        raise ValueError(
            f"no column {name!r} in .obs; {did_you_mean(name, [str(c) for c in obs.columns])}. "
            f"Set {setting}"
        )
    if obs[name].isna().any():
        raise ValueError(f"column {name!r} has {int(obs[name].isna().sum())} missing values")
    return obs[name].astype(str).str.strip()


def _read_controls(
    vocabulary: Vocabulary,
    adata: AnnData,
    rows: npt.NDArray[np.int64],
    library_key: str | None,
    max_missing_genes: float,
) -> tuple[Controls, tuple[str, ...]]:
    alignment = GeneVocabulary(vocabulary.genes).align([str(name) for name in adata.var_names])
    _report_genes(vocabulary, alignment.missing, alignment.extra, max_missing_genes)
    matrix = adata[rows].to_memory() if adata.isbacked else adata[rows]
    values = sp.csr_matrix(matrix.X, dtype=np.float32)
    if not np.isfinite(values.data).all() or (values.data < 0).any():
        raise ValueError("control cells hold negative, NaN or infinite values; expected counts")
    column = library_key or vocabulary.library_key
    if column is not None:
        if column not in adata.obs:
            raise ValueError(
                f"no column {column!r} with total counts in .obs; the model was trained on a "
                "matrix cut to some genes and needs it. Set library_key"
            )
        library = adata.obs[column].to_numpy(dtype=np.float64)[rows]
    else:
        library = _library(values, vocabulary.target_sum)
    logged = _to_log1p(values, library, vocabulary)
    present = alignment.column_G >= 0
    # Missing genes stay empty columns: a product with a 0/1 matrix places the present ones.
    place = sp.csr_matrix(
        (
            np.ones(int(present.sum()), dtype=np.float32),
            (alignment.column_G[present], np.flatnonzero(present)),
        ),
        shape=(adata.n_vars, len(vocabulary.genes)),
    )
    obs = pd.DataFrame({"may_start": True}, index=adata.obs_names[rows].astype(str))
    if "control_fold" in adata.obs:
        obs["may_start"] = (adata.obs["control_fold"].to_numpy()[rows] == 0).tolist()
    if "source_cell" in adata.obs:
        obs.index = pd.Index(adata.obs["source_cell"].astype(str).to_numpy()[rows])
    aligned = (logged @ place).tocsr()
    aligned.sort_indices()
    return Controls(aligned, library.astype(np.float32), obs), alignment.missing


def _report_genes(
    vocabulary: Vocabulary,
    missing: tuple[str, ...],
    extra: tuple[str, ...],
    max_missing: float,
) -> None:
    if extra:
        logger.info("%d genes of the input are not in the model and are left out", len(extra))
    if not missing:
        return
    text = (
        f"{len(missing):,} of {len(vocabulary.genes):,} model genes are missing in the input "
        f"(first: {', '.join(missing[:5])})"
    )
    if len(missing) > max_missing * len(vocabulary.genes):
        raise ValueError(
            f"{text}; at most {max_missing:.0%} may be missing. Are the gene names of another "
            "kind (Ensembl ids, other species)? Raise max_missing_genes to go on"
        )
    logger.warning("%s and are set to 0", text)


def _library(values: sp.csr_matrix, target_sum: float) -> npt.NDArray[np.float64]:
    """Return the counts of each cell; of log1p values the smallest is that of a single count."""
    if (values.data == np.rint(values.data)).all():
        return np.asarray(values.sum(axis=1), dtype=np.float64).ravel()
    single = np.full(values.shape[0], np.inf)
    per_cell = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
    positive = values.data > 0
    np.minimum.at(single, per_cell[positive], values.data[positive].astype(np.float64))
    return target_sum / np.expm1(single)


def _to_log1p(
    values: sp.csr_matrix, library: npt.NDArray[np.float64], vocabulary: Vocabulary
) -> sp.csr_matrix:
    """Return log1p(count * target_sum / library) / value_scale from counts or log1p values."""
    target, scaled = vocabulary.target_sum, values.astype(np.float32)
    per_cell = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
    if (values.data == np.rint(values.data)).all():
        if (library <= 0).any():
            raise ValueError(
                f"{int((library <= 0).sum())} control cells have no counts; remove them"
            )
        scaled.data = np.log1p(values.data * (target / library)[per_cell]).astype(np.float32)
    else:
        totals = np.bincount(
            per_cell, np.expm1(values.data.astype(np.float64)), minlength=values.shape[0]
        )
        if abs(np.median(totals) / target - 1) > 0.1:
            raise ValueError(
                f".X holds neither counts nor log1p of counts per {target:,.0f} (median total "
                f"after expm1: {np.median(totals):,.0f}); give integer counts, or values made "
                f"with normalize_total(target_sum={target:,.0f}) and log1p over all genes"
            )
    scaled.data /= np.float32(vocabulary.value_scale)
    return scaled
