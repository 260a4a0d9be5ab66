"""``scale predict``: cells of a query, or of the held-out part of a store, under perturbations.

scale predict checkpoint=runs/mine input=cells.h5ad 'perturbations=[drug A,drug B]'
scale predict checkpoint=runs/mine store=data/mine
scale predict checkpoint=runs/mine input=cells.h5ad 'perturbations=[new drug]' \
    perturbation_features=runs/new/features.npz
"""

import logging
from functools import partial
from pathlib import Path

import anndata as ad
import pandas as pd

from scale.config import PredictConfig, to_yaml
from scale.data.split import Split
from scale.data.store import CellSetStore
from scale.predict.predictor import Predictor, load
from scale.predict.query import QueryKeys, Request
from scale.runtime import RunRecord, World, start_logging
from scale.tasks.held_out import held_out
from scale.tasks.progress import CellProgress
from scale.types import Perturbation

logger = logging.getLogger(__name__)


def run(config: PredictConfig) -> int:
    """Write ``predicted.h5ad`` and return the exit status."""
    run_dir = Path(config.run_dir)
    output = Path(config.output) if config.output else run_dir / "predicted.h5ad"
    if output.exists() and not config.overwrite:
        raise FileExistsError(f"{output} exists; give another name=, or overwrite=true")
    for file in (config.input, config.conditions):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"no file {file}")
    start_logging(run_dir / "predict.log", World(0, 1, 0))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    record = RunRecord(run_dir, World(0, 1, 0), {"checkpoint": config.checkpoint})
    predictor = load(
        config.checkpoint,
        device=config.device.value,
        perturbation_features=config.perturbation_features,
    )
    logger.info("%r", predictor)
    requests: list[Request] | None
    if config.store is not None:
        adata, requests = _held_out(config)
    else:
        adata = ad.read_h5ad(str(config.input), backed="r")
        requests = _listed(config, predictor)
    num_cells = predictor.write(
        output,
        adata,
        keys=QueryKeys(
            perturbation=config.perturbation_key,
            cell_type=config.cell_type_key,
            batch=config.batch_key,
            library="library" if config.store is not None else config.library_key,
            control=config.control,
        ),
        requests=requests,
        labels=config.perturbations or None,
        cells_per_condition=config.cells_per_condition,
        include_control=config.include_control,
        max_missing_genes=config.max_missing_genes,
        num_steps=config.num_steps,
        guidance=config.guidance,
        sets_per_batch=config.sets_per_batch,
        seed=config.seed,
        progress=partial(CellProgress(), "predict"),
    )
    record.close("done", num_cells=num_cells)
    print(f"{num_cells:,} cells written to {output}")
    return 0


def _held_out(config: PredictConfig) -> tuple[ad.AnnData, list[Request]]:
    """Controls of a store, and one request per condition of the split's part."""
    store = CellSetStore.open(str(config.store))
    split = Split.read(_split_file(config))
    held = held_out(store, split, config.part)
    table, requests = store.conditions.loc[held.treated], []
    columns = (held.treated, table["perturbation"].tolist(), table["num_cells"].tolist())
    for number, perturbation, num_cells in zip(*columns, strict=True):
        condition = store.condition(number)
        requests.append(
            Request(
                condition.cell_type,
                condition.batch,
                condition.perturbation,
                store.labels[perturbation],
                config.cells_per_condition or num_cells,
            )
        )
    return store.to_anndata(held.controls), requests


def _split_file(config: PredictConfig) -> Path:
    """The split that was asked for, or the copy that the training run keeps."""
    if config.split is not None:
        return Path(config.split)
    for folder in [Path(config.checkpoint), *Path(config.checkpoint).parents]:
        if (folder / "split.toml").is_file():
            return folder / "split.toml"
    raise ValueError(f"{config.checkpoint} was trained without a split; give split=FILE.toml")


def _listed(config: PredictConfig, predictor: Predictor) -> list[Request] | None:
    """Requests of a table of conditions, or None where all combinations are wanted."""
    if config.conditions is None:
        return None
    table = pd.read_csv(config.conditions, sep="\t", dtype={"cell_type": str, "perturbation": str})
    missing = {"cell_type", "perturbation"} - set(table.columns)
    if missing:
        raise ValueError(
            f"{config.conditions} lacks the columns {', '.join(sorted(missing))}; it has "
            f"{', '.join(table.columns)}"
        )
    if "num_cells" not in table and config.cells_per_condition is None:
        raise ValueError(
            f"{config.conditions} has no column num_cells; add it, or set cells_per_condition"
        )
    requests = []
    for row in table.to_dict("records"):
        dose = row.get("dose")
        perturbation = Perturbation.parse(
            row["perturbation"],
            dose=None if pd.isna(dose) else float(dose),
            separator=predictor.vocabulary.separator,
        )
        predictor.vocabulary.component_rows(perturbation)
        size = config.cells_per_condition or int(row["num_cells"])
        requests.append(Request(row["cell_type"], None, perturbation, row["perturbation"], size))
    return requests
