"""Laws of the loader: the right cells with the right values, in order, whatever the threads do."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import scanpy as sc
import torch
from cell_set_store import BATCHES, CONTROL, NUM_GENES, counts_of, write_store

from scale.config import Codec, DataConfig, MatchBatch, ShortSets
from scale.data.control_pool import ControlPool
from scale.data.genes import GeneVocabulary
from scale.data.loader import Normalisation, SetReader
from scale.data.prefetch import Prefetcher
from scale.data.sampler import SetPlan
from scale.data.store import CellSetStore
from scale.data.store_writer import StoreWriter
from scale.data.vocabulary import make_projection, make_table, make_vocabulary
from scale.types import Condition, Perturbation, PlanError, StoreError

CPU = torch.device("cpu")
SET_SIZE, NUM_SUMMARY = 48, 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("loader") / "store")


@pytest.fixture
def store(path):
    with CellSetStore.open(path) as opened:
        yield opened


def make_reader(store, *, genes=None, value_scale=1.0, plan_seed=5, device=CPU, **changes):
    config = replace(DataConfig(store=str(store.path)), **changes)
    is_control = store.conditions["is_control"].to_numpy()
    treated = np.flatnonzero(~is_control)
    plan = SetPlan(
        store.conditions,
        treated,
        np.flatnonzero(is_control),
        config,
        set_size=SET_SIZE,
        num_summary_cells=NUM_SUMMARY,
        seed=plan_seed,
    )
    vocabulary = make_vocabulary(
        store, treated.tolist(), target_sum=config.target_sum, value_scale=value_scale
    )
    genes = store.genes.symbols if genes is None else genes
    projection = make_projection(store, genes)
    how = Normalisation(
        config.target_sum, value_scale, None if projection is None else projection.to(device)
    )
    reader = SetReader(store, plan, make_table(store, vocabulary), how, device=device)
    return plan, reader


def normalised(store, *, target_sum=10_000.0):
    """Return values of every cell by scanpy, and totals, by (condition, row)."""
    cells = store.to_anndata()
    library = cells.obs["library"].to_numpy(float)
    # scanpy sums what it sees; a column with the rest makes the sum the library
    rest = library - np.asarray(cells.X.sum(axis=1)).ravel()
    whole = sc.AnnData(np.column_stack([cells.X.toarray(), rest]))
    sc.pp.normalize_total(whole, target_sum=target_sum)
    sc.pp.log1p(whole)
    first = cells.obs.groupby("condition").cumcount().to_numpy()
    place = zip(cells.obs["condition"], first, strict=True)
    return dict(zip(place, whole.X[:, :-1], strict=True)), dict(
        zip(zip(cells.obs["condition"], first, strict=True), library, strict=True)
    )


def jobs(start=0, num=6, size=3):
    return iter(np.arange(start, start + num * size).reshape(num, size))


def assert_equal(one, other):
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left.nan_to_num(-7.0), right.nan_to_num(-7.0)), field.name


def reader_threads():
    names = ("scale-reader", "scale-control-pool")
    return [t for t in threading.enumerate() if t.name.startswith(names)]


def wait_for_no_threads():
    deadline = time.monotonic() + 5
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not reader_threads()


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"control_fraction": 0.3}, {"short": ShortSets.repeat}])
def test_batches_hold_the_cells_of_the_plan_as_scanpy_normalises_them(store, changes):
    plan, reader = make_reader(store, value_scale=2.0, **changes)
    value, library = normalised(store)
    zero = np.zeros(NUM_GENES, np.float32)
    for numbers in jobs(num=plan.num_sets_per_epoch // 3):
        batch = reader.batch(numbers)
        for b, number in enumerate(numbers.tolist()):
            spec = plan.plan(*divmod(number, plan.num_sets_per_epoch))
            own = np.full(len(spec.treated_row), spec.condition)
            for condition, row, cells, mask, totals in (
                (
                    own,
                    spec.treated_row,
                    batch.treated_BSG,
                    batch.treated_mask_BS,
                    batch.treated_library_BS,
                ),
                (
                    spec.control_condition,
                    spec.control_row,
                    batch.control_BSG,
                    batch.control_mask_BS,
                    batch.control_library_BS,
                ),
                (
                    spec.summary_condition,
                    spec.summary_row,
                    batch.summary_BUG,
                    batch.summary_mask_BU,
                    None,
                ),
            ):
                places = list(zip(condition.tolist(), row.tolist(), strict=True))
                width = cells.shape[1]
                expected = [value[place] / 2.0 for place in places]
                expected += [zero] * (width - len(places))
                # float32 on both sides
                np.testing.assert_allclose(cells[b].numpy(), expected, rtol=2e-6, atol=1e-6)
                assert mask[b].tolist() == [i < len(places) for i in range(width)]
                if totals is not None:
                    expected = [library[place] for place in places]
                    assert totals[b].tolist() == expected + [0.0] * (width - len(places))


def test_a_batch_says_what_its_sets_are(store):
    _, reader = make_reader(store, control_fraction=0.3)
    names = ("<unknown>", CONTROL, "azacitidine", "bortezomib", "crizotinib", "dasatinib")
    names = (*names, "erlotinib")
    for numbers in jobs(num=8):
        batch = reader.batch(numbers)
        assert batch.set_index_B.tolist() == numbers.tolist()
        for b, c in enumerate(batch.condition_B.tolist()):
            what = store.condition(c)
            assert bool(batch.is_control_B[b]) == what.is_control
            rows = [r for r in batch.component_BJ[b].tolist() if r >= 0]
            assert [names[r] for r in rows] == [p.name for p in what.perturbation.components]
            assert batch.component_BJ.shape == (3, 2)
            assert batch.dose_BJ.isnan().all()
            assert ("A549", "HepG2", "K562")[batch.cell_type_B[b]] == what.cell_type
            assert BATCHES[batch.batch_B[b]] == what.batch


def test_the_torch_decode_gives_the_same_batch(store):
    _, reader = make_reader(store)
    numbers = np.arange(6)
    compiled = reader.batch(numbers)
    host = reader.read(numbers)
    reader._on_host = False  # decode as on a device, on the host
    decoded = reader.to_device(host)
    for field in fields(compiled):
        left, right = getattr(compiled, field.name), getattr(decoded, field.name)
        assert torch.allclose(left.double(), right.double(), atol=1e-6, equal_nan=True)


def test_a_batch_travels_in_one_buffer(store):
    _, reader = make_reader(store, control_fraction=0.3)
    for numbers in jobs(num=4):
        host = reader.read(numbers)
        expected = reader.to_device(host)
        # nothing but the bytes of the buffer and four sizes is needed
        moved = replace(host, buffer=host.buffer.clone())
        host.buffer.fill_(255)
        assert_equal(expected, reader.to_device(moved))
        cells = sum(part.sizes.num_nonzero for part in (moved.treated, moved.control))
        assert moved.buffer.numel() < 2 * cells + 80 * 3 * (2 * SET_SIZE + NUM_SUMMARY)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [None, ("G290", "absent", "G000", "G123", "G299")])
def test_batches_on_a_device_are_those_on_the_host(store, wanted):
    device = torch.device("cuda", torch.cuda.current_device())
    _, on_host = make_reader(store, genes=wanted)
    _, there = make_reader(store, genes=wanted, device=device)
    host = there.read(np.arange(3))
    assert host.buffer.is_pinned()
    assert host.to(device).buffer.device == device
    for numbers, batch in zip(
        jobs(num=20), there.batches(jobs(num=20), num_threads=3, depth=4), strict=True
    ):
        expected = on_host.batch(numbers)
        for field in fields(batch):
            found, wanted_there = getattr(batch, field.name), getattr(expected, field.name)
            assert found.device == device
            torch.testing.assert_close(
                found.cpu(), wanted_there, rtol=1e-6, atol=1e-6, equal_nan=True
            )


def test_a_batch_that_is_kept_never_changes(store):
    _, reader = make_reader(store)
    kept, copies, addresses = [], [], set()
    for number, batch in enumerate(reader.batches(jobs(num=40), num_threads=3, depth=4)):
        if number % 10 == 0:
            kept.append(batch)
            copies.append({f.name: getattr(batch, f.name).clone() for f in fields(batch)})
        elif number % 10 == 5:  # one field is enough to keep what it shows
            kept.append(replace(batch, control_BSG=batch.control_BSG.clone()))
            copies.append({f.name: getattr(batch, f.name).clone() for f in fields(batch)})
        else:
            addresses.add(batch.treated_BSG.data_ptr())
    assert len(addresses) < 20  # the memory of the others was used again
    for batch, copy in zip(kept, copies, strict=True):
        for name, value in copy.items():
            assert torch.equal(getattr(batch, name).nan_to_num(-7.0), value.nan_to_num(-7.0)), name


def test_genes_are_taken_by_name(store, caplog):
    _, plain = make_reader(store)
    wanted = ("G290", "absent", "G000", "G123", "G299")
    _, aligned = make_reader(store, genes=wanted)
    one, other = plain.batch(np.arange(4)), aligned.batch(np.arange(4))
    columns = [290, 0, 123, 299]
    assert torch.equal(other.treated_BSG[..., [0, 2, 3, 4]], one.treated_BSG[..., columns])
    assert torch.equal(other.control_BSG[..., [0, 2, 3, 4]], one.control_BSG[..., columns])
    assert not other.treated_BSG[..., 1].any()
    assert "1 of the model's 5 genes are not in" in caplog.text
    with pytest.raises(StoreError, match="none of the model's 1 genes"):
        make_reader(store, genes=("ENSG01",))


# --- conditions whose cells come from several batches -------------------------------------------


@pytest.fixture(scope="module")
def mixed_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "store"
    names = ("p0", "p1", "p2")
    with StoreWriter(
        path,
        genes=GeneVocabulary(tuple(f"G{i:03d}" for i in range(NUM_GENES))),
        columns={"perturbation": "gene", "cell_type": "line", "batch": "gem"},
        control="non-targeting",
        codec=Codec.zstd,
        shard_bytes=1 << 20,
        provenance={},
        batches=names,
    ) as writer:

        def add(label, batch, size, seed, codes=None):
            condition = Condition("a", Perturbation.parse(label), batch, codes is None)
            counts = counts_of(size, seed)
            library = np.asarray(counts.sum(axis=1)).ravel() + 1
            writer.add(condition, label, counts, library, batch_codes=codes)

        for b, size in enumerate((200, 90, 10)):
            add("non-targeting", names[b], size, b)
        for d in range(4):
            add(f"GENE{d}", None, 70, 10 + d, np.arange(70) % (d + 1) % 3)
    return path


def test_controls_have_the_batches_of_the_treated_cells(mixed_path):
    with CellSetStore.open(mixed_path) as store:
        plan, reader = make_reader(store)
        value, _ = normalised(store)
        block = plan.block(np.arange(plan.num_sets_per_epoch))
        for number, c in enumerate(block.condition_B.tolist()):
            numbers = np.array([number])
            one = plan.block(numbers)
            slot_N, treated = reader._find_treated(one)
            codes = [treated.batch_code_N]
            reader._match_batches(one, numbers, slot_N, treated)
            control = list(zip(one.control_condition_BS[0], one.control_row_BS[0], strict=True))[
                : one.control_count_B[0]
            ]
            summary = list(zip(one.summary_condition_BU[0], one.summary_row_BU[0], strict=True))[
                : one.summary_count_B[0]
            ]
            assert (len(set(control)), len(set(summary))) == (SET_SIZE, NUM_SUMMARY)
            assert not set(control) & set(summary)
            # batch p2 has 10 controls, fewer than the minimum: its cells are served from all
            codes_of_controls = codes[0][np.arange(SET_SIZE) % len(codes[0])]
            for batch in (0, 1):
                drawn = sum(int(condition) == batch for condition, _ in control)
                wanted = int((codes_of_controls == batch).sum())
                assert drawn >= wanted
                if store.labels[store.conditions.loc[c, "perturbation"]] != "GENE2":
                    assert drawn == wanted or (codes_of_controls == 2).any()
            batch = reader.batch(numbers)
            np.testing.assert_allclose(
                batch.control_BSG[0].numpy(), [value[place] for place in control], atol=1e-6
            )
            assert batch.batch_B.tolist() == [-1]


def test_required_batches_fail_with_their_name(mixed_path):
    with CellSetStore.open(mixed_path) as store:
        plan, reader = make_reader(store, match_batch=MatchBatch.require)
        numbers = np.arange(plan.num_sets_per_epoch)
        with pytest.raises(PlanError, match="of batch p2 there are 10 control cells"):
            reader.batch(numbers)


# --- order and threads --------------------------------------------------------------------------


def test_batches_do_not_depend_on_threads_or_on_what_is_read_ahead(store):
    _, reader = make_reader(store)
    expected = [reader.batch(numbers) for numbers in jobs()]
    for num_threads, depth in ((1, 1), (2, 4), (5, 2), (4, 20)):
        found = list(reader.batches(jobs(), num_threads=num_threads, depth=depth))
        assert len(found) == len(expected)
        for one, other in zip(expected, found, strict=True):
            assert_equal(one, other)


def test_results_come_in_the_order_of_jobs_and_not_too_many_ahead():
    started, lock = [], threading.Lock()

    def work(job):
        with lock:
            started.append(job)
        time.sleep(0.002 * (5 - job % 5))
        return job

    with Prefetcher(iter(range(30)), work, num_threads=4, depth=6) as results:
        for taken, result in enumerate(results):
            assert result == taken
            with lock:
                assert max(started) <= taken + 6
    assert wait_for_no_threads()


def test_an_error_comes_at_its_turn_and_ends_the_threads():
    def work(job):
        if job == 3:
            raise StoreError("job 3")
        return job

    results = Prefetcher(iter(range(100)), work, num_threads=3, depth=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match="job 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert wait_for_no_threads()


def test_an_error_of_the_jobs_themselves_surfaces():
    def broken():
        yield 0
        raise OSError("list of jobs is gone")

    with Prefetcher(broken(), lambda job: job, num_threads=2, depth=4) as results:
        assert next(results) == 0
        with pytest.raises(OSError, match="list of jobs is gone"):
            next(results)
    assert wait_for_no_threads()


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["treated", "control"])
def test_a_damaged_shard_surfaces_in_the_consumer_with_its_name(tmp_path, kind):
    path = write_store(tmp_path / "store")
    for shard in sorted((path / "shards").glob(f"{kind}-*")):
        raw = bytearray(shard.read_bytes())
        for position in range(200, len(raw), 997):
            raw[position] ^= 1
        shard.write_bytes(raw)
    with CellSetStore.open(path) as store:
        _, reader = make_reader(store)
        name = rf"{kind}-\d+.*chunk \d+ of condition \d+ \((A549|HepG2|K562), .*crc32"
        with pytest.raises(StoreError, match=name):
            list(reader.batches(jobs(), num_threads=2, depth=3))
    assert wait_for_no_threads()


def test_a_shard_that_is_cut_while_it_is_read_surfaces_with_its_name(tmp_path):
    path = write_store(tmp_path / "store")
    with CellSetStore.open(path) as store:
        _, reader = make_reader(store)
        batches = reader.batches(jobs(num=1000), num_threads=2, depth=3)
        next(batches)
        for shard in (path / "shards").glob("treated-*"):
            os.truncate(shard, 16)
        with pytest.raises(StoreError, match=r"treated-\d+.*chunk \d+ of condition .* of 0 bytes"):
            list(batches)
    assert wait_for_no_threads()


@pytest.mark.parametrize("kind", ["treated", "control"])
def test_a_shard_that_is_gone_surfaces_with_its_name(tmp_path, kind):
    path = write_store(tmp_path / "store")
    with CellSetStore.open(path) as store:
        _, reader = make_reader(store)
        for shard in (path / "shards").glob(f"{kind}-*"):
            shard.unlink()
        with pytest.raises(
            StoreError, match=rf"{kind}-\d+.*chunk \d+ .* cannot be read: .*No such"
        ):
            list(reader.batches(jobs(), num_threads=2, depth=3))
    assert wait_for_no_threads()


def test_a_store_that_is_closed_while_it_is_read_is_opened_again(path):
    with CellSetStore.open(path) as store:
        _, reader = make_reader(store)
        expected = [reader.batch(numbers) for numbers in jobs(num=30)]
        found = []
        for batch in reader.batches(jobs(num=30), num_threads=3, depth=4):
            store.close()
            found.append(batch)
    for one, other in zip(expected, found, strict=True):
        assert_equal(one, other)


# --- the control pool ---------------------------------------------------------------------------


def test_the_control_pool_is_loaded_within_its_budget_and_changes_nothing(store, path):
    plan, reader = make_reader(store)
    expected = [reader.batch(numbers) for numbers in jobs()]
    for budget, words in ((10**9, "within .* loaded at the start"), (100, "above .* first drawn")):
        with CellSetStore.open(path) as other:
            _, reader = make_reader(other)
            pool = ControlPool(other, plan.pools.member, budget)
            is_control = other.conditions["is_control"].to_numpy()
            assert pool.num_bytes == sum(
                other.chunks["length"][is_control[other.chunks["condition"]]].tolist()
            )
            assert re.match(f"control pool: .* MB, {words}", pool.describe())
            pool.load()
            for one, batch in zip(expected, map(reader.batch, jobs()), strict=True):
                assert_equal(one, batch)
            pool.close()
            assert not reader_threads()


def test_a_damaged_control_chunk_is_told_at_the_start_and_raised_where_it_is_drawn(
    tmp_path, caplog
):
    path = write_store(tmp_path / "store")
    shard = path / "shards/control-00000.scl"
    raw = bytearray(shard.read_bytes())
    raw[300] ^= 1
    shard.write_bytes(raw)
    with CellSetStore.open(path) as store:
        plan, reader = make_reader(store)
        pool = ControlPool(store, plan.pools.member, 10**9)
        pool.load()
        pool.join()
        assert f"{shard}: chunk 0 of condition 0 (A549, DMSO, p1) is damaged" in caplog.text
        with pytest.raises(StoreError, match="chunk 0 of condition 0"):
            list(reader.batches(jobs(num=100), num_threads=1, depth=1))
        pool.close()


# --- endings ------------------------------------------------------------------------------------


def test_nothing_is_left_after_many_iterators(path):
    def left():
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count(str(path))

    before = None
    for turn in range(50):
        store = CellSetStore.open(path)
        plan, reader = make_reader(store)
        pool = ControlPool(store, plan.pools.member, 10**9)
        pool.load()
        batches = reader.batches(jobs(num=50), num_threads=2, depth=3)
        next(batches)
        if turn % 3 == 0:
            batches.close()
        elif turn % 3 == 1:
            reader.close()
        if turn % 2:
            pool.close()
        del batches, reader, pool
        store.close()
        del store
        if turn == 2:
            before = left()
    assert wait_for_no_threads()
    assert left() <= before
    assert left()[1] == 0


def test_an_interpreter_with_a_running_loader_exits(path, tmp_path):
    script = tmp_path / "exit.py"
    script.write_text(
        "import sys\n"
        "from scale.config import DataConfig\n"
        "from scale.data.module import CellSetDataModule\n"
        "module = CellSetDataModule(DataConfig(store=sys.argv[1]), set_size=48,\n"
        "                           num_summary_cells=24, seed=0)\n"
        "batches = module.train_batches(consumed_sets=0, sets_per_batch=4)\n"
        "print(next(batches)[0].num_sets)\n"
        "raise SystemExit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "4\n", "")


def test_memory_is_flat_over_epochs(store):
    import psutil

    plan, reader = make_reader(store)
    process = psutil.Process()
    sizes = []
    for epoch in range(6):
        start = epoch * plan.num_sets_per_epoch
        for _ in reader.batches(jobs(start, plan.num_sets_per_epoch // 3), num_threads=2, depth=4):
            pass
        gc.collect()
        sizes.append(process.memory_info().rss)
    # the first epochs fill caches of the allocator
    assert sizes[-1] - sizes[2] < 8e6
