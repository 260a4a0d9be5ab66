"""Virtual-cell models: train, apply and judge them.

>>> import scale
>>> model = scale.load("runs/mine")  # doctest: +SKIP
>>> predicted = model.predict(adata, perturbations=["drug A"])  # doctest: +SKIP
>>> report = scale.evaluate(  # doctest: +SKIP
...     predicted, observed, perturbation_key="drug", control="DMSO", cell_type_key="cell_line"
... )

Importing the package loads nothing heavy; each function imports what it needs when it is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# `scale.evaluate` is a package and a function. The package is imported first (its __init__ is only
# a docstring), because an import that came later would replace the function by the package.
import scale.evaluate  # noqa: F401

if TYPE_CHECKING:
    from anndata import AnnData

    from scale import plot
    from scale.config import FinetuneConfig, PrepareConfig, PretrainConfig, ProtocolConfig
    from scale.data.store import CellSetStore
    from scale.evaluate.report import Report
    from scale.predict.predictor import Predictor

    __version__: str

__all__ = [
    "__version__",
    "evaluate",
    "finetune",
    "load",
    "open_store",
    "plot",
    "prepare",
    "pretrain",
]


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
        Which checkpoint of a run: ``last`` or ``step_00001000``.
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

    Examples
    --------
    >>> predictor = scale.load("runs/mine")  # doctest: +SKIP
    >>> predicted = predictor.predict(adata, perturbations=["drug A"])  # doctest: +SKIP
    """
    from scale.predict import predictor

    return predictor.load(
        source,
        checkpoint=checkpoint,
        device=device,
        perturbation_features=perturbation_features,
    )


def open_store(path: str | Path, *, verify: Literal["index", "full"] = "index") -> CellSetStore:
    """Open a store that ``scale prepare`` has made.

    Parameters
    ----------
    path
        Directory of the store, or the address of a remote one as text (``https://...``).
    verify
        ``index`` checks the tables, ``full`` every byte.

    Raises
    ------
    StoreError
        If there is no store, or it is damaged.

    Examples
    --------
    >>> store = scale.open_store("data/toy")  # doctest: +SKIP
    >>> store.conditions.head()  # doctest: +SKIP
    """
    from scale.data.store import CellSetStore

    return CellSetStore.open(path, verify=verify)


def prepare(config: PrepareConfig) -> Path:
    """Make a store, as ``scale prepare`` does, and return its directory.

    Parameters
    ----------
    config
        Settings, most easily from ``scale.config.compose("prepare", [...], run_dir=...)``.
    """
    from scale.tasks.prepare import run

    config = _checked(config)
    _raise_for_status(run(config))
    return Path(config.store)


def pretrain(config: PretrainConfig) -> Path:
    """Train a model from scratch, as ``scale pretrain`` does, and return the run directory.

    Parameters
    ----------
    config
        Settings, most easily from ``scale.config.compose("pretrain", [...], run_dir=...)``.

    Examples
    --------
    >>> from scale.config import compose
    >>> config = compose("pretrain", ["trainer.max_steps=50"], run_dir="runs/mine")
    >>> run = scale.pretrain(config)  # doctest: +SKIP
    """
    from scale.runtime import StopSignal
    from scale.tasks.pretrain import run

    config = _checked(config)
    _raise_for_status(run(config, StopSignal()))
    return Path(config.run_dir)


def finetune(config: FinetuneConfig) -> Path:
    """Go on from a trained model, as ``scale finetune`` does, and return the run directory.

    Parameters
    ----------
    config
        Settings, most easily from ``scale.config.compose("finetune", [...], run_dir=...)``.
    """
    from scale.runtime import StopSignal
    from scale.tasks.finetune import run

    config = _checked(config)
    _raise_for_status(run(config, StopSignal()))
    return Path(config.run_dir)


def evaluate(
    predicted: AnnData | Path | str | Mapping[str, AnnData | Path | str],
    observed: AnnData | Path | str,
    *,
    perturbation_key: str,
    control: str,
    cell_type_key: str,
    unit_key: str | None = None,
    batch_key: str | None = None,
    train: AnnData | Path | str | None = None,
    protocol: ProtocolConfig | None = None,
    seed: int = 0,
) -> Report:
    """Return how well predicted cells match observed ones, beside baselines and a ceiling.

    Parameters
    ----------
    predicted
        Predicted cells (log1p values) as AnnData or the path of an h5ad, or method -> either.
    observed
        Observed cells of the same conditions, with control cells.
    perturbation_key, cell_type_key
        Columns of ``.obs``: what was done to a cell, and its context.
    control
        Label of the control in the column ``perturbation_key``.
    unit_key
        Column of the independent unit (cell line, donor) over which intervals are taken; None =
        the cell type.
    batch_key
        Column of the batch (plate) whose own control cells a condition is compared with; None =
        those of all batches.
    train
        Training cells with the controls of all contexts, for the baselines.
    protocol
        Rules; None = the strict ones.
    seed
        Of subsamples and halvings.

    Examples
    --------
    >>> report = scale.evaluate(  # doctest: +SKIP
    ...     predicted, observed, perturbation_key="drug", control="DMSO", cell_type_key="cell_line"
    ... )
    >>> report.save("report")  # doctest: +SKIP
    """
    from scale.evaluate import report

    return report.evaluate(
        predicted,
        observed,
        perturbation_key=perturbation_key,
        control=control,
        cell_type_key=cell_type_key,
        unit_key=unit_key,
        batch_key=batch_key,
        train=train,
        protocol=protocol,
        seed=seed,
    )


def _checked(config: Any) -> Any:
    """Return the settings with all checks run again, or raise naming what is missing."""
    from scale.config import check

    return check(config)


def _raise_for_status(status: int) -> None:
    from scale.runtime import EXIT_AGAIN

    if status not in (0, EXIT_AGAIN):  # stopped after trainer.max_hours is no error
        raise RuntimeError(f"the task ended with status {status}; its log says why")


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("scale.plot")
    if name == "__version__":
        from scale.runtime import package_version

        return package_version()
    raise AttributeError(f"module 'scale' has no attribute {name!r}")
