"""However a ``prepare`` is cut, spread, killed and started again: the same store, byte for byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from prepare_source import MANY_TASKS, settings, write_source
from worker_tasks import die, refuse, square

from scale.config import GeneChoice, GenesConfig, KeepCells, Restart
from scale.data.ingest.journal import Journal
from scale.data.ingest.prepare import JOURNAL, prepare
from scale.data.ingest.stages import Sizes
from scale.data.ingest.workers import Workers
from scale.data.partial import PartialDirectory
from scale.data.store import CellSetStore
from scale.types import SourceError, StoreError


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    first = write_source(folder / "a.h5ad", num_cells=2_000, num_genes=200, num_nonzero=20)
    second = write_source(folder / "b.h5ad", num_cells=800, num_genes=200, num_nonzero=20, seed=1)
    return [first, second]


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """Files of the store of an uninterrupted run, and the lines of its journal."""
    path = tmp_path_factory.mktemp("expected") / "store"
    lines = []
    record = Journal.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Journal,
            "record",
            lambda self, task, result: (lines.append(task), record(self, task, result))[1],
        )
        prepare(settings(source, path), sizes=MANY_TASKS)
    return files_of(path), lines


# --- however the work is cut --------------------------------------------------------------------


def test_the_source_makes_many_tasks_of_every_kind(expected):
    files, lines = expected
    kinds = pd.Series([line.split()[0] for line in lines]).value_counts()
    assert kinds["labels"] == kinds["sha256"] == 2
    assert min(kinds["moments"], kinds["cells"], kinds["shards"]) >= 4
    shards = [name for name in files if name.startswith("shards/")]
    assert len(shards) >= 5
    assert {name for name in files if "/" in name} - set(shards) == {
        f"cells/part-{task:05d}.parquet" for task in range(kinds["shards"])
    }


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(block_cells=17, moment_cells=900, piece_bytes=60_000, bucket_bytes=40_000),
        Sizes(moment_cells=900, piece_bytes=10_000, bucket_bytes=40_000),
    ],
)
def test_blocks_and_pieces_change_no_byte(source, expected, tmp_path, sizes):
    prepare(settings(source, tmp_path / "store"), sizes=sizes)
    assert files_of(tmp_path / "store") == expected[0]


def test_processes_and_memory_change_no_byte(source, expected, tmp_path):
    config = settings(source, tmp_path / "store", num_workers=2, memory_bytes=1 << 33)
    prepare(config, sizes=MANY_TASKS)
    assert files_of(tmp_path / "store") == expected[0]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_buckets_and_shards_change_no_cell(source, expected, tmp_path):
    fingerprint = json.loads(expected[0]["manifest.json"])["fingerprint"]
    sizes = {}
    for shard_bytes in (1 << 30, 5_000):
        path = tmp_path / str(shard_bytes)
        config = settings(source, path, shard_bytes=shard_bytes)
        prepare(config, sizes=Sizes(moment_cells=MANY_TASKS.moment_cells))
        with CellSetStore.open(path, verify="full") as store:
            assert store.fingerprint == fingerprint
            files = store.manifest["files"]
        sizes[shard_bytes] = [f["size"] for f in files if f["path"].startswith("shards/")]
    assert len(sizes[1 << 30]) == 4  # controls and treated cells of two cell types
    assert len(sizes[5_000]) > 15
    assert max(sizes[5_000]) <= 5_000 + 16 + 7 * 3  # head of the file, padding of chunks


def test_every_cell_is_traced_to_its_row(source, expected, tmp_path):
    prepare(settings(source, tmp_path / "store"), sizes=MANY_TASKS)
    with CellSetStore.open(tmp_path / "store") as store:
        parts = sorted((store.path / "cells").glob("*.parquet"))
        cells = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
        stored = store.to_anndata()
        first_chunk = store.conditions["first_chunk"].to_numpy()
    frames = {path.name: ad.read_h5ad(path) for path in source}
    assert cells.groupby("source_file", observed=True).size().to_dict() == {
        name: frame.n_obs for name, frame in frames.items()
    }
    row = first_chunk[stored.obs["condition"]] * 64 + stored.obs.groupby("condition").cumcount()
    np.testing.assert_array_equal(cells["chunk"].astype(int) * 64 + cells["row"], row)
    for name, frame in frames.items():
        own = (cells["source_file"] == name).to_numpy()
        origin = frame[cells.loc[own, "source_row"].to_numpy()]
        assert list(origin.obs_names) == list(cells.loc[own, "barcode"])
        assert list(origin.obs["drug"]) == list(stored.obs.loc[own, "drug"])
        genes = list(stored.var_names)
        assert (stored.X[own] != origin[:, genes].X).nnz == 0


def test_repeated_barcodes_are_counted_and_may_be_left_out(tmp_path):
    path = write_source(tmp_path / "a.h5ad", num_cells=900, num_genes=200, num_nonzero=20)
    frame = ad.read_h5ad(path)
    frame.obs_names = [f"cell-\u00e9-{i % 600}" for i in range(900)]
    frame.write_h5ad(path)
    report = prepare(settings([path], tmp_path / "store"), sizes=MANY_TASKS)
    keys = frame.obs[["drug", "line"]].astype(str).agg("|".join, axis=1)
    keys = keys.where(frame.obs["drug"] != "DMSO", keys + "|" + frame.obs["plate"].astype(str))
    named = pd.DataFrame({"key": keys.to_numpy(), "name": frame.obs_names})
    assert report.num_repeated == named.duplicated().sum() > 0
    parts = (tmp_path / "store" / "cells").glob("*.parquet")
    names = pd.concat([pd.read_parquet(part) for part in parts])["barcode"]
    assert sorted(names) == sorted(frame.obs_names)
    config = settings([path], tmp_path / "bare", keep_cells=KeepCells.none)
    prepare(config, sizes=MANY_TASKS)
    assert not (tmp_path / "bare" / "cells").exists()


# --- however often it is killed -----------------------------------------------------------------


class Killed(BaseException):
    """In place of a signal."""


def test_a_run_killed_at_every_line_of_the_journal(source, expected, tmp_path, monkeypatch):
    """Each start finishes one task, and is killed in the middle of the line of the next."""
    files, lines = expected
    store, folder = tmp_path / "store", tmp_path / "store.partial"
    append = Journal._append
    state = {"room": 0}

    def append_and_die(self, line):
        if state["room"] == 0:
            text = json.dumps(line).encode()
            with (folder / JOURNAL).open("ab") as handle:
                handle.write(text[: len(text) // 2])
            raise Killed
        state["room"] -= 1
        append(self, line)

    monkeypatch.setattr(Journal, "_append", append_and_die)
    shards = {}
    for start in range(len(lines)):
        state["room"] = 1  # of the first start, the line about the settings
        with pytest.raises(Killed):
            prepare(settings(source, store), sizes=MANY_TASKS)
        assert not store.exists()
        whole = (folder / JOURNAL).read_bytes().splitlines()[:-1]
        done = [json.loads(line)["task"] for line in whole[1:]]
        assert len(done) == len(set(done))
        assert len(done) == start
        for line in map(json.loads, whole[1:]):
            for name in line["files"]:
                if name.startswith("content/shards/"):
                    shards[name.removeprefix("content/")] = (folder / name).stat()
    state["room"] = 1
    prepare(settings(source, store), sizes=MANY_TASKS)
    assert files_of(store) == files
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(shards) > 4
    for name, before in shards.items():
        after = (store / name).stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    """A store that was interrupted when the first shard was written."""

    def stop(what, done, total):
        if what == "write" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(source, tmp_path / "store"), sizes=MANY_TASKS, progress=stop)
    assert not (tmp_path / "store").exists()
    return tmp_path / "store"


def test_other_settings_or_inputs_are_refused_and_named(source, expected, interrupted):
    message = r"seed was 0, is 1\).* or restart=discard"
    with pytest.raises(StoreError, match=message):
        prepare(settings(source, interrupted, seed=1), sizes=MANY_TASKS)
    genes = GenesConfig(choice=GeneChoice.hvg, num=101)
    with pytest.raises(StoreError, match=r"genes.num was 100, is 101\)"):
        prepare(settings(source, interrupted, genes=genes), sizes=MANY_TASKS)
    with pytest.raises(StoreError, match=r"input 1 was \['b.h5ad', .*, is None"):
        prepare(settings(source[:1], interrupted), sizes=MANY_TASKS)
    lines = (interrupted.with_name("store.partial") / JOURNAL).read_text().count("\n")
    config = settings(source, interrupted, memory_bytes=1 << 30, run_dir="elsewhere")
    prepare(config, sizes=MANY_TASKS)
    assert lines > 10
    assert files_of(interrupted) == expected[0]


def test_the_rest_of_another_store_is_discarded_on_request(source, interrupted):
    config = settings(source, interrupted, seed=1, restart=Restart.discard)
    prepare(config, sizes=MANY_TASKS)
    with CellSetStore.open(interrupted, verify="full") as store:
        assert store.manifest["shuffle_seed"] == 1


def test_bad_input_leaves_nothing(source, tmp_path):
    frame = ad.read_h5ad(source[0])
    frame.X.indices[-1] = frame.X.indices[-2]
    path = tmp_path / "a.h5ad"
    frame.write_h5ad(path)
    with pytest.raises(SourceError, match=r"row 1999, gene .* stands twice in its row"):
        prepare(settings([path], tmp_path / "store"), sizes=MANY_TASKS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_kill_before_the_rename_costs_nothing(source, expected, tmp_path, monkeypatch):
    def die_first(self):
        raise Killed

    config = settings(source, tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(PartialDirectory, "commit", die_first)
        with pytest.raises(Killed):
            prepare(config, sizes=MANY_TASKS)
    before = {p.name: p.stat().st_ino for p in tmp_path.rglob("*.parquet")}
    report = prepare(config, sizes=MANY_TASKS)
    assert files_of(tmp_path / "store") == expected[0]
    assert {p.name: p.stat().st_ino for p in tmp_path.rglob("*.parquet")} == before
    assert report.num_cells == 2_800


def test_a_kill_behind_the_rename_is_no_hindrance(source, expected, tmp_path, monkeypatch):
    def die_last(self):
        self.leave()
        raise Killed

    config = settings(source, tmp_path / "store", overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(PartialDirectory, "abort", die_last)  # the last step of ``commit``
        with pytest.raises(Killed):
            prepare(config, sizes=MANY_TASKS)
    assert files_of(tmp_path / "store") == expected[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.partial"]
    prepare(config, sizes=MANY_TASKS)
    assert files_of(tmp_path / "store") == expected[0]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_damage_of_what_was_left(source, expected, interrupted):
    spill = sorted(interrupted.with_name("store.partial").glob("cells-*.bin"))
    content = bytearray(spill[1].read_bytes())
    content[len(content) // 2] ^= 1
    spill[1].write_bytes(content)
    spill[2].write_bytes(spill[2].read_bytes()[:-1])  # is read again
    with pytest.raises(StoreError, match=rf"{spill[1].name} is damaged .* run prepare again"):
        prepare(settings(source, interrupted), sizes=MANY_TASKS)
    prepare(settings(source, interrupted), sizes=MANY_TASKS)
    assert files_of(interrupted) == expected[0]


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_return_every_result_and_tell_how_far_they_are(num_workers):
    told = []
    with Workers(num_workers) as workers:
        first = dict(workers.run(square, 10, [1, 2, 3], told.append))
        second = dict(workers.run(square, 20, [4, 5], told.append))
    assert {job: value for job, (value, _) in first.items()} == {0: 11, 1: 14, 2: 19}
    assert {job: value for job, (value, _) in second.items()} == {0: 36, 1: 45}
    assert sum(told) == 1 + 2 + 3 + 4 + 5 + 5
    processes = {pid for _, pid in [*first.values(), *second.values()]}
    assert (processes == {os.getpid()}) == (num_workers == 1)


def test_what_happens_in_a_worker_is_told_as_it_is():
    with Workers(2) as workers, pytest.raises(SourceError) as caught:
        list(workers.run(refuse, None, [1, 2], lambda cells: None))
    assert str(caught.value) in ("file 1: bad cell", "file 2: bad cell")
    message = r"ended by signal 9; perhaps for want of memory"
    with Workers(2) as workers, pytest.raises(ChildProcessError, match=message):
        list(workers.run(die, None, [1, 2], lambda cells: None))


# --- real signals -------------------------------------------------------------------------------


class Server:
    """A process that has imported everything, and forks a child for each ``prepare``."""

    def __init__(self):
        here = Path(__file__)
        self._process = subprocess.Popen(
            [sys.executable, here.with_name("prepare_source.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parents[2])},
        )

    def start(self, source, store, num_workers=1):
        """Begin to prepare; return the process."""
        self._process.stdin.write(f"{source} {store} {num_workers}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """Return exit status (or minus the signal), largest memory and seconds of CPU time."""
        status, memory, micros = map(int, self._process.stdout.readline().split())
        return status, memory, 1e-6 * micros

    def prepare(self, source, store):
        """Do it to the end; return largest memory and seconds of CPU time."""
        self.start(source, store)
        status, memory, seconds = self.wait()
        assert status == 0
        return memory, seconds

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def prepared(server, tmp_path_factory):
    """Number of cells -> its source, and the store, memory and CPU time of an undisturbed run."""
    made = {}
    for num_cells in (10_000, 40_000):
        folder = tmp_path_factory.mktemp("prepared")
        source = write_source(
            folder / "cells.h5ad", num_cells=num_cells, num_genes=3_000, num_nonzero=300
        )
        made[num_cells] = source, folder / "store", *server.prepare(source, folder / "store")
    return made


@pytest.mark.slow
def test_twenty_kills_at_random_moments(server, prepared, tmp_path):
    """Moments of its CPU time, which does not pass while the machine does something else.

    A run that ended before its moment does not count: it may be faster than the one measured.
    """
    source, undisturbed, _, seconds = prepared[10_000]
    expected = files_of(undisturbed)
    generator = random.Random(20)
    store, num_killed, num_started = tmp_path / "store", 0, 0
    while num_killed < 20:
        num_started += 1
        assert num_started <= 80
        moment = generator.uniform(0, seconds)
        process = server.start(source, store)
        clock = ~process << 3 | 2  # what clock_getcpuclockid of the C library returns
        with suppress(OSError):  # it has ended
            while time.clock_gettime(clock) < moment:
                time.sleep(0.001)
            os.kill(process, signal.SIGKILL)
        status, *_ = server.wait()
        num_killed += status == -signal.SIGKILL
        if not store.exists():
            server.prepare(source, store)
        assert files_of(store) == expected
        shutil.rmtree(store)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(server, prepared, tmp_path):
    source, undisturbed, *_ = prepared[40_000]
    store = tmp_path / "store"
    process = server.start(source, store, 2)
    until = time.monotonic() + 60
    children = []
    while len(children) < 3 and time.monotonic() < until:  # one keeps track of resources
        time.sleep(0.05)
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    while not list(tmp_path.glob("store.partial/cells-*")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    assert server.wait()[0] == -signal.SIGKILL
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not store.exists()
    server.prepare(source, store)
    assert files_of(store) == files_of(undisturbed)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(prepared):
    (_, _, few, _), (source, _, many, _) = prepared[10_000], prepared[40_000]
    assert source.stat().st_size > 70_000_000
    # 72 MB of values lie between them; what is freed is kept, so the largest size varies by some MB
    assert many - few < 20_000_000, f"{many - few:,}"
