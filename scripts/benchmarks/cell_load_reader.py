"""Sets of cells as cell-load 0.10.4 gives them; runs in cell-load's own environment.

Arguments of a reader: FILE.h5ad scattered|consecutive SETS_PER_BATCH

``PerturbationDataModule`` over a TOML with one dataset, sets of 256 treated cells of one (cell
line, drug), each with a control cell of the line (mapping ``random``, its default and its cheapest:
``batch`` copies the pool for every cell). X holds log-normalised values, so that it has nothing to
compute. Spared as well: barcodes, controls as targets, short sets (``drop_last``), processes.
The figures hold its sampler, dataset and collate function, up to the tensors of a batch.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from cell_load.data_modules import PerturbationDataModule
from cell_load.dataset import PerturbationDataset
from worker import fork_readers, serve

SET_SIZE = 256


def batches(file: Path, batch_size: int, *, is_consecutive: bool) -> Iterator[dict]:
    """Yield batches of one epoch after the other."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as toml:
        toml.write(f'[datasets]\nset = "{file}"\n[training]\nset = "train"\n')
        toml.flush()
        module = PerturbationDataModule(
            toml.name,
            batch_size=batch_size,
            num_workers=0,
            pert_col="drug",
            batch_col="plate",
            cell_type_key="cell_line",
            control_pert="DMSO_TF",
            output_space="all",
            basal_mapping_strategy="random",
            should_yield_control_cells=False,
            cell_sentence_len=SET_SIZE,
            drop_last=True,
            use_consecutive_loading=is_consecutive,
        )
        module.setup()
    loader = module.train_dataloader()
    while True:
        yield from loader


def main(arguments: list[str]) -> None:
    """Serve batches."""
    file, mode, batch_size = Path(arguments[0]), arguments[1], int(arguments[2])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    source = batches(file, batch_size, is_consecutive=mode == "consecutive")
    last: dict = {}

    def read(num_sets: int) -> int:
        cells = 0
        for _ in range(num_sets // batch_size):
            last.clear()
            last.update(next(source))
            cells += len(last["pert_cell_emb"]) + len(last["ctrl_cell_emb"])
        return cells

    def facts() -> dict[str, float]:
        values = last["pert_cell_emb"][:SET_SIZE]
        return {"mean": float(values.mean()), "nonzero": float((values > 0).float().mean())}

    # It keeps the last 10,000 rows. Controls are drawn from few cells here and from 46,000 of a
    # line in Tahoe-100M, so that rows kept from rounds before would flatter it.
    serve(read, facts, forget=PerturbationDataset._fetch_gene_expression_raw.cache_clear)


fork_readers(main)
