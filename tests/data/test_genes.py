"""Gene vocabularies: hash, alignment, and the choice of highly variable genes."""

from hashlib import sha256

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.data.genes import GeneVocabulary, StreamingMoments
from scale.types import SourceError


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


@pytest.mark.parametrize(("num_cells", "num_genes", "num"), [(600, 900, 150), (50, 30, 10)])
def test_choice_equals_that_of_scanpy(num_cells, num_genes, num):
    sc = pytest.importorskip("scanpy")
    counts = clustered_counts(num_cells, num_genes, num)
    library = np.asarray(counts.sum(1)).ravel()
    moments = StreamingMoments(num_genes)
    for start in range(0, num_cells, 37):
        moments.update(counts[start : start + 37], library[start : start + 37])
    adata = ad.AnnData(counts.copy(), var=pd.DataFrame(index=[f"g{i}" for i in range(num_genes)]))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=num, flavor="seurat")
    table = moments.table()
    expected = adata.var["dispersions_norm"].to_numpy()
    # scanpy goes through float64 log1p and expm1
    np.testing.assert_allclose(table["dispersion_norm"], expected, rtol=1e-6, atol=1e-6)
    assert (moments.highly_variable(num) == adata.var["highly_variable"].to_numpy()).all()
    assert (table["num_cells"] == np.asarray((counts > 0).sum(0)).ravel()).all()


def test_blocks_and_merging_do_not_change_the_moments():
    counts = clustered_counts(200, 50, 1)
    library = np.asarray(counts.sum(1)).ravel()
    whole, left, right = (StreamingMoments(50) for _ in range(3))
    whole.update(counts, library)
    left.update(counts[:77], library[:77])
    right.update(counts[77:], library[77:])
    left.merge(right)
    pd.testing.assert_frame_equal(whole.table(), left.table(), rtol=1e-12)
    dense = counts.toarray() * 1e4 / library[:, None]
    np.testing.assert_allclose(whole.table()["mean"], dense.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.table()["variance"], dense.var(0, ddof=1), rtol=1e-9)


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
