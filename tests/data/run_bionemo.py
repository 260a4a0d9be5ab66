"""Runs what tests/data/test_bionemo.py compares with, in a process that has bionemo on its path.

run_bionemo.py FOLDER WORK: FOLDER is what scripts/bionemo_environment prints, WORK has the input.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.append(sys.argv[1])

from bionemo.core.data.multi_epoch_dataset import EpochIndex as BionemoIndex
from bionemo.core.data.multi_epoch_dataset import (
    IdentityMultiEpochDatasetWrapper,
    MultiEpochDatasetResampler,
)
from bionemo.scdl.io.single_cell_collection import SingleCellCollection
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from torch.utils.data import DistributedSampler

from scale.config import DataConfig
from scale.data.dataset import CellSetDataset
from scale.data.module import CellSetDataModule


def read(archive, output):
    """Write all that bionemo-scdl says of an archive, row by row."""
    dataset = SingleCellMemMapDataset(archive)
    rows = [dataset.get_row(i, return_obs_features=True) for i in range(len(dataset))]
    names = list(dataset.obs_features()._feature_arr[0])
    pd.DataFrame([obs for _, _, obs in rows], columns=names).to_parquet(output + ".obs.parquet")
    genes = pd.DataFrame(dataset.var_features()._feature_arr[0])
    genes.to_parquet(output + ".var.parquet")
    np.savez(
        output + ".npz",
        size=[len(values) for (values, _), _, _ in rows],
        values=np.concatenate([values for (values, _), _, _ in rows]),
        columns=np.concatenate([columns for (_, columns), _, _ in rows]),
        shape=[dataset.number_of_rows(), *dataset.number_of_variables()],
    )


def make(folder, *h5ads):
    """Write archives of single files, two joined by hand, and one flattened from a collection."""
    kinds = ("uint8", "uint16")
    singles = [
        SingleCellMemMapDataset(
            folder / f"single{i}.scdl", h5ad_path=str(h5ad), data_dtype=kinds[i], use_X_not_raw=True
        )
        for i, h5ad in enumerate(h5ads)
    ]
    singles[0].concat(singles[1:], output_path=folder / "joined.scdl")
    # joined after it was opened again, an archive keeps the header that it had before
    again = SingleCellMemMapDataset(folder / "single1.scdl")
    again.concat(singles[1], output_path=folder / "twice.scdl")
    collection = SingleCellCollection(folder / "collection")
    for h5ad in h5ads:
        collection.load_h5ad(h5ad, use_X_not_raw=True)
    collection.flatten(folder / "flattened.scdl")


def epochs(store, output):
    """Walk over the sets of a store in the ways of bionemo-core."""
    config = DataConfig(store=store, minimum_control_cells=2)
    module = CellSetDataModule(config, set_size=32, num_summary_cells=8, seed=7)
    dataset = CellSetDataset(module)
    resampled = MultiEpochDatasetResampler(dataset, num_epochs=3, seed=11)
    batches = [resampled[i] for i in range(len(resampled))]
    plain = MultiEpochDatasetResampler(dataset, num_samples=len(dataset) + 5, shuffle=False)
    ranks = [
        [int(resampled[i].set_index_B[0]) for i in DistributedSampler(resampled, 2, rank, False)]
        for rank in range(2)
    ]
    wrapped = MultiEpochDatasetResampler(IdentityMultiEpochDatasetWrapper(dataset), num_epochs=2)
    direct = [dataset[BionemoIndex(int(n) // len(dataset), int(n) % len(dataset))] for n in (0, 45)]
    np.savez(
        output,
        length=len(dataset),
        number=[int(batch.set_index_B[0]) for batch in batches],
        treated=np.concatenate([batch.treated_BSG.numpy() for batch in batches]),
        control=np.concatenate([batch.control_BSG.numpy() for batch in batches]),
        plain=[int(plain[i].set_index_B[0]) for i in range(len(plain))],
        ranks=ranks,
        wrapped=[int(wrapped[i].set_index_B[0]) for i in range(len(wrapped))],
        direct=[int(batch.set_index_B[0]) for batch in direct],
    )
    module.close()


if __name__ == "__main__":
    work = Path(sys.argv[2])
    read(work / "store.scdl", str(work / "read"))
    make(work, work / "0.h5ad", work / "1.h5ad")
    epochs(str(work / "store"), work / "epochs.npz")
