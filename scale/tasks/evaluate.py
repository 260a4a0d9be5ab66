"""``scale evaluate``: predicted cells against observed ones, beside baselines and a ceiling.

scale evaluate predicted=runs/predict/predicted.h5ad observed=data/mine split=mine.toml
scale evaluate 'predicted=[mine=a.h5ad,other=b.h5ad]' observed=observed.h5ad perturbation_key=drug \
    cell_type_key=cell_line control=DMSO
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scale.config import EvaluateConfig, to_yaml
from scale.data.remote import is_remote
from scale.data.split import Split
from scale.data.store import CellSetStore
from scale.evaluate.cells import CellSource
from scale.evaluate.protocol import run_protocol
from scale.evaluate.provenance import of_predictions
from scale.evaluate.report import Report
from scale.plot.curves import read_metrics
from scale.runtime import RunRecord, World, start_logging
from scale.tasks.evaluation_facts import command, of_store, of_training
from scale.tasks.held_out import held_out

logger = logging.getLogger(__name__)

DEFAULT_TARGET_SUM = 1e4
MOST_TRAINING_CELLS = 1_000_000
"""Training cells read for the baselines; beyond, an equal share of each condition is taken."""
FEWEST_OF_CONDITION = 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is compared, under which names."""

    observed: AnnData | CellSource
    train: AnnData | CellSource | None
    perturbation_key: str
    cell_type_key: str
    control: str
    facts: dict[str, Any]


def run(config: EvaluateConfig) -> int:
    """Write the report into the run directory and return the exit status."""
    run_dir = Path(config.run_dir)
    if (run_dir / "report.html").exists() and not config.overwrite:
        raise FileExistsError(
            f"{run_dir / 'report.html'} exists; give another name=, or overwrite=true"
        )
    start_logging(run_dir / "evaluate.log", World(0, 1, 0))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    with ExitStack() as files:
        paths = _predicted_paths(config.predicted)
        predicted = {name: _open_h5ad(path, "predicted", files) for name, path in paths.items()}
        made = of_predictions(paths)
        target_sum = config.protocol.normalize or _target_sum(predicted)
        inputs = _inputs(config, predicted, target_sum, files)
        record = RunRecord(run_dir, World(0, 1, 0), {"seed": config.seed, **inputs.facts})
        evaluation = run_protocol(
            predicted,
            inputs.observed,
            perturbation_key=inputs.perturbation_key,
            cell_type_key=inputs.cell_type_key,
            control=inputs.control,
            unit_key=config.unit_key,
            batch_key=config.batch_key,
            train=inputs.train,
            protocol=config.protocol,
            seed=config.seed,
            ignore_others=_is_store(config.observed),
            progress=logger.info,
        )
    curves = None if config.training_run is None else read_metrics(config.training_run)
    facts = {"target_sum": target_sum, "command": command(config), **made, **inputs.facts}
    report = Report(evaluation, training_metrics=curves, meta=facts)
    page = report.save(run_dir, overwrite=config.overwrite)
    record.close("done")
    print(report.table())
    print(f"report: {page}")
    return 0


# --- predictions --------------------------------------------------------------------------------


def _predicted_paths(texts: list[str]) -> dict[str, str]:
    """Method -> path from ``PATH`` or ``METHOD=PATH``; one file without a name is ``model``."""
    predicted: dict[str, str] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or Path(text).is_file() or "/" in name:
            name, path = ("model" if len(texts) == 1 else Path(text).stem), text
        if name in predicted:
            raise ValueError(f"two predictions are called {name!r}; write predicted=[NAME=PATH,..]")
        predicted[name] = path
    return predicted


def _open_h5ad(path: str, key: str, files: ExitStack) -> CellSource:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; set {key} to an h5ad")
    source = CellSource.of(path)
    files.callback(source.close)
    return source


def _target_sum(predicted: dict[str, CellSource]) -> float:
    """Return the counts per cell that the predictions were normalised to."""
    found = {
        name: DEFAULT_TARGET_SUM if source.target_sum is None else source.target_sum
        for name, source in predicted.items()
    }
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} {value:g}" for name, value in found.items())
        raise ValueError(f"predictions of different target sums ({told}); evaluate them apart")
    return next(iter(found.values()))


# --- observed and training cells ----------------------------------------------------------------


def _is_store(path: str | None) -> bool:
    return path is not None and (is_remote(path) or (Path(path) / "manifest.json").is_file())


def _inputs(
    config: EvaluateConfig,
    predicted: dict[str, CellSource],
    target_sum: float,
    files: ExitStack,
) -> Inputs:
    observed_store = CellSetStore.open(config.observed) if _is_store(config.observed) else None
    train_path = config.train
    if train_path is None and observed_store is not None:
        train_path = config.observed
    train_store = observed_store if train_path == config.observed else None
    if train_store is None and _is_store(train_path):
        train_store = CellSetStore.open(str(train_path))
    facts: dict[str, Any] = {}
    split = None
    if observed_store is not None or train_store is not None:
        file = _split_file(config)
        split = Split.read(file)
        facts = {"split": file.name, "split_sha256": split.sha256, "part": config.part}
    keys = _keys(config, observed_store or train_store)
    counts = config.protocol.normalize is not None
    observed: AnnData | CellSource
    train: AnnData | CellSource | None = None
    if train_store is not None and split is not None:
        train = _training(train_store, split, target_sum, counts=counts)
    elif train_path is not None:
        train = _open_h5ad(train_path, "train", files)
    if observed_store is not None and split is not None:
        cells = _held_out(observed_store, split, config.part, target_sum, counts=counts)
        observed, train = _same_genes(predicted, cells, train)
        facts["store_fingerprint"] = observed_store.fingerprint
    else:
        observed = _open_h5ad(config.observed, "observed", files)
    store = observed_store or train_store
    if store is not None and (dose := store.columns["dose"]) is not None:
        told_apart = [observed, *([train] if train is not None else []), *predicted.values()]
        keys["perturbation_key"] = _with_doses(told_apart, keys, dose)
    if store is not None:
        facts |= of_store(store)
        _tell_of_batches(observed, store.columns["batch"], config.batch_key)
    if config.training_run is not None:
        facts |= of_training(Path(config.training_run), store, split)
    facts["unit"] = config.unit_key or keys["cell_type_key"]
    return Inputs(observed, train, **keys, facts=facts)


def _tell_of_batches(observed: AnnData | CellSource, column: str | None, given: str | None) -> None:
    if column is None or given is not None or column not in observed.obs:
        return
    if (number := observed.obs[column].nunique()) > 1:
        logger.info(
            "observed cells are of %d batches, and compared with the control cells of all; "
            "batch_key=%s compares each condition with those of its own",
            number,
            column,
        )


def _split_file(config: EvaluateConfig) -> Path:
    if config.split is not None:
        return Path(config.split)
    if config.training_run is not None and (Path(config.training_run) / "split.toml").is_file():
        return Path(config.training_run) / "split.toml"
    raise ValueError("a store needs a split that says what was held out; give split=FILE.toml")


def _keys(config: EvaluateConfig, store: CellSetStore | None) -> dict[str, str]:
    """Column names and the control's label: as asked for, else as the store has them."""
    known: dict[str, str | None] = {
        "perturbation_key": config.perturbation_key,
        "cell_type_key": config.cell_type_key,
        "control": config.control,
    }
    if store is not None:
        for key, column in (("perturbation_key", "perturbation"), ("cell_type_key", "cell_type")):
            known[key] = known[key] or store.columns[column]
        known["control"] = known["control"] or store.control
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: an h5ad does not say; set each of them")
    return {name: str(value) for name, value in known.items()}


def _held_out(
    store: CellSetStore, split: Split, part: str, target_sum: float, *, counts: bool
) -> AnnData:
    """Observed cells of the part, with the controls of their cell types."""
    held = held_out(store, split, part)
    logger.info(
        "%d %s conditions of %d cell types, %d control conditions",
        *(len(held.treated), part, held.num_cell_types, len(held.controls)),
    )
    cells = store.to_anndata(sorted(held.treated + held.controls))
    return cells if counts else _normalised(cells, target_sum)


def _training(store: CellSetStore, split: Split, target_sum: float, *, counts: bool) -> AnnData:
    """Training cells and the controls of all cell types, for the baselines."""
    is_control = store.conditions["is_control"].to_numpy(dtype=bool)
    part = split.assign(store.conditions, store.perturbations, labels=store.labels)
    table = store.conditions[(part == "train") | is_control]
    most = None
    if int(table["num_cells"].sum()) > MOST_TRAINING_CELLS:
        most = max(FEWEST_OF_CONDITION, MOST_TRAINING_CELLS // len(table))
        logger.info("baselines are fitted on at most %d cells of each training condition", most)
    cells = store.to_anndata([int(i) for i in table.index], max_cells=most)
    return cells if counts else _normalised(cells, target_sum)


def _normalised(cells: AnnData, target_sum: float) -> AnnData:
    """Return log1p of counts per ``target_sum``; the counts stay in a layer.

    The total of a cell is over the library genes of the store, not over those that were kept.
    """
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    library = np.maximum(cells.obs["library"].to_numpy(np.float64), 1.0)
    factor = np.repeat(target_sum / library, np.diff(counts.indptr))
    data = np.log1p(counts.data * factor).astype(np.float32)
    cells.X = sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)
    cells.layers["counts"] = counts
    return cells


def _with_doses(tables: list[AnnData | CellSource], keys: dict[str, str], dose: str) -> str:
    """Tell the doses of a perturbation apart where there are several; return the column to use."""
    label = keys["perturbation_key"]
    observed = tables[0].obs
    treated = observed[observed[label].astype(str) != keys["control"]]
    doses = treated.groupby(treated[label].astype(str))[dose].nunique()
    if doses.max() <= 1 or any(dose not in table.obs for table in tables):
        return label
    name = f"{label}_at_{dose}"
    for table in tables:
        text = table.obs[label].astype(str)
        amount = table.obs[dose].map(lambda d: "" if pd.isna(d) else f" {float(d):g}").astype(str)
        table.obs[name] = text.where(text == keys["control"], text + amount)
    return name


def _same_genes(
    predicted: dict[str, CellSource], observed: AnnData, train: AnnData | CellSource | None
) -> tuple[AnnData, AnnData | CellSource | None]:
    """Cut the store's cells to the genes of the predictions, where the store has more."""
    genes = next(iter(predicted.values())).genes
    if len(genes) == observed.n_vars or not genes.isin(observed.var_names).all():
        return observed, train
    logger.info("scored on the %d genes of the predictions of %d", len(genes), observed.n_vars)
    if isinstance(train, AnnData):
        train = train[:, genes].copy() if genes.isin(train.var_names).all() else None
    return observed[:, genes].copy(), train
