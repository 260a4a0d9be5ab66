"""The simulated atlas follows the law it declares."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from scale.data.simulate import CONTROL, SimulationConfig, simulate

SMALL = SimulationConfig(
    num_cells=3_000, num_lines=2, num_drugs=6, num_genes=120, num_inert=1, num_mechanisms=3
)


@pytest.fixture(scope="module")
def atlas():
    return simulate(SMALL)


def test_same_seed_same_cells_and_other_seed_other_cells(atlas):
    again, other = simulate(SMALL), simulate(SimulationConfig(num_cells=3_000, seed=1))
    assert (atlas.counts != again.counts).nnz == 0
    pd.testing.assert_frame_equal(atlas.obs, again.obs)
    assert atlas.counts.shape != other.counts.shape


def test_every_condition_has_cells_and_every_line_controls_on_each_plate(atlas):
    sizes = atlas.obs.groupby(["cell_line", "drug"]).size().unstack()
    assert sizes.notna().all().all()
    assert (sizes.drop(columns=CONTROL) >= 15).all().all()
    controls = atlas.obs[atlas.obs["drug"] == CONTROL].groupby(["cell_line", "plate"]).size()
    assert len(controls) == SMALL.num_lines * SMALL.num_plates


def test_mean_of_the_cells_is_the_true_mean():
    # No plate effect enters the truth, so one plate with its factor divided out is compared.
    config = SimulationConfig(
        num_cells=12_000, num_lines=1, num_drugs=4, num_genes=100, num_inert=1, num_plates=1
    )
    atlas = simulate(config)
    counts = np.asarray(atlas.counts.todense(), dtype=float)
    library = counts.sum(axis=1, keepdims=True)
    plate = np.exp(atlas.truth.plate_effect_G[0])
    for drug in [None, *atlas.drugs]:
        cells = (atlas.obs["drug"] == (drug or CONTROL)).to_numpy()
        fraction = counts[cells] / library[cells]
        expected = atlas.true_mean("LINE-A", drug) * plate
        expected /= expected.sum()
        error = fraction.std(axis=0) / np.sqrt(cells.sum())
        # plate normalisation is per sub-population: it moves means by far less than 4 %
        assert (np.abs(fraction.mean(axis=0) - expected) < 4.5 * error + 0.04 * expected).all()


def test_inert_drugs_leave_the_mean_alone_and_others_move_it(atlas):
    for drug, mechanism in zip(atlas.drugs, atlas.truth.mechanism_P, strict=True):
        moved = np.abs(atlas.true_mean("LINE-A", drug) - atlas.true_mean("LINE-A", None)).sum()
        assert (moved < 1e-12) if mechanism < 0 else (moved > 0.01)


def test_response_grows_with_dose():
    config = SimulationConfig(
        num_cells=3_000,
        num_lines=1,
        num_drugs=4,
        num_inert=1,
        num_genes=100,
        doses=(0.05, 0.5, 5.0),
    )
    atlas = simulate(config)
    drug = atlas.drugs[int(np.flatnonzero(atlas.truth.mechanism_P >= 0)[0])]
    control = atlas.true_mean("LINE-A", None)
    moved = [np.abs(atlas.true_mean("LINE-A", drug, d) - control).sum() for d in config.doses]
    assert moved[0] < moved[1] < moved[2]
    assert set(atlas.obs["dose"]) == {0.0, 0.05, 0.5, 5.0}


def test_tahoe_rows_hold_the_same_counts(atlas, tmp_path):
    atlas.write_tahoe_parquet(tmp_path, rows_per_file=1_000)
    files = sorted((tmp_path / "data").glob("*.parquet"))
    assert len(files) == -(-len(atlas.obs) // 1_000)
    samples = pd.read_parquet(tmp_path / "metadata" / "sample_metadata.parquet")
    genes = pd.read_parquet(tmp_path / "metadata" / "gene_metadata.parquet")
    rebuilt, start = np.zeros(atlas.counts.shape, dtype=np.int64), 0
    for file in files:
        table = pq.read_table(file).to_pylist()
        for offset, row in enumerate(table):
            assert (row["genes"][0], row["expressions"][0]) == (1, -2.0)
            rebuilt[start + offset, np.array(row["genes"][1:]) - 3] = row["expressions"][1:]
            cell = atlas.obs.iloc[start + offset]
            assert (row["drug"], row["cell_line_id"], row["plate"]) == (
                cell["drug"],
                cell["cell_line"],
                cell["plate"],
            )
            assert samples.loc[samples["sample"] == row["sample"], "drug"].item() == row["drug"]
        start += len(table)
    assert (rebuilt == atlas.counts.toarray()).all()
    assert genes["token_id"].min() == 3
    assert list(genes["gene_symbol"]) == atlas.genes


def test_part_has_the_named_cells_and_genes_with_their_controls(atlas):
    lines, drugs, genes = atlas.lines[1:], atlas.drugs[2:4], atlas.genes[100:20:-1]
    part = atlas.part(lines, drugs, genes)
    assert set(part.obs["cell_line"]) == set(lines)
    assert set(part.obs["drug"]) == {*drugs, CONTROL}
    assert list(part.var_names) == genes
    named = atlas.obs["cell_line"].isin(lines) & atlas.obs["drug"].isin([*drugs, CONTROL])
    assert list(part.obs_names) == list(atlas.obs.index[named])
    assert (atlas.counts[named.to_numpy()][:, 100:20:-1] != part.X).nnz == 0
    with pytest.raises(ValueError, match="'LINE-Z' is not in the atlas; it has 'LINE-A', ..."):
        atlas.part(["LINE-Z"], drugs, genes)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_inert"):
        SimulationConfig(num_drugs=3, num_inert=3)
    with pytest.raises(ValueError, match="fewer than 15 cells"):
        SimulationConfig(num_cells=1_000)
