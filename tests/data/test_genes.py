"""Gene vocabularies: hash, alignment, and the choice of highly variable genes."""

import json
import logging
import warnings
from hashlib import sha256

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import (
    ColumnsConfig,
    GeneChoice,
    GeneFlavor,
    GenesConfig,
    PrepareConfig,
    SourceConfig,
    SourceFormat,
)
from scale.data.genes import GeneVocabulary, StreamingMoments
from scale.data.ingest.choice import choose_genes, choose_list
from scale.data.ingest.conditions import ConditionTable
from scale.data.ingest.prepare import prepare
from scale.types import Condition, Perturbation, SourceError, SplitError


def test_hash_is_of_the_symbols_in_order():
    genes = GeneVocabulary(("A", "B"))
    assert genes.sha256 == sha256(b"A\nB").hexdigest()
    assert genes.sha256 == GeneVocabulary(("A", "B"), ("ENSG1", "ENSG2")).sha256
    assert genes.sha256 != GeneVocabulary(("B", "A")).sha256


def test_repeated_and_empty_names_are_refused_with_the_first_of_them():
    names = [*"abcdefg", *"abcdefg"]
    with pytest.raises(SourceError, match=r"7 gene names occur more than once: a, b, c, d, e;"):
        GeneVocabulary(tuple(names))
    with pytest.raises(SourceError, match="2 genes have no name, the first in column 1"):
        GeneVocabulary(("A", " ", ""))
    with pytest.raises(SourceError, match="no genes"):
        GeneVocabulary(())
    with pytest.raises(SourceError, match="1 identifiers for 2 genes"):
        GeneVocabulary(("A", "B"), ("ENSG1",))


def test_alignment_finds_genes_by_name_and_lists_the_others():
    genes = GeneVocabulary(("A", "B", "C"))
    alignment = genes.align(["X", "C", "A", "X"])
    assert alignment.column_G.tolist() == [2, -1, 1]
    assert alignment.missing == ("B",)
    assert alignment.extra == ("X",)
    assert alignment.projection(4).tolist() == [3, 2, 0, 3]
    with pytest.raises(SourceError, match="more than once: C"):
        genes.align(["C", "A", "C"])


def test_taking_genes_keeps_their_identifiers():
    genes = GeneVocabulary(("A", "B", "C"), ("1", "2", "3"))
    assert genes.take(np.array([2, 0])) == GeneVocabulary(("C", "A"), ("3", "1"))


# --- highly variable genes ----------------------------------------------------------------------


def clustered_counts(num_cells, num_genes, seed):
    """Counts of two kinds of cells with genes of very different means, some never seen."""
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(-1.5, 1.8, num_genes)
    rate[:3] = 0
    change = np.where(rng.random(num_genes) < 0.2, rng.lognormal(0, 1, num_genes), 1.0)
    kind = rng.random(num_cells) < 0.4
    depth = rng.lognormal(0, 0.4, num_cells)
    counts = rng.poisson(depth[:, None] * rate * np.where(kind[:, None], change, 1.0))
    counts[:, -1] += 1
    return sp.csr_matrix(counts.astype(np.float64))


def moments_of(counts, library, flavor=GeneFlavor.seurat, block=37):
    moments = StreamingMoments(counts.shape[1], flavor)
    for start in range(0, counts.shape[0], block):
        moments.update(counts[start : start + block], library[start : start + block])
    return moments


def chosen_by_scanpy(counts, num, flavor):
    """Return scanpy's normalised dispersions and choice, after its usual two steps."""
    sc = pytest.importorskip("scanpy")
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    adata = ad.AnnData(counts.copy(), var=var)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`n_top_genes` > number of normalized dispersions")
        found = sc.pp.highly_variable_genes(
            adata, n_top_genes=num, flavor=flavor.value, inplace=False
        )
    return found["dispersions_norm"].to_numpy(), found["highly_variable"].to_numpy()


def assert_same_choice(ours, theirs, dispersion):
    """Compare but for genes that tie with the last one up to rounding.

    Both genes of a bin of two are 0.7071 from their mean, whatever they are: which of several such
    pairs scanpy takes is decided by the last bits of its sums.
    """
    cutoff = dispersion[theirs].min()
    is_clear = ~(np.abs(dispersion - cutoff) < 1e-9)
    assert is_clear.sum() > 0.6 * len(dispersion)
    np.testing.assert_array_equal(ours[is_clear], theirs[is_clear])


@pytest.mark.parametrize("flavor", list(GeneFlavor))
@pytest.mark.parametrize(
    ("num_cells", "num_genes", "num"),
    [(600, 900, 150), (600, 900, 897), (50, 30, 10), (3000, 400, 1), (40, 60, 59)],
)
def test_choice_equals_that_of_scanpy(num_cells, num_genes, num, flavor):
    counts = clustered_counts(num_cells, num_genes, num)
    moments = moments_of(counts, np.asarray(counts.sum(1)).ravel(), flavor)
    expected, chosen = chosen_by_scanpy(counts, num, flavor)
    table = moments.table()
    # scanpy goes through float64 log1p and expm1
    np.testing.assert_allclose(table["dispersion_norm"], expected, rtol=1e-6, atol=1e-6)
    assert_same_choice(moments.highly_variable(num), chosen, expected)
    np.testing.assert_array_equal(table["num_cells"], np.asarray((counts > 0).sum(0)).ravel())


@pytest.mark.parametrize("flavor", list(GeneFlavor))
def test_genes_that_tie_are_chosen_together_as_by_scanpy(flavor):
    """Copies of genes tie everywhere; genes alone in a bin of the mean tie at 1 in seurat."""
    counts = clustered_counts(300, 120, 5).toarray()
    counts = np.hstack([counts, counts[:, 20:60], counts[:, 20:60]])
    counts[:, :4] = np.random.default_rng(0).poisson([300, 900, 2700, 8000], (300, 4))
    counts = sp.csr_matrix(counts)
    moments = moments_of(counts, np.asarray(counts.sum(1)).ravel(), flavor)
    sizes = set()
    for num in range(1, 120, 7):
        expected, chosen = chosen_by_scanpy(counts, num, flavor)
        np.testing.assert_allclose(
            moments.table()["dispersion_norm"], expected, rtol=1e-6, atol=1e-6
        )
        assert_same_choice(moments.highly_variable(num), chosen, expected)
        sizes.add(int(chosen.sum()) - num)
    assert max(sizes) > 0
    if flavor is GeneFlavor.seurat:
        assert (expected == 1).sum() > 1


def test_genes_never_seen_are_left_out_where_cell_ranger_has_no_bins_for_them(caplog):
    counts = clustered_counts(300, 200, 6).toarray()
    counts[:, ::3] = 0
    seen = counts.sum(0) > 0
    library = counts.sum(1)
    moments = moments_of(sp.csr_matrix(counts), library, GeneFlavor.cell_ranger)
    expected, chosen = chosen_by_scanpy(sp.csr_matrix(counts[:, seen]), 40, GeneFlavor.cell_ranger)
    dispersion = moments.table()["dispersion_norm"].to_numpy()
    np.testing.assert_allclose(dispersion[seen], expected, rtol=1e-6, atol=1e-6)
    assert np.isnan(dispersion[~seen]).all()
    np.testing.assert_array_equal(moments.highly_variable(40)[seen], chosen)
    assert f"{(~seen).sum()} of 200 genes were never seen" in caplog.text


@pytest.mark.parametrize("flavor", list(GeneFlavor))
def test_moments_do_not_depend_on_blocks_in_any_bit(flavor):
    counts = clustered_counts(200, 50, 1)
    library = np.asarray(counts.sum(1)).ravel()
    whole = moments_of(counts, library, flavor, block=200).table()
    for block in (1, 7, 128):
        pd.testing.assert_frame_equal(
            whole, moments_of(counts, library, flavor, block).table(), check_exact=True
        )
    dense = counts.toarray() * 1e4 / library[:, None]
    if flavor is GeneFlavor.cell_ranger:
        dense = np.log1p(dense)
    np.testing.assert_allclose(whole["mean"], dense.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole["variance"], dense.var(0, ddof=1), rtol=1e-9)


def test_moments_of_parts_add_up():
    counts = clustered_counts(200, 50, 1)
    library = np.asarray(counts.sum(1)).ravel()
    left = moments_of(counts[:77], library[:77])
    left.add(moments_of(counts[77:], library[77:]))
    pd.testing.assert_frame_equal(moments_of(counts, library).table(), left.table(), rtol=1e-12)
    with pytest.raises(ValueError, match="other genes or of another flavor"):
        left.add(StreamingMoments(50, GeneFlavor.cell_ranger))


def test_the_library_may_count_more_than_the_matrix():
    counts = clustered_counts(100, 40, 2)
    library = np.asarray(counts.sum(1)).ravel()
    cut, whole = StreamingMoments(20), StreamingMoments(40)
    whole.update(counts, library)
    cut.update(counts[:, :20], library)
    columns = ["mean", "variance"]
    pd.testing.assert_frame_equal(cut.table()[columns], whole.table()[columns].head(20))


def test_more_genes_wanted_than_there_are():
    moments = StreamingMoments(40)
    moments.update(clustered_counts(100, 40, 3), np.full(100, 50))
    assert moments.highly_variable(40).all()
    assert moments.highly_variable(1).sum() == 1


def test_errors_name_what_is_wrong():
    moments = StreamingMoments(3)
    with pytest.raises(ValueError, match="do not fit 2 cells x 3 genes"):
        moments.update(sp.csr_matrix(np.ones((2, 4))), np.ones(2))
    with pytest.raises(SourceError, match="0 cells"):
        moments.table()
    moments.update(sp.csr_matrix(np.ones((4, 3))), np.full(4, 3))
    with pytest.raises(SourceError, match="no gene varies"):
        moments.highly_variable(2)


# --- which genes a store keeps ------------------------------------------------------------------

DRUGS = ("a", "b", "c", "d", "rare")


class Screen:
    """Cells of two cell types x five drugs and a control, with the numbers a source has."""

    def __init__(self, num_genes=60, seed=0):
        rng = np.random.default_rng(seed)
        self.genes = GeneVocabulary(
            tuple(f"g{i}" for i in range(num_genes)), tuple(f"ENSG{i}" for i in range(num_genes))
        )
        self.conditions = [
            Condition(cell_type, Perturbation.parse(drug), None, drug == "DMSO")
            for cell_type in ("A549", "K562")
            for drug in ("DMSO", *DRUGS)
        ]
        sizes = [3 if c.perturbation.label == "rare" else 40 for c in self.conditions]
        self.condition_N = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        rate = rng.lognormal(0, 1, num_genes) * rng.lognormal(0, 1, (len(sizes), num_genes))
        self.counts = rng.poisson(rate[self.condition_N]) + 1
        self.asked = []

    def table(self):
        return ConditionTable(
            tuple(self.conditions),
            tuple(f" {c.perturbation.label}" for c in self.conditions),
            np.bincount(self.condition_N, minlength=len(self.conditions)),
            (),
            "DMSO",
            False,
            0,
        )

    def names(self, is_wanted_C):
        wanted = [c for c, want in zip(self.conditions, is_wanted_C, strict=True) if want]
        return {f"{c.cell_type}.{c.perturbation.label}" for c in wanted}

    def choose(self, minimum_cells=16, **settings):
        config = GenesConfig(**settings)

        def moments(is_wanted_C):
            self.asked.append(self.names(is_wanted_C))
            counts = self.counts[is_wanted_C[self.condition_N]]
            return moments_of(sp.csr_matrix(counts), counts.sum(1), config.flavor)

        return choose_genes(config, self.genes, self.table(), minimum_cells, moments)


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.toml"
    path.write_text(
        '[datasets]\nx = "."\n[training]\nx = "train"\n[zeroshot]\n"x.K562" = "test"\n'
        '[fewshot."x.A549"]\nval = ["b"]\ntest = ["c", "never measured"]\n'
    )
    return str(path)


def test_all_genes_are_kept_without_looking_at_a_cell():
    for settings in (
        {"choice": GeneChoice.all},
        {"choice": GeneChoice.hvg, "num": 60},
    ):
        screen = Screen()
        chosen = screen.choose(**settings)
        assert chosen.columns.tolist() == list(range(60))
        assert chosen.table["column"].tolist() == list(range(60))
        assert chosen.fit_on is None
        assert screen.asked == []


@pytest.mark.parametrize("flavor", list(GeneFlavor))
def test_all_conditions_that_are_stored_decide(flavor):
    screen = Screen()
    chosen = screen.choose(num=7, flavor=flavor)
    (asked,) = screen.asked
    assert asked == {f"{c}.{d}" for c in ("A549", "K562") for d in ("DMSO", "a", "b", "c", "d")}
    assert chosen.fit_on == "all"
    is_used = np.isin(screen.condition_N, [i for i in range(12) if i % 6 != 5])
    expected = moments_of(
        sp.csr_matrix(screen.counts[is_used]), screen.counts[is_used].sum(1), flavor
    )
    assert chosen.columns.tolist() == np.flatnonzero(expected.highly_variable(7)).tolist()
    table = chosen.table
    assert table.columns.tolist() == [
        *("symbol", "ensembl_id", "column"),
        *("num_cells", "mean", "variance", "dispersion_norm"),
    ]
    assert table["symbol"].tolist() == list(screen.genes.symbols)
    assert table.loc[chosen.columns, "column"].tolist() == list(range(len(chosen.columns)))
    assert (table["column"] >= 0).sum() == len(chosen.columns)
    pd.testing.assert_frame_equal(table[table.columns[3:]], expected.table())


def test_with_a_split_only_its_training_conditions_and_their_controls_decide(split, caplog):
    screen = Screen()
    chosen = screen.choose(num=7, split=split)
    assert screen.asked == [{"A549.DMSO", "A549.a", "A549.d"}]
    assert chosen.fit_on == "train"
    assert "never measured" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_genes_fitted_on_train_do_not_change_with_any_edit_of_held_out_cells(split, seed):
    screen, edited = Screen(), Screen()
    before = screen.choose(num=7, split=split)
    rng = np.random.default_rng(seed)
    names = np.array([f"{c.cell_type}.{c.perturbation.label}" for c in screen.conditions])
    is_held_out_N = ~np.isin(names, ["A549.DMSO", "A549.a", "A549.d"])[edited.condition_N]
    edited.counts[is_held_out_N] = rng.poisson(rng.lognormal(3, 2, (is_held_out_N.sum(), 60)))
    keep_N = ~is_held_out_N | (rng.random(len(is_held_out_N)) < 0.7)
    edited.counts, edited.condition_N = edited.counts[keep_N], edited.condition_N[keep_N]
    after = edited.choose(num=7, split=split)
    np.testing.assert_array_equal(before.columns, after.columns)
    pd.testing.assert_frame_equal(before.table, after.table, check_exact=True)
    assert (
        screen.choose(num=7).table["mean"].tolist() != edited.choose(num=7).table["mean"].tolist()
    )


def test_prepare_passes_by_held_out_cells_when_it_chooses(split, tmp_path):
    screen = Screen()
    labels = [(c.cell_type, c.perturbation.label) for c in screen.conditions]
    obs = pd.DataFrame([labels[c] for c in screen.condition_N], columns=["line", "drug"])
    obs.index = obs.index.astype(str)
    is_train = (obs["line"] == "A549") & obs["drug"].isin(["DMSO", "a", "d"])
    tables = {}
    for edit in (1, 50):
        screen.counts[~is_train] = edit * screen.counts[~is_train, ::-1] + edit
        adata = ad.AnnData(sp.csr_matrix(screen.counts.astype(np.float32)), obs=obs)
        adata.var_names = screen.genes.symbols
        adata.write_h5ad(tmp_path / "cells.h5ad")
        for genes_split in (split, None):
            store = tmp_path / f"store-{edit}-{genes_split is None}"
            prepare(
                PrepareConfig(
                    name="test",
                    run_dir=str(tmp_path / "run"),
                    store=str(store),
                    source=SourceConfig(
                        format=SourceFormat.h5ad, files=[str(tmp_path / "cells.h5ad")]
                    ),
                    columns=ColumnsConfig(perturbation="drug", cell_type="line"),
                    control="DMSO",
                    genes=GenesConfig(num=9, split=genes_split),
                )
            )
            tables[edit, genes_split] = pd.read_parquet(store / "genes.parquet")
            provenance = json.loads((store / "prepare.json").read_text())["provenance"]
            assert provenance["genes_fit_on"] == ("all" if genes_split is None else "train")
    pd.testing.assert_frame_equal(tables[1, split], tables[50, split], check_exact=True)
    assert (tables[1, None]["mean"] != tables[50, None]["mean"]).any()
    expected = moments_of(sp.csr_matrix(screen.counts[is_train]), screen.counts[is_train].sum(1))
    np.testing.assert_array_equal(tables[1, split]["mean"], expected.table()["mean"])
    np.testing.assert_array_equal(tables[1, split]["column"] >= 0, expected.highly_variable(9))


def test_a_split_without_training_conditions_is_refused(tmp_path):
    path = tmp_path / "split.toml"
    path.write_text(
        '[datasets]\nx = "."\n[training]\nx = "train"\n[zeroshot]\n'
        '"x.K562" = "test"\n"x.A549" = "val"\n'
    )
    with pytest.raises(SplitError, match=r"leaves no training condition .* of 10 treated ones"):
        Screen().choose(num=7, split=str(path))


def test_moments_of_another_flavor_are_refused():
    screen = Screen()
    with pytest.raises(ValueError, match="moments of flavor"):
        choose_genes(
            GenesConfig(num=7, flavor=GeneFlavor.cell_ranger),
            screen.genes,
            screen.table(),
            1,
            lambda is_wanted_C: moments_of(sp.csr_matrix(screen.counts), screen.counts.sum(1)),
        )


def test_a_list_decides_the_order_and_may_give_either_name(tmp_path):
    path = tmp_path / "panel.txt"
    path.write_text("# panel\ng7\n\nENSG3 \ng30\n")
    screen = Screen()
    chosen = screen.choose(choice=GeneChoice.list, file=str(path))
    assert chosen.columns.tolist() == [7, 3, 30]
    assert chosen.fit_on is None
    stored = chosen.table[chosen.table["column"] >= 0].sort_values("column")
    assert stored["symbol"].tolist() == ["g7", "g3", "g30"]
    assert screen.asked == []


def test_listed_genes_may_be_missing_up_to_a_number(tmp_path, caplog):
    path = tmp_path / "panel.txt"
    path.write_text("g7\nTP53\ng3\nMYC\n")
    genes = Screen().genes
    with caplog.at_level(logging.WARNING):
        assert choose_list(genes, path, max_missing=2).tolist() == [7, 3]
    assert "2 of 4 genes are not in the source and are left out: TP53, MYC" in caplog.text
    with pytest.raises(SourceError, match=r"2 of 4 genes .* \(TP53, MYC\).*max_missing=N \(now 1"):
        choose_list(genes, path, max_missing=1)
    path.write_text("TP53\nMYC\n")
    with pytest.raises(SourceError, match="2 of 2 genes are not in the source"):
        choose_list(genes, path, max_missing=9)
    path.write_text("g1\nENSG1\n")
    with pytest.raises(SourceError, match="names a gene more than once"):
        choose_list(genes, path)
    path.write_text("# nothing\n")
    with pytest.raises(SourceError, match="0 of 0 genes"):
        choose_list(genes, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="cannot be read"):
        choose_list(genes, path)
    with pytest.raises(SourceError, match="cannot be read"):
        choose_list(genes, tmp_path / "absent.txt")
