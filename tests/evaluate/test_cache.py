"""Laws of the cache: what is found is what would be made, and nothing is found for other inputs."""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from small_screen import evaluate, hold_out, screen

from scale.evaluate.cache import TableCache
from scale.evaluate.sides import gene_tables

GENES = [f"g{g}" for g in range(30)]
LABELS = ["one", "two", "three"]


def some_cells(seed=0):
    """(cells of three conditions, one of a single cell; control cells); a gene nobody has."""
    generator = np.random.default_rng(seed)

    def cells(count):
        values = generator.gamma(1.0, 1.0, (count, len(GENES))).round(1)
        values *= generator.random(values.shape) < 0.4
        values[:, 7] = 0
        return sp.csr_matrix(values, dtype=np.float32)

    return [cells(9), cells(1), cells(14)], cells(20)


def ask(folder, cells, control, *, genes=GENES, names=("A549", *LABELS)):
    """(tables, whether they were found)."""
    cache = TableCache(folder, ["strict", *genes])
    tables = cache.gene_tables(cells, control, names)
    assert cache.num_found + cache.num_made == 1
    return tables, cache.num_found == 1


def arrays(tables):
    tests = tables.tests
    return [
        *(tables.mean_PG, tables.variance_PG, tables.zeros_PG),
        *(tests.p_PG, tests.fdr_PG, tests.lfc_PG),
    ]


def assert_same(first, second):
    for x, y in zip(arrays(first), arrays(second), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()
        assert x.flags.writeable == y.flags.writeable


def kept(folder):
    return sorted(Path(folder).iterdir())


def test_what_is_found_is_what_would_be_made_bit_for_bit(tmp_path):
    cells, control = some_cells()
    expected = gene_tables(cells, control)
    assert np.isinf(expected.tests.lfc_PG).any()  # infinities and 0 / 0 go through the file too
    made, was_found = ask(tmp_path / "deep" / "cache", cells, control)
    assert not was_found
    found, was_found = ask(tmp_path / "deep" / "cache", cells, control)
    assert was_found
    assert_same(made, expected)
    assert_same(found, expected)


def test_a_kept_table_can_be_read_as_a_table(tmp_path):
    cells, control = some_cells()
    tables, _ = ask(tmp_path, cells, control)
    frame = pd.read_parquet(kept(tmp_path)[0])
    assert len(frame) == len(LABELS) * len(GENES)
    np.testing.assert_array_equal(frame["fdr"], tables.tests.fdr_PG.reshape(-1))


def one_value(cells, control):
    cells[2].data[5] = np.nextafter(cells[2].data[5], np.float32(9))
    return {}


def one_gene_of_a_value(cells, control):
    cells[1].indices[-1] = len(GENES) - 1 if cells[1].indices[-1] != len(GENES) - 1 else 0
    return {}


def a_cell_moves_on(cells, control):
    both = sp.vstack([cells[0], cells[1]], format="csr")
    cells[0], cells[1] = both[:8], both[8:]
    return {}


def order_of_conditions(cells, control):
    cells.reverse()
    return {}


def control_cell(cells, control):
    control.data[0] += 1
    return {}


def control_half(cells, control):
    return {"control": control[::2]}


def empty_control_cell(cells, control):
    return {"control": sp.vstack([control, sp.csr_matrix((1, len(GENES)))], format="csr")}


def label(cells, control):
    return {"names": ("A549", "one", "two", "four")}


def boundary_of_labels(cells, control):
    return {"names": ("A549", "one", "twot", "hree")}


def part(cells, control):
    return {"names": ("A549", "half 0 1", *LABELS)}


def gene_name(cells, control):
    return {"genes": ["h0", *GENES[1:]]}


CHANGES = [
    one_value,
    one_gene_of_a_value,
    a_cell_moves_on,
    order_of_conditions,
    control_cell,
    control_half,
    empty_control_cell,
    label,
    boundary_of_labels,
    part,
    gene_name,
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_changed_input_misses(change, tmp_path):
    ask(tmp_path, *some_cells())
    cells, control = some_cells()
    changed = {"cells": cells, "control": control} | change(cells, control)
    tables, was_found = ask(tmp_path, **changed)
    assert not was_found
    assert_same(tables, gene_tables(changed["cells"], changed["control"]))
    assert ask(tmp_path, *some_cells())[1]  # the first one is still there
    assert len(kept(tmp_path)) == 2


def flip(content, place):
    damaged = bytearray(content)
    damaged[place] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: flip(c, 0),
        lambda c: flip(c, len(c) // 2),
        lambda c: flip(c, len(c) - 1),
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: b"",
    ],
    ids=["first byte", "middle byte", "last byte", "cut", "longer", "empty"],
)
def test_a_damaged_file_is_noticed_said_and_made_again(damage, tmp_path, caplog):
    cells, control = some_cells()
    expected, _ = ask(tmp_path, cells, control)
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    tables, was_found = ask(tmp_path, cells, control)
    assert not was_found
    assert_same(tables, expected)
    assert f"{path} is damaged and is made again" in caplog.text
    assert path.read_bytes() == whole
    assert ask(tmp_path, cells, control)[1]


def test_a_file_of_another_key_is_not_taken(tmp_path):
    ask(tmp_path, *some_cells(0))
    (first,) = kept(tmp_path)
    cells, control = some_cells(1)
    ask(tmp_path, cells, control)
    second = next(path for path in kept(tmp_path) if path != first)
    second.write_bytes(first.read_bytes())  # whole, but not what the name says
    tables, was_found = ask(tmp_path, cells, control)
    assert not was_found
    assert_same(tables, gene_tables(cells, control))


def test_what_a_killed_run_left_is_not_taken(tmp_path):
    cells, control = some_cells()
    ask(tmp_path, cells, control)
    (path,) = kept(tmp_path)
    (tmp_path / ".abc.part").write_bytes(path.read_bytes()[:100])
    path.unlink()
    assert not ask(tmp_path, cells, control)[1]
    assert ask(tmp_path, cells, control)[1]


def test_runs_may_share_a_folder_at_the_same_time(tmp_path):
    cells, control = some_cells()
    expected = gene_tables(cells, control)
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        for _ in range(5):
            found.append(ask(tmp_path, cells, control)[0])
            for path in tmp_path.glob("*.parquet"):
                path.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for tables in found:
        assert_same(tables, expected)
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"protocol\.cache=.*file/cache cannot be made"):
        TableCache(tmp_path / "file" / "cache", GENES)


def test_a_folder_that_takes_nothing_costs_time_not_the_run(tmp_path, caplog):
    cells, control = some_cells()
    cache = TableCache(tmp_path / "cache", GENES)
    (tmp_path / "cache").rmdir()
    tables = cache.gene_tables(cells, control, LABELS)
    assert_same(tables, gene_tables(cells, control))
    assert "is not kept" in caplog.text


def test_an_evaluation_gives_the_same_bits_without_with_a_cold_and_with_a_warm_cache(tmp_path):
    adata = screen(3, lines=2, drugs=5, own=0.5)
    train, observed = hold_out(adata, [("L0", "d0"), ("L0", "d1"), ("L1", "d0"), ("L1", "d2")])
    other = screen(4, lines=2, drugs=5, own=0.5)
    rules = {"ceiling": True, "num_splits": 2, "baselines": True}
    number, results = [], []
    for predicted, cache in (
        (observed, None),
        (observed, str(tmp_path)),
        (observed, str(tmp_path)),
        (hold_out(other, [("L0", "d0"), ("L0", "d1"), ("L1", "d0"), ("L1", "d2")])[1], tmp_path),
    ):
        cache = None if cache is None else str(cache)
        results.append(evaluate(predicted, observed, train, cache=cache, **rules))
        number.append(len(kept(tmp_path)))
    # per context: the observed side, and two halves of each of two splits
    assert number == [0, 10, 10, 10]
    for result in results[1:3]:
        pd.testing.assert_frame_equal(result.scores, results[0].scores, check_exact=True)
        pd.testing.assert_frame_equal(result.aggregate, results[0].aggregate, check_exact=True)
        pd.testing.assert_frame_equal(
            pd.DataFrame(result.collapse), pd.DataFrame(results[0].collapse), check_exact=True
        )
    evaluate(observed, observed, train, cache=str(tmp_path), seed=1, **rules)
    assert len(kept(tmp_path)) == 20  # other halves of the controls
