"""Rows of Tahoe-100M: what a plain reading of them says is what the store holds."""

import ast
from collections import Counter
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from scale.config import SourceFormat, compose
from scale.data.ingest.h5ad import H5adSource
from scale.data.ingest.identity import describe_identity
from scale.data.ingest.prepare import prepare
from scale.data.ingest.sources import make_sources
from scale.data.ingest.tahoe import TahoeSource
from scale.data.ingest.tahoe_tables import TahoeTables
from scale.data.simulate import SimulationConfig, simulate
from scale.data.store import CellSetStore
from scale.data.store_rows import StoreRows
from scale.data.tahoe import ROW_SCHEMA, write_tahoe_parquet
from scale.types import Perturbation, SourceError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tahoe100m_metadata"
NUM_GENES = 40
LINES = ("CVCL_0023", "CVCL_0480")
# sample -> drug, dose, plate; blanks and the solvate as in the tables of the dataset
SAMPLES = {
    "smp_1": ("DMSO_TF", 0.0, "plate1"),
    "smp_2": ("DMSO_TF", 0.0, "plate2"),
    "smp_3": ("Erdafitinib ", 0.05, "plate1"),
    "smp_4": ("Erdafitinib ", 5.0, "plate2"),
    "smp_5": ("Selinexor", 0.5, "plate1"),
    "smp_6": ("Trametinib (DMSO_TF solvate)", 0.5, "plate2"),
}


def make_rows(num_cells=600, seed=0):
    """Rows as Python values; every cell can be told from every other by its first count."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_cells):
        sample = f"smp_{1 + i * len(SAMPLES) // num_cells}"  # rows of a sample are adjacent
        genes = np.flatnonzero(rng.random(NUM_GENES) < 0.3)
        genes = genes[genes > 0] if i % 50 else np.empty(0, int)
        tokens = [1, 3, *(genes + 3).tolist()]
        values = [-2.0, float(i + 1), *rng.integers(1, 9, len(genes)).astype(float).tolist()]
        rows.append(
            {
                "genes": tokens,
                "expressions": values,
                "drug": SAMPLES[sample][0],
                "sample": sample,
                "BARCODE_SUB_LIB_ID": f"{i % 100:02d}_{i // 100:03d}_{seed:03d}-lib_1105",
                "cell_line_id": LINES[rng.integers(2)],
                "moa-fine": None if i % 3 else "unclear",
                "canonical_smiles": None,
                "pubchem_cid": None if i % 2 else "1923.0",
                "plate": SAMPLES[sample][2],
            }
        )
    return rows


def write_rows(path, rows, *, rows_per_group=100, schema=ROW_SCHEMA, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=rows_per_group, **options)
    return path


def make_tables(**changes):
    """The tables of the metadata folder; the genes not in the order of their tokens."""
    tables = {
        "gene_metadata": pd.DataFrame(
            {
                "gene_symbol": [f"gene{g}" for g in range(NUM_GENES)],
                "ensembl_id": [f"ENSG{g:011d}" for g in range(NUM_GENES)],
                "token_id": np.arange(NUM_GENES) + 3,
            }
        ).iloc[::-1],
        "sample_metadata": pd.DataFrame(
            {
                "sample": list(SAMPLES),
                "plate": [plate for _, _, plate in SAMPLES.values()],
                "mean_gene_count": np.arange(len(SAMPLES)) + 0.5,
                "drug": [drug for drug, _, _ in SAMPLES.values()],
                "drugname_drugconc": [repr([(d, x, "uM")]) for d, x, _ in SAMPLES.values()],
            }
        ),
        "cell_line_metadata": pd.DataFrame(
            {
                "cell_name": ["A549", "A549", "PANC-1"],
                "Cell_ID_Cellosaur": ["CVCL_0023", "CVCL_0023", "CVCL_0480"],
                "Driver_Gene_Symbol": ["KRAS", "CDKN2A", "KRAS"],
            }
        ),
    }
    return tables | changes


def write_tables(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in make_tables(**changes).items():
        if table is not None:
            table.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def source_of(tmp_path, rows, **options):
    return TahoeSource(
        write_rows(tmp_path / "rows.parquet", rows, **options), write_tables(tmp_path / "tables")
    )


def read(source, start=0, stop=None):
    with source.open() as file:
        return file.rows("expressions", start, file.num_cells if stop is None else stop)


def brute_counts(rows, num_genes=NUM_GENES):
    """Counts by a loop over Python values: the rule of the schema, spelt out."""
    counts = np.zeros((len(rows), num_genes))
    for i, row in enumerate(rows):
        for token, value in zip(row["genes"], row["expressions"], strict=True):
            if token >= 3:
                counts[i, token - 3] += value
    return counts


def settings(tmp_path, *overrides, files="rows/*.parquet"):
    given = (f"source.files={tmp_path}/{files}", f"source.metadata={tmp_path}/tables")
    fixed = ("genes=all", "minimum_cells=1", f"store={tmp_path}/store")
    everything = ("source=tahoe_parquet", *given, *fixed, *overrides)
    return compose("prepare", everything, run_dir=tmp_path / "run")


def cells_of(path):
    """Multiset of (cell type, perturbation, batch, is control, barcode, library, counts)."""
    with CellSetStore.open(path, verify="full") as store:
        rows = StoreRows(store)
        cells, code_N = rows.read(0, rows.num_cells)
        shape = (rows.num_cells, store.num_genes)
        matrix = sp.csr_matrix((cells.counts_M, cells.indices_M, cells.indptr_P), shape)
        conditions = [store.condition(c) for c in rows.place(0, rows.num_cells)[0].tolist()]
        return Counter(
            (c.cell_type, c.perturbation, batch, bool(c.is_control), barcode, library, tuple(row))
            for c, batch, barcode, library, row in zip(
                conditions,
                rows.cells.batch_names(code_N).tolist(),
                rows.barcodes(0, rows.num_cells).tolist(),
                cells.library_N.tolist(),
                matrix.toarray().tolist(),
                strict=True,
            )
        )


def brute_cells(files, tables):
    """The same, read from the files with nothing but Python."""
    samples = {
        s["sample"]: s for s in pq.read_table(tables / "sample_metadata.parquet").to_pylist()
    }
    found = Counter()
    for file in files:
        rows = pq.read_table(file).to_pylist()
        for row, counts in zip(rows, brute_counts(rows).astype(int).tolist(), strict=True):
            sample = samples[row["sample"].strip()]
            ((drug, dose, unit),) = ast.literal_eval(sample["drugname_drugconc"])
            assert drug.strip() == row["drug"].strip()
            label = repr([(drug.strip(), dose, unit)])
            found[
                row["cell_line_id"],
                Perturbation.parse(label),
                row["plate"],
                drug == "DMSO_TF",
                row["BARCODE_SUB_LIB_ID"],
                sum(counts),
                tuple(counts),
            ] += 1
    return found


# --- the whole way -------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_store_holds_what_a_plain_reading_of_the_rows_says(tmp_path, compression):
    rows = make_rows()
    for row in rows[::7]:
        row["drug"] = row["drug"].strip() if row["drug"].endswith(" ") else row["drug"] + "  "
    parts = (rows[:250], rows[250:])
    files = [
        write_rows(tmp_path / "rows" / f"{i}.parquet", part, compression=compression)
        for i, part in enumerate(parts)
    ]
    tables = write_tables(tmp_path / "tables")
    report = prepare(settings(tmp_path))
    expected = brute_cells(files, tables)
    assert sum(expected.values()) == report.num_cells == 600
    assert cells_of(tmp_path / "store") == expected
    solvate = [key for key in expected if "solvate" in key[1].label]
    assert solvate
    assert not any(key[3] for key in solvate)
    with CellSetStore.open(tmp_path / "store") as store:
        assert store.genes.symbols == tuple(f"gene{g}" for g in range(NUM_GENES))
        assert store.genes.ensembl_ids == tuple(f"ENSG{g:011d}" for g in range(NUM_GENES))
        assert {"drugname_drugconc", "cell_line_id", "plate"} <= set(store.columns.values())


def test_plate_h5ad_and_rows_of_the_same_cells_make_the_same_store(tmp_path):
    rows = make_rows()
    left_out = [{**row, "BARCODE_SUB_LIB_ID": f"low {i}"} for i, row in enumerate(rows[:60])]
    write_rows(tmp_path / "rows" / "0.parquet", rows)
    write_tables(tmp_path / "tables")
    obs = pd.DataFrame(
        {
            # the labels as the plates have them: blanks included, some columns categories
            "drugname_drugconc": pd.Categorical(
                [repr([(r["drug"], SAMPLES[r["sample"]][1], "uM")]) for r in rows + left_out]
            ),
            "cell_line_id": [row["cell_line_id"] for row in rows + left_out],
            "plate": pd.Categorical([row["plate"] for row in rows + left_out]),
            "pass_filter": ["full"] * len(rows) + ["minimal"] * len(left_out),
        },
        index=[row["BARCODE_SUB_LIB_ID"] for row in rows + left_out],
    )
    var = pd.DataFrame(index=[f"gene{g}" for g in range(NUM_GENES)])
    var["ensembl_id"] = [f"ENSG{g:011d}" for g in range(NUM_GENES)]
    counts = sp.csr_matrix(brute_counts(rows + left_out).astype(np.float32))
    plate = ad.AnnData(counts, obs=obs, var=var)
    plate.write_h5ad(tmp_path / "plate1.h5ad", compression="gzip")
    prepare(settings(tmp_path))
    prepare(
        compose(
            "prepare",
            [
                *("experiment=prepare_tahoe", f"source.files={tmp_path}/plate*.h5ad"),
                *("genes=all", "minimum_cells=1", f"store={tmp_path}/plates"),
            ],
            run_dir=tmp_path / "run",
        )
    )
    assert cells_of(tmp_path / "plates") == cells_of(tmp_path / "store")


def test_everyday_names_of_cell_lines_may_be_the_contexts(tmp_path):
    write_rows(tmp_path / "rows" / "0.parquet", make_rows(120))
    write_tables(tmp_path / "tables")
    config = settings(tmp_path, "columns.cell_type=cell_name")
    config.where = {"moa-fine": ["unclear"]}
    prepare(config)
    found = cells_of(tmp_path / "store")
    assert {key[0] for key in found} == {"A549", "PANC-1"}
    assert sum(found.values()) == 40


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_group", [7, 33, 100, 1000])
def test_any_range_of_rows_is_what_a_plain_reading_says(tmp_path, rows_per_group):
    rows = make_rows(300)
    expected = brute_counts(rows)
    rng = np.random.default_rng(0)
    ranges = [(0, 300), (299, 300), (0, 1), (50, 130), (130, 131), (131, 250), (240, 245)]
    ranges += [tuple(sorted(rng.choice(301, 2, replace=False).tolist())) for _ in range(40)]
    with source_of(tmp_path, rows, rows_per_group=rows_per_group).open() as file:
        for start, stop in ranges:
            found = file.rows("expressions", start, stop)
            assert found.has_sorted_indices
            assert (found.toarray() == expected[start:stop]).all(), (start, stop)
            names = [row["BARCODE_SUB_LIB_ID"] for row in rows[start:stop]]
            assert file.barcodes(start, stop).tolist() == names


def test_adjacent_ranges_are_decoded_once(tmp_path):
    rows = make_rows(500)
    decoded = []

    class Recorded(pq.ParquetFile):
        def iter_batches(self, *arguments, **options):
            for batch in super().iter_batches(*arguments, **options):
                decoded.append(batch.num_rows)
                yield batch

    source = source_of(tmp_path, rows)
    with source.open() as file, Recorded(source.path) as recorded:
        file._rows._parquet = recorded
        for start in range(0, 500, 30):
            file.rows("expressions", start, min(start + 30, 500))
    assert sum(decoded) == 500


def test_rows_of_very_different_sizes_fit(tmp_path):
    rows = make_rows(60)
    for row in rows[:40]:
        row["genes"], row["expressions"] = [1], [-2.0]
    found = read(source_of(tmp_path, rows), 35, 60)
    assert (found.toarray() == brute_counts(rows)[35:]).all()


def test_memory_does_not_grow_with_the_file_or_the_number_of_files(tmp_path):
    def most_bytes(num_cells):
        counts = sp.random(num_cells, 3_000, 0.1, "csr", rng=np.random.default_rng(0))
        counts.data = np.ceil(counts.data * 50)
        obs = pd.DataFrame({"drug": "x", "dose": 0.5, "plate": "p", "cell_line": ["c"] * num_cells})
        genes = [f"gene{g}" for g in range(3_000)]
        folder = tmp_path / str(num_cells)
        write_tahoe_parquet(folder, counts, obs, genes, {}, rows_per_group=num_cells)
        (file,) = (folder / "data").glob("*.parquet")
        at_start, most = pa.total_allocated_bytes(), 0
        for _ in range(2):
            with TahoeSource(file, folder / "metadata").open() as opened:
                for start in range(0, num_cells, 500):
                    opened.rows("expressions", start, start + 500)
                    most = max(most, pa.total_allocated_bytes() - at_start)
        del opened
        assert pa.total_allocated_bytes() == at_start
        return most

    assert most_bytes(10_000) < 1.2 * most_bytes(2_000)


@pytest.mark.parametrize(
    ("genes", "values"),
    [
        ([3, 9], [4.0, 1.0]),  # no marker
        ([3, 1, 9], [4.0, -2.0, 1.0]),  # marker elsewhere
        ([1, 0, 2, 3, 9], [-2.0, -1.0, -7.0, 4.0, 1.0]),  # several
        ([9, 1, 3], [1.0, -2.0, 4.0]),  # unsorted
        ([1, 9, 3], [-2.0, 1.0, 4.0]),
    ],
)
def test_markers_are_dropped_and_tokens_sorted(tmp_path, genes, values):
    rows = make_rows(5)
    rows[2] |= {"genes": genes, "expressions": values}
    found = read(source_of(tmp_path, rows))
    assert found.has_sorted_indices
    assert found[2].indices.tolist() == [0, 6]
    assert found[2].data.tolist() == [4.0, 1.0]


@pytest.mark.parametrize("genes", [[], [1]])
def test_cells_without_counts_are_left_out_and_counted(tmp_path, genes):
    rows = make_rows(60)
    rows[4] |= {"genes": genes, "expressions": [-2.0] * len(genes)}
    write_rows(tmp_path / "rows" / "0.parquet", rows)
    write_tables(tmp_path / "tables")
    report = prepare(settings(tmp_path))
    assert (report.num_cells, report.dropped) == (59, {"no counts": 1})


@pytest.mark.parametrize(
    ("genes", "values", "message"),
    [
        ([2, 3], [0.0, 1.0], r"entry 0 has token 2 with value 0; tokens below 3 are markers"),
        ([1, 3], [5.0, 1.0], r"entry 0 has token 1 with value 5; tokens below 3 are markers"),
        ([1, 43], [-2.0, 1.0], r"entry 1 has token 43, which is no gene; .*40 tokens from 3 to 42"),
        ([1, 10**12], [-2.0, 1.0], r"entry 1 has token 1000000000000, which is no"),
        ([1, 3, 4], [-2.0, 1.0], r"3 genes but 2 expressions; expected lists of one length"),
        ([1, 3, 3], [-2.0, 1.0, 1.0], r"gene 'gene0' \(token 3\) stands more than once"),
        ([1, 5, 3, 5], [-2.0, 1.0, 1.0, 2.0], r"gene 'gene2' \(token 5\) stands more than once"),
        ([1, 4], [-2.0, 1.5], r"gene 'gene1' \(token 4\) has value 1.5; expected counts"),
        ([1, 4], [-2.0, -1.0], r"gene 'gene1' \(token 4\) has value -1; expected counts"),
        ([1, 4], [-2.0, 0.0], r"gene 'gene1' \(token 4\) has value 0; expected counts"),
        ([1, 4], [-2.0, np.nan], r"gene 'gene1' \(token 4\) has value nan; expected counts"),
        (None, [-2.0, 1.0], r"genes is missing or has a missing entry \(null\)"),
        ([1, 4], None, r"expressions is missing or has a missing entry \(null\)"),
        ([1, None], [-2.0, 1.0], r"genes is missing or has a missing entry \(null\)"),
        ([1, 4], [-2.0, None], r"expressions is missing or has a missing entry \(null\)"),
    ],
)
def test_a_row_that_is_no_list_of_counts_is_refused(tmp_path, genes, values, message):
    rows = make_rows(250)
    rows[123] |= {"genes": genes, "expressions": values}
    source = source_of(tmp_path, rows)
    with pytest.raises(SourceError, match=rf"rows.parquet: row group 1, row 123: {message}"):
        read(source)
    with pytest.raises(SourceError, match=rf"row group 1, row 123: {message}"):
        read(source, 100, 130)
    assert read(source, 124).shape == (126, NUM_GENES)


@pytest.mark.parametrize("value", [np.inf, 2.0**24 + 2])
def test_counts_that_no_store_can_hold_are_refused(tmp_path, value):
    rows = make_rows(60)
    rows[7] |= {"genes": [1, 5], "expressions": [-2.0, value]}
    write_rows(tmp_path / "rows" / "0.parquet", rows)
    write_tables(tmp_path / "tables")
    with pytest.raises(SourceError, match=r"row 7, gene 'gene2' is (inf|1.67772e\+07)"):
        prepare(settings(tmp_path))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", [pa.large_list, pa.list_])
def test_other_types_of_lists_and_numbers_are_read(tmp_path, kind):
    schema = ROW_SCHEMA.set(0, pa.field("genes", kind(pa.int32())))
    schema = schema.set(1, pa.field("expressions", kind(pa.float64())))
    rows = make_rows(40)
    found = read(source_of(tmp_path, rows, schema=schema))
    assert (found.toarray() == brute_counts(rows)).all()


def test_tokens_may_have_gaps(tmp_path):
    table = make_tables()["gene_metadata"].sort_values("token_id")
    write_tables(tmp_path / "tables", gene_metadata=table.drop(index=[5, 6]))
    rows = [{**row, "genes": [t for t in row["genes"] if t not in (8, 9)]} for row in make_rows(20)]
    for row in rows:
        row["expressions"] = row["expressions"][: len(row["genes"])]
    path = write_rows(tmp_path / "rows.parquet", rows)
    found = read(TahoeSource(path, tmp_path / "tables")).toarray()
    assert (found == np.delete(brute_counts(rows), [5, 6], axis=1)).all()
    rows[3] |= {"genes": [1, 9], "expressions": [-2.0, 1.0]}
    write_rows(path, rows)
    with pytest.raises(SourceError, match=r"row 3: entry 1 has token 9, which is no gene"):
        read(TahoeSource(path, tmp_path / "tables"))


# --- columns and joins ---------------------------------------------------------------------------


def texts_of(source, name):
    with source.open() as file:
        column = file.column(name, "columns.x")
    return [None if code < 0 else column.names[code] for code in column.codes_N.tolist()]


def test_columns_are_those_of_the_rows_and_of_the_tables(tmp_path):
    rows = make_rows(90)
    rows[5]["sample"] = " smp_1 "
    source = source_of(tmp_path, rows)
    with source.open() as file:
        assert set(file.columns) == (set(ROW_SCHEMA.names) - {"genes", "expressions"}) | {
            *("drugname_drugconc", "mean_gene_count", "cell_name")
        }
        assert len(file.columns) == len(set(file.columns))
        number = {f"smp_{i + 1}": i + 0.5 for i in range(len(SAMPLES))}
        expected = [number[row["sample"].strip()] for row in rows]
        assert file.numbers("mean_gene_count", "where").tolist() == expected
        cid = [np.nan if row["pubchem_cid"] is None else 1923.0 for row in rows]
        np.testing.assert_array_equal(file.numbers("pubchem_cid", "where"), cid)
    for name in ("drug", "moa-fine", "plate", "cell_line_id", "canonical_smiles"):
        assert texts_of(source, name) == [row[name] for row in rows]
    labels = [Perturbation.parse(text).label for text in texts_of(source, "drugname_drugconc")]
    assert labels == [
        repr([(drug.strip(), dose, "uM")])
        for drug, dose, _ in (SAMPLES[row["sample"].strip()] for row in rows)
    ]
    names = dict(zip(LINES, ("A549", "PANC-1"), strict=True))
    assert texts_of(source, "cell_name") == [names[row["cell_line_id"]] for row in rows]


def test_a_missing_sample_is_missing_in_what_is_joined(tmp_path):
    rows = make_rows(30)
    rows[4]["sample"] = None
    assert texts_of(source_of(tmp_path, rows), "drugname_drugconc")[4] is None
    write_rows(tmp_path / "rows" / "0.parquet", rows)
    with pytest.raises(SourceError, match=r"drugname_drugconc.*is missing \(NaN\) for 1 of 30"):
        prepare(settings(tmp_path))


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            {"sample": "smp_33"},
            "drugname_drugconc",
            r"1 sample are not in .*sample_metadata.parquet, as 'smp_33' \(did you mean 'smp_3'",
        ),
        (
            {"drug": "Selinexor "},
            "drugname_drugconc",
            r"row 8 of sample 'smp_2' has drug 'Selinexor ', but .*has 'DMSO_TF'",
        ),
        (
            {"plate": "plate9"},
            "mean_gene_count",
            r"row 8 of sample 'smp_2' has plate 'plate9', but .*has 'plate2'",
        ),
        (
            {"cell_line_id": "CVCL_0024"},
            "cell_name",
            r"1 cell_line_id are not in .*cell_line_metadata.parquet, as 'CVCL_0024'",
        ),
        ({}, "drugname_drugconk", r"no column 'drugname_drugconk' in .*'drugname_drugconc'"),
    ],
)
def test_rows_that_the_tables_do_not_fit_are_refused(tmp_path, change, name, message):
    rows = make_rows(30)
    rows[8] |= change
    with pytest.raises(SourceError, match=message):
        texts_of(source_of(tmp_path, rows), name)


def test_names_that_stand_for_two_cell_lines_are_refused(tmp_path):
    for other, message in (
        (
            ["A549", "A549", "A549"],
            r"cell_name 'A549' has 2 Cell_ID_Cellosaur: CVCL_0023, CVCL_0480",
        ),
        (
            ["A549", "A-549", "PANC-1"],
            r"Cell_ID_Cellosaur 'CVCL_0023' has 2 cell_name: A-549, A549",
        ),
    ):
        table = make_tables()["cell_line_metadata"].assign(cell_name=other)
        source = source_of(tmp_path, make_rows(30))
        write_tables(tmp_path / "tables", cell_line_metadata=table)
        with pytest.raises(SourceError, match=message):
            texts_of(source, "cell_name")
        assert texts_of(source, "cell_line_id")


# --- files and tables that cannot be used --------------------------------------------------------


def test_missing_tables_are_named_with_where_they_come_from(tmp_path):
    write_rows(tmp_path / "rows" / "0.parquet", make_rows(30))
    config = settings(tmp_path)
    with pytest.raises(SourceError, match=r"no such folder; .*tahoebio/Tahoe-100M"):
        make_sources(config)
    config.source.metadata = None
    with pytest.raises(SourceError, match=r"source.metadata is not given; .*gene_metadata.parquet"):
        make_sources(config)
    config.source.metadata = str(tmp_path / "tables")
    write_tables(tmp_path / "tables", sample_metadata=None, cell_line_metadata=None)
    with pytest.raises(SourceError, match=r"no sample_metadata.parquet in .*copy them from"):
        make_sources(config)
    write_tables(tmp_path / "tables", cell_line_metadata=None)
    (source,) = make_sources(config)
    with pytest.raises(SourceError, match=r"no cell_line_metadata.parquet in .*copy them from"):
        texts_of(source, "cell_name")


GENES, SAMPLE_TABLE = (make_tables()[name] for name in ("gene_metadata", "sample_metadata"))


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("gene_metadata", GENES.drop(columns="token_id"), r"no column 'token_id'"),
        ("gene_metadata", GENES.assign(token_id="x"), r"'token_id' holds .*whole numbers"),
        ("gene_metadata", GENES.assign(token_id=GENES.token_id - 1), r"has 2; gene tokens start"),
        ("gene_metadata", GENES.assign(token_id=7), r"has 7 more than once"),
        (
            "gene_metadata",
            GENES[:1].assign(token_id=10**9),
            r"has 1,000,000,000; expected numbers up",
        ),
        ("gene_metadata", GENES.assign(gene_symbol=None), r"'gene_symbol' is missing in row 0"),
        ("sample_metadata", SAMPLE_TABLE.drop(columns="drugname_drugconc"), r"no column 'drugn"),
        ("sample_metadata", SAMPLE_TABLE.assign(sample="smp_1 "), r"sample 'smp_1' more than once"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, name, table, message):
    with pytest.raises(SourceError, match=rf"{name}.parquet.*{message}"):
        TahoeTables.read(write_tables(tmp_path, **{name: table}))


def test_tables_that_are_no_parquet_are_refused(tmp_path):
    folder = write_tables(tmp_path)
    (folder / "gene_metadata.parquet").write_text("token_id\n3\n")
    with pytest.raises(SourceError, match=r"gene_metadata.parquet cannot be read"):
        TahoeTables.read(folder)


def test_repeated_gene_symbols_are_refused(tmp_path):
    write_tables(tmp_path / "tables", gene_metadata=GENES.assign(gene_symbol="gene1"))
    write_rows(tmp_path / "rows" / "0.parquet", make_rows(60))
    with pytest.raises(SourceError, match=r"0.parquet: .*gene1"):
        prepare(settings(tmp_path))


def test_files_that_are_no_rows_are_refused(tmp_path):
    tables = write_tables(tmp_path / "tables")

    def refuses(path, message):
        with pytest.raises(SourceError, match=message), TahoeSource(path, tables).open() as file:
            file.rows("expressions", 0, file.num_cells)

    path = tmp_path / "text.parquet"
    path.write_text("no parquet at all")
    refuses(path, r"text.parquet cannot be opened as parquet")
    refuses(tmp_path / "absent.parquet", r"absent.parquet cannot be opened as parquet")
    whole = write_rows(tmp_path / "whole.parquet", make_rows(300), compression="zstd")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    refuses(cut, r"cut.parquet cannot be opened as parquet")
    for name in ("genes", "sample", "plate"):
        schema = ROW_SCHEMA.remove(ROW_SCHEMA.get_field_index(name))
        rows = [{k: v for k, v in row.items() if k != name} for row in make_rows(10)]
        refuses(write_rows(path, rows, schema=schema), rf"has no column '{name}'; it has ")
    schema = ROW_SCHEMA.set(1, pa.field("expressions", pa.float32()))
    rows = [{**row, "expressions": 1.0} for row in make_rows(10)]
    refuses(write_rows(path, rows, schema=schema), r"'expressions' is float; expected list<")
    refuses(write_rows(path, []), r"has no cells")


def test_damage_within_a_file_is_reported_with_the_row_group(tmp_path):
    source = source_of(tmp_path, make_rows(600), compression="zstd", write_page_checksum=True)
    chunk = pq.read_metadata(source.path).row_group(3).column(1)
    content = bytearray(source.path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle] ^= 0xFF
    source.path.write_bytes(content)
    assert read(source, 0, 300).shape[0] == 300
    with pytest.raises(SourceError, match=r"rows from \d+ on \(row group 3\) cannot be read"):
        read(source, 300)


def test_there_is_one_matrix(tmp_path):
    with source_of(tmp_path, make_rows(30)).open() as file:
        assert file.locations() == ["expressions"]
        with pytest.raises(SourceError, match=r"no matrix at 'X'.*Set counts=auto"):
            file.matrix("X")
        info = file.matrix("expressions")
    assert (info.kind, info.shape, info.dtype) == ("csr", (30, NUM_GENES), np.float32)


def test_a_run_does_not_go_on_with_other_tables(tmp_path):
    write_rows(tmp_path / "rows" / "0.parquet", make_rows(30))
    write_tables(tmp_path / "tables")
    config = settings(tmp_path)
    first = describe_identity(config, make_sources(config))
    assert describe_identity(config, make_sources(config)) == first
    write_tables(tmp_path / "tables", gene_metadata=GENES.assign(gene_symbol=GENES.ensembl_id))
    assert describe_identity(config, make_sources(config)) != first


# --- the dataset's own tables, and the writer ----------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the metadata tables in {SHARED}")
def test_tables_of_the_dataset_are_accepted():
    tables = TahoeTables.read(SHARED)
    assert (len(tables.symbols), len(set(tables.symbols))) == (62_710, 62_710)
    assert (tables.column_T[3:] == np.arange(62_710)).all()
    labels = tables.sample_columns["drugname_drugconc"]
    parsed = [Perturbation.parse(label) for label in labels]
    assert (len(labels), len(set(labels)), len(set(parsed))) == (1_344, 1_138, 1_138)
    assert {c.unit for p in parsed for c in p.components} == {"uM"}
    assert {dose for p in parsed for dose in p.doses} == {0.0, 0.05, 0.5, 5.0}
    assert [p.names for p in parsed] == [(drug,) for drug in tables.sample_columns["drug"]]
    assert len(tables.cell_names()) == 102


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the metadata tables in {SHARED}")
def test_rows_that_refer_to_the_tables_of_the_dataset_are_read(tmp_path):
    samples = pq.read_table(SHARED / "sample_metadata.parquet").to_pylist()
    rows = make_rows(len(samples))
    for row, sample in zip(rows, samples, strict=True):
        row |= {name: sample[name] for name in ("sample", "drug", "plate")}
    rows[0] |= {"genes": [1, 3, 62_712], "expressions": [-2.0, 1.0, 7.0]}
    source = TahoeSource(write_rows(tmp_path / "rows.parquet", rows), SHARED)
    assert texts_of(source, "cell_name")[0] in ("A549", "PANC-1")
    labels = texts_of(source, "drugname_drugconc")
    assert labels == [sample["drugname_drugconc"].strip() for sample in samples]
    found = read(source)
    assert found.shape == (1_344, 62_710)
    assert found[0].indices.tolist() == [0, 62_709]
    assert (found[1:, :NUM_GENES].toarray() == brute_counts(rows[1:])).all()


@pytest.mark.parametrize(("compression", "rows_per_group"), [("snappy", 37), ("none", 1000)])
def test_written_rows_have_the_schema_and_the_cells(tmp_path, compression, rows_per_group):
    atlas = simulate(
        SimulationConfig(num_cells=600, num_lines=2, num_drugs=5, num_inert=1, num_genes=100)
    )
    write_tahoe_parquet(
        tmp_path,
        *(atlas.counts, atlas.obs, atlas.genes, {}),
        rows_per_file=250,
        rows_per_group=rows_per_group,
        compression=compression,
    )
    files = sorted((tmp_path / "data").glob("*.parquet"))
    assert all(pq.read_schema(file).equals(ROW_SCHEMA) for file in files)
    assert pq.read_metadata(files[0]).num_row_groups == -(-250 // min(250, rows_per_group))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert (brute_counts(rows, 100) == atlas.counts.toarray()).all()
    assert all((row["genes"][0], row["expressions"][0]) == (1, -2.0) for row in rows)
    assert [row["BARCODE_SUB_LIB_ID"] for row in rows] == list(atlas.obs.index)
    source = TahoeSource(files[0], tmp_path / "metadata")
    assert (read(source) != atlas.counts[:250]).nnz == 0


# --- compressed h5ad -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [64, 5_000, 1 << 20])
@pytest.mark.parametrize("is_dense", [False, True])
def test_blocks_of_compressed_h5ad_are_what_was_written(tmp_path, chunk, is_dense):
    counts = brute_counts(make_rows(300)).astype(np.float32)
    matrix = counts if is_dense else sp.csr_matrix(counts)
    path = tmp_path / "plate.h5ad"
    ad.AnnData(matrix, obs=pd.DataFrame(index=[str(i) for i in range(300)])).write_h5ad(path)
    with h5py.File(path, "a") as handle:
        for name in ["X"] if is_dense else ["X/data", "X/indices"]:
            values, facts = handle[name][:], dict(handle[name].attrs)
            del handle[name]
            shape = (min(chunk, 300), 16) if is_dense else (min(chunk, len(values)),)
            handle.create_dataset(name, data=values, chunks=shape, compression="gzip")
            handle[name].attrs.update(facts)
    with H5adSource(path, memory_bytes=1 << 30).open() as file:
        for step in (1, 37, 300):
            for start in range(0, 300, step):
                stop = min(start + step, 300)
                assert (file.rows("X", start, stop).toarray() == counts[start:stop]).all()


def test_every_format_has_a_source(tmp_path):
    write_tables(tmp_path / "tables")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").touch()
    config = settings(tmp_path)
    config.columns.library = "library"
    kinds = {}
    for kind in SourceFormat:
        config.source.format = kind
        config.source.num_cells = 3_000
        kinds[kind] = [type(source).__name__ for source in make_sources(config)]
    assert kinds == {
        SourceFormat.synthetic: ["H5adSource"],
        SourceFormat.h5ad: ["H5adSource"],
        SourceFormat.tahoe_parquet: ["TahoeSource"],
        SourceFormat.scdl: ["ScdlSource"],
        SourceFormat.store: ["StoreSource"],
    }
