"""A trained model applied to cells: stream control sets through it, return AnnData.

The way in is the same from Python (:meth:`Predictor.predict`) and from the command line
(:meth:`Predictor.write`): the second appends to a file on disk and holds one condition in memory.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, G = genes,
J = components of a perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

from scale.predict.output import Block, H5adWriter
from scale.predict.pool import condition_seed, pool_rows, set_sizes
from scale.predict.query import Controls, Query, QueryKeys, Request
from scale.predict.unseen import learn_features
from scale.runtime import (
    World,
    atomic_path,
    choose_device,
    package_version,
)
from scale.train.checkpoint import load_for_prediction
from scale.types import ABSENT, Batch, Perturbation, Vocabulary

if TYPE_CHECKING:
    from scale.model.model import ScaleModel

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""


@dataclass(frozen=True, slots=True)
class _Sampling:
    num_steps: int | None
    guidance: float
    seed: int
    sets_per_batch: int


def load(
    source: str | Path,
    *,
    checkpoint: str = "last",
    device: str = "auto",
    perturbation_features: str | Path | None = None,
) -> Predictor:
    """Return a predictor from a run directory, a checkpoint or an export.

    Parameters
    ----------
    source
        ``runs/NAME``, one of its ``checkpoints/step_*``, or an ``export`` folder. Nothing is
        fetched from the network.
    checkpoint
        Which checkpoint of a run: ``last`` (its export where there is one) or ``step_00001000``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    perturbation_features
        File of ``scale features``: perturbations in it can be predicted without being trained on.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    CheckpointError
        If the checkpoint is damaged or was made by an incompatible version.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no run, checkpoint or export at {path}")
    if checkpoint != "last":
        path = path / "checkpoints" / checkpoint
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
    loaded = load_for_prediction(path, choose_device(device, World(0, 1, 0)))
    vocabulary = loaded.vocabulary
    if perturbation_features is not None:
        vocabulary = learn_features(loaded.model, vocabulary, Path(perturbation_features))
    return Predictor(loaded.model, vocabulary, source_sha256=loaded.sha256)


class Predictor:
    """A trained model with the names it was trained on.

    Parameters
    ----------
    model
        Weights for prediction, on their device.
    vocabulary
        Genes, perturbations, cell types and batches of the training data.
    source_sha256
        Hash of the weights, written into every prediction.
    """

    def __init__(self, model: ScaleModel, vocabulary: Vocabulary, *, source_sha256: str) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.source_sha256 = source_sha256
        self._seen = {
            Perturbation.parse(label, separator=vocabulary.separator).without_units
            for label in vocabulary.perturbations
        }

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene symbols in model order."""
        return self.vocabulary.genes

    @property
    def perturbations(self) -> tuple[str, ...]:
        """Labels seen in training; the control is not among them."""
        return self.vocabulary.perturbations

    @property
    def cell_types(self) -> tuple[str, ...]:
        """Contexts seen in training."""
        return self.vocabulary.cell_types

    @property
    def control(self) -> str:
        """Label of the control in the training data."""
        return self.vocabulary.control

    def __repr__(self) -> str:
        return (
            f"Predictor({self.model.num_parameters():,} parameters, {len(self.genes):,} genes, "
            f"{len(self.perturbations):,} perturbations, {len(self.cell_types):,} cell types, "
            f"control {self.control!r})"
        )

    def predict(
        self,
        adata: AnnData,
        *,
        perturbation: str | Sequence[str] | None = None,
        dose: float | None = None,
        cell_type: str | None = None,
        perturbation_key: str | None = None,
        cell_type_key: str | None = None,
        batch_key: str | None = None,
        library_key: str | None = None,
        control: str | None = None,
        cells_per_condition: int | None = None,
        include_control: bool = True,
        max_missing_genes: float = 0.1,
        num_steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AnnData:
        """Return predicted cells for control cells under perturbations.

        Parameters
        ----------
        adata
            Cells; the controls among them are used. ``.X`` holds integer counts, or log1p values
            on the model's own scale. Genes are matched by name. It is not changed.
        perturbation
            Label or labels to simulate; None = all that the model knows.
        dose
            Dose of every label in the unit of the training data, for models trained with doses.
        cell_type
            The context of all cells, for data without such a column.
        perturbation_key, cell_type_key, batch_key, library_key, control
            Columns of ``adata.obs`` and the control's label; None = as in training. Without a
            perturbation column all cells are taken as controls.
        cells_per_condition
            None = as many as ``adata`` has of that condition, else as it has controls.
        include_control
            Append the controls, unchanged, so that the result can be scored as it is.
        max_missing_genes
            Fraction of the model's genes that may be missing (they are set to 0).
        num_steps, guidance
            Steps of the sampler (None = as trained) and strength of guidance (1 = off).
        seed
            Of the choice of control cells, and of what the model draws.
        progress
            Called with (cells done, cells in all).

        Returns
        -------
        AnnData
            ``.X`` float32 CSR, log1p of counts per ``target_sum``, >= 0; ``.obs`` has the
            perturbation, cell type and batch under the input's column names, ``source_cell``
            (name of the control cell it started from) and ``seen_in_training``.

        Raises
        ------
        ValueError
            If a column, gene or label is not what the model expects; the message says which.
        """
        keys = QueryKeys(
            perturbation=perturbation_key,
            cell_type=cell_type_key,
            batch=batch_key,
            library=library_key,
            control=control,
        )
        labels = [perturbation] if isinstance(perturbation, str) else perturbation
        query = Query(self.vocabulary, adata, keys, cell_type, max_missing_genes)
        requests = query.requests(labels, dose, cells_per_condition)
        options = _Sampling(num_steps, guidance, seed, 8)
        blocks = list(self._stream(query.controls, requests, options, progress))
        if include_control:
            blocks.append(_control_block(query.controls, self.vocabulary.value_scale))
        return AnnData(
            X=sp.vstack([b.values for b in blocks], format="csr"),
            obs=query.rename(pd.concat([b.obs for b in blocks], ignore_index=True)),
            var=pd.DataFrame(index=list(self.genes)),
            uns={"scale": self._provenance(query, options)},
        )

    def write(
        self,
        path: Path,
        adata: AnnData,
        *,
        keys: QueryKeys,
        requests: Sequence[Request] | None = None,
        labels: Sequence[str] | None = None,
        cells_per_condition: int | None = None,
        include_control: bool = True,
        max_missing_genes: float = 0.1,
        num_steps: int | None = None,
        guidance: float = 1.0,
        sets_per_batch: int = 8,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> int:
        """Write predicted cells to an h5ad, one condition in memory at a time; return their number.

        ``adata`` may be backed. The file appears under ``path`` when it is complete. Parameters
        are those of :meth:`predict`; ``requests`` gives the conditions one by one instead.
        """
        query = Query(self.vocabulary, adata, keys, None, max_missing_genes)
        if requests is None:
            requests = query.requests(labels, None, cells_per_condition)
        options = _Sampling(num_steps, guidance, seed, sets_per_batch)
        with atomic_path(path) as temporary:
            writer = H5adWriter(temporary, self.genes)
            with writer:
                for block in self._stream(query.controls, requests, options, progress):
                    writer.append(block)
                if include_control:
                    writer.append(_control_block(query.controls, self.vocabulary.value_scale))
                writer.finish(query.rename, self._provenance(query, options))
        return writer.num_cells

    # --- inside -----------------------------------------------------------------------------------

    def _provenance(self, query: Query, options: _Sampling) -> dict[str, Any]:
        return {
            "version": package_version(),
            "weights_sha256": self.source_sha256,
            "target_sum": self.vocabulary.target_sum,
            "control": query.control,
            "seed": options.seed,
            "num_steps": self._num_steps(options),
            "guidance": options.guidance,
            "missing_genes": list(query.missing_genes),
            "feature_sha256": self.vocabulary.feature_sha256 or "",
        }

    def _num_steps(self, options: _Sampling) -> int:
        return self.model.objective.num_steps if options.num_steps is None else options.num_steps

    def _stream(
        self,
        controls: Controls,
        requests: Sequence[Request],
        options: _Sampling,
        progress: Progress | None,
    ) -> Iterator[Block]:
        total, done = sum(r.num_cells for r in requests), 0
        for request in requests:
            yield self._predict_condition(controls, request, options)
            done += request.num_cells
            if progress is not None:
                progress(done, total)

    def _predict_condition(self, controls: Controls, request: Request, options: _Sampling) -> Block:
        pool = pool_rows(controls, request, options.seed)
        set_size, num_summary = set_sizes(
            len(pool), self.model.config_sizes.set_size, self.model.config_sizes.num_summary_cells
        )
        num_sets = -(-request.num_cells // set_size)
        blocks, sources = [], []
        for first in range(0, num_sets, options.sets_per_batch):
            sets = np.arange(first, min(first + options.sets_per_batch, num_sets))
            # Consecutive cells of the pool's order, cyclically: none twice while the pool lasts,
            # and the summary draw follows the set, so that the two share no cell.
            start_B1 = (sets * set_size)[:, None]
            rows_BS = pool[(start_B1 + np.arange(set_size)) % len(pool)]
            rows_BU = pool[(start_B1 + set_size + np.arange(num_summary)) % len(pool)]
            batch = self._batch(controls, request, rows_BS, rows_BU, sets)
            with torch.no_grad():
                cells_BSG = self.model.sample(
                    batch,
                    num_steps=self._num_steps(options),
                    guidance=options.guidance,
                    seed=condition_seed(request, options.seed),
                )
            values = cells_BSG.float().clamp_(min=0).mul_(self.vocabulary.value_scale)
            blocks.append(sp.csr_matrix(values.flatten(0, 1).cpu().numpy()))
            sources.append(rows_BS.ravel())
        source = np.concatenate(sources)[: request.num_cells]
        seen = request.perturbation.without_units in self._seen
        return Block(
            sp.vstack(blocks, format="csr")[: request.num_cells],
            pd.DataFrame(
                {
                    "perturbation": request.label,
                    "cell_type": request.cell_type,
                    "batch": controls.obs["batch"].to_numpy()[source],
                    "dose": next((d for d in request.perturbation.doses), np.nan),
                    "source_cell": controls.obs.index.to_numpy()[source],
                    "is_control": False,
                    "seen_in_training": seen,
                }
            ),
        )

    def _batch(
        self,
        controls: Controls,
        request: Request,
        rows_BS: npt.NDArray[np.int64],
        rows_BU: npt.NDArray[np.int64],
        sets: npt.NDArray[np.int64],
    ) -> Batch:
        num_sets, device = len(sets), next(self.model.parameters()).device
        vocabulary = self.vocabulary

        def dense(rows: npt.NDArray[np.int64]) -> torch.Tensor:
            values = controls.values[rows.ravel()].toarray().reshape(*rows.shape, -1)
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

        def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_sets,), value, dtype=dtype)

        doses = [np.nan if c.dose is None else c.dose for c in request.perturbation.components]
        rows = torch.tensor(vocabulary.component_rows(request.perturbation))
        return Batch(
            control_BSG=dense(rows_BS),
            control_mask_BS=torch.ones(rows_BS.shape, dtype=torch.bool),
            summary_BUG=dense(rows_BU),
            summary_mask_BU=torch.ones(rows_BU.shape, dtype=torch.bool),
            treated_BSG=None,
            treated_mask_BS=None,
            control_library_BS=torch.from_numpy(controls.library[rows_BS]),
            treated_library_BS=None,
            component_BJ=rows.expand(num_sets, -1).contiguous(),
            dose_BJ=torch.tensor(doses, dtype=torch.float32).expand(num_sets, -1).contiguous(),
            cell_type_B=filled(_index(vocabulary.cell_types, request.cell_type), torch.int64),
            batch_B=filled(_index(vocabulary.batches, request.batch), torch.int64),
            is_control_B=torch.zeros(num_sets, dtype=torch.bool),
            condition_B=filled(ABSENT, torch.int64),
            set_index_B=torch.from_numpy(sets.astype(np.int64)),
        ).to(device)


def _index(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else ABSENT


def _control_block(controls: Controls, value_scale: float) -> Block:
    obs = pd.DataFrame(
        {
            "perturbation": None,
            "cell_type": controls.obs["cell_type"].to_numpy(),
            "batch": controls.obs["batch"].to_numpy(),
            "dose": np.nan,
            "source_cell": controls.obs.index.to_numpy(),
            "is_control": True,
            "seen_in_training": True,
        }
    )
    return Block((controls.values * value_scale).astype(np.float32), obs)
