"""A store at an address equals the local one; what is fetched, kept, resumed and refused."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cell_set_store import write_store

from scale.config import DataConfig
from scale.data import remote
from scale.data.module import CellSetDataModule
from scale.data.remote import default_cache_dir, is_remote
from scale.data.store import CellSetStore
from scale.types import StoreError

pytest.importorskip("aiohttp")

BLOCK = 1_000
"""Bytes of a request in these tests: every shard takes several."""


class Server:
    """Serves a folder over HTTP on this machine, in ranges, and does harm when asked to."""

    def __init__(self, folder):
        self.folder = folder
        self.requests = []
        self.answers_ranges = True
        self.delay = 0.0
        self.failures = 0
        """Requests that will be answered with 503."""
        self.damaged = {}
        """Name -> how often it will be sent with one byte changed."""
        self.stops_after = None
        """Bytes of shards after which no request is answered any more."""
        self._lock = threading.Lock()
        self._sent = 0
        self._is_closed = threading.Event()
        self._connections = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def names(self):
        return [name for name, _ in self.requests]

    def shards(self):
        return {name.split("/", 1)[1] for name in self.names() if "/shards/" in name}

    def ranges(self, name):
        return [span for found, span in self.requests if found.endswith(name)]

    def close(self):
        self._is_closed.set()
        self._server.shutdown()
        for connection in self._connections:
            with suppress(OSError):  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()

    def answer(self, name, span):
        """Return status and bytes."""
        with self._lock:
            self.requests.append((name, span))
            if self.failures:
                self.failures -= 1
                return 503, b""
            path = self.folder / name
            if not path.is_file():
                return 404, b""
            content = path.read_bytes()
            if span is not None and self.answers_ranges:
                content = content[span[0] : span[1] + 1]
            if self.damaged.get(name):
                self.damaged[name] -= 1
                content = bytes([content[0] ^ 1]) + content[1:]
            if "/shards/" in name:
                self._sent += len(content)
            is_stopped = self.stops_after is not None and self._sent > self.stops_after
        if is_stopped:
            self._is_closed.wait()
        if "/shards/" in name:
            time.sleep(self.delay)
        return 206 if span is not None and self.answers_ranges else 200, content

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                server._connections.append(self.connection)

            def do_GET(self):
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                span = None if found is None else (int(found[1]), int(found[2]))
                status, content = server.answer(self.path.lstrip("/"), span)
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client was killed
                    self.close_connection = True

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_store(folder / "toy")
    return folder


@pytest.fixture
def local(folder):
    with CellSetStore.open(folder / "toy") as store:
        yield store


@pytest.fixture
def server(folder, tmp_path):
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "_WAIT_SECONDS", (0.01, 0.02))
    return tmp_path / "cache"


def shard_of(store, condition):
    shards = [file for file in store.manifest["files"] if file["path"].startswith("shards/")]
    return shards[store.chunks["shard"][store.conditions.at[condition, "first_chunk"]]]


def one_condition_per_shard(store):
    """Return a treated condition that lies in one shard alone, for each shard, by its name."""
    found = {}
    for condition, row in store.conditions.iterrows():
        chunks = store.chunks[row["first_chunk"] : row["first_chunk"] + row["num_chunks"]]
        if not row["is_control"] and len(set(chunks["shard"].tolist())) == 1:
            found[shard_of(store, condition)["path"]] = condition
    assert len(found) >= 3
    return found


def assert_same_cells(store, other, condition):
    one, two = store.read(condition), other.read(condition)
    for name in ("indptr_P", "indices_M", "counts_M", "library_N"):
        assert (getattr(one, name) == getattr(two, name)).all()


def cached(cache):
    return {f"shards/{path.name}" for path in cache.glob("*/shards/*")}


# --- the same data ------------------------------------------------------------------------------


def test_batches_equal_those_of_the_local_store_and_held_out_shards_are_not_fetched(
    folder, local, server, cache, tmp_path
):
    split = tmp_path / "split.toml"
    split.write_text(
        '[datasets]\ntoy = "."\n[training]\ntoy = "train"\n[zeroshot]\n"toy.K562" = "test"\n'
    )

    def batches(store):
        config = DataConfig(store=store, split=str(split), cache_dir=str(cache), reader_threads=3)
        module = CellSetDataModule(config, set_size=32, num_summary_cells=16, seed=1)
        try:
            steps = module.train_batches(consumed_sets=5, sets_per_batch=8)
            yield from itertools.chain.from_iterable(itertools.islice(steps, 12))
            steps.close()
            yield None
            yield from module.part_batches("test", max_sets_per_condition=None, sets_per_batch=4)
        finally:
            module.close()

    held_out = {
        shard_of(local, condition)["path"]
        for condition, row in local.conditions.iterrows()
        if row["cell_type"] == "K562" and not row["is_control"]
    }
    num_sets = 0
    for ours, theirs in zip(
        batches(f"{server.address}/toy"), batches(str(folder / "toy")), strict=True
    ):
        if ours is None:
            assert server.shards()
            assert not server.shards() & held_out
            continue
        num_sets += len(ours.set_index_B)
        for field in fields(ours):
            one, two = getattr(ours, field.name), getattr(theirs, field.name)
            assert one.numpy().tobytes() == two.numpy().tobytes(), field.name
            assert one.dtype is two.dtype
    assert num_sets > 100
    assert held_out <= server.shards()


def test_only_what_is_touched_is_fetched_and_only_once(local, server, cache):
    address = f"{server.address}/toy"
    with CellSetStore.open(address, cache_dir=cache) as store:
        small = {f["path"] for f in store.manifest["files"] if "/" not in f["path"]}
        assert {name.split("/", 1)[1] for name in server.names()} == {"manifest.json", *small}
        assert store.address == address
        assert store.fingerprint == local.fingerprint
        names = one_condition_per_shard(local)
        for number, (name, condition) in enumerate(names.items(), start=1):
            assert_same_cells(store, local, condition)
            assert len(server.shards()) == number
            size = shard_of(local, condition)["size"]
            expected = [(i, min(i + BLOCK, size) - 1) for i in range(0, size, BLOCK)]
            assert server.ranges(name) == expected
            assert len(expected) > 1
            assert (store.path / name).read_bytes() == (local.path / name).read_bytes()
    server.requests.clear()
    with CellSetStore.open(address + "/", cache_dir=cache) as store:
        for condition in names.values():
            assert_same_cells(store, local, condition)
    assert server.names() == ["toy/manifest.json"]


def test_a_file_address_needs_no_server(folder, local, cache):
    with CellSetStore.open(f"file://{folder}/toy", cache_dir=cache) as store:
        assert (store.to_anndata().X != local.to_anndata().X).nnz == 0
        assert store.path.parent == cache
        store.verify()


def test_a_local_store_needs_no_fsspec(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with CellSetStore.open(str(folder / "toy"), verify="full") as store:
        store.read(0)


# --- fetches that stop, fail or meet ------------------------------------------------------------

READ = """
import os, sys, zlib
from scale.data import remote
remote._BLOCK_BYTES = int(sys.argv[4])
files = remote.RemoteFiles(sys.argv[1], cache_dir=sys.argv[2])
print("open", flush=True)
sys.stdin.readline()
descriptor = files.open(sys.argv[3])
print(zlib.crc32(os.read(descriptor, 1 << 20)), flush=True)
sys.stdin.readline()
"""


class Reading:
    """A process that opens the store, reads a shard when told, and goes on using it."""

    def __init__(self, server, cache, name):
        arguments = [f"{server.address}/toy", cache, name, BLOCK]
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def tell(self):
        assert self.process.stdout.readline() == "open\n"
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def crc32(self):
        return int(self.process.stdout.readline())


def test_a_fetch_that_was_killed_goes_on_where_it_was(local, server, cache):
    name, condition = next(iter(one_condition_per_shard(local).items()))
    size = (local.path / name).stat().st_size
    assert size > 3 * BLOCK
    server.stops_after = 2 * BLOCK
    with Reading(server, cache, name) as reading:
        reading.tell()
        while len(server.ranges(name)) < 3:
            assert reading.process.poll() is None
            time.sleep(0.01)
    (partial,) = cache.glob(f"*/{name}.partial")
    assert partial.stat().st_size == 2 * BLOCK
    server.stops_after = None
    server.requests.clear()
    with CellSetStore.open(f"{server.address}/toy", cache_dir=cache) as store:
        assert_same_cells(store, local, condition)
    assert server.ranges(name)[0][0] == 2 * BLOCK
    assert cached(cache) == {name}


def test_two_processes_share_one_fetch(local, server, cache):
    name = next(iter(one_condition_per_shard(local)))
    content = (local.path / name).read_bytes()
    server.delay = 0.1
    with Reading(server, cache, name) as one, Reading(server, cache, name) as two:
        one.tell()
        two.tell()
        assert one.crc32() == two.crc32() == zlib.crc32(content)
    size = len(content)
    assert server.ranges(name) == [(i, min(i + BLOCK, size) - 1) for i in range(0, size, BLOCK)]


def test_threads_share_one_fetch(local, server, cache):
    name, condition = next(iter(one_condition_per_shard(local).items()))
    server.delay = 0.02
    with CellSetStore.open(f"{server.address}/toy", cache_dir=cache) as store:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(store.read, [condition] * 6))
        assert_same_cells(store, local, condition)
    assert len(server.ranges(name)) == len(set(server.ranges(name)))


def test_a_request_that_fails_is_tried_again(local, server, cache):
    server.failures = 2
    with CellSetStore.open(f"{server.address}/toy", cache_dir=cache) as store:
        (_, other), *_, (name, condition) = one_condition_per_shard(local).items()
        server.failures = 2
        assert_same_cells(store, local, other)
        server.failures = 99
        with pytest.raises(StoreError, match=rf"/toy/{name} cannot be fetched .*503"):
            store.read(condition)
        server.failures = 0
        assert_same_cells(store, local, condition)


# --- damage -------------------------------------------------------------------------------------


def test_what_comes_damaged_is_fetched_again_once(local, server, cache, caplog):
    name, condition = next(iter(one_condition_per_shard(local).items()))
    server.damaged = {f"toy/{name}": 1, "toy/genes.parquet": 1}
    with CellSetStore.open(f"{server.address}/toy", cache_dir=cache) as store:
        assert_same_cells(store, local, condition)
    assert caplog.text.count("came damaged and is fetched again") == 2


def test_what_stays_damaged_is_named_and_not_kept(local, server, cache):
    name, condition = next(iter(one_condition_per_shard(local).items()))
    server.damaged = {f"toy/{name}": 10**6}
    message = rf"{server.address}/toy/{name} is damaged: sha256 .* fetched twice"
    with CellSetStore.open(f"{server.address}/toy", cache_dir=cache) as store:
        for _ in range(2):
            with pytest.raises(StoreError, match=message):
                store.read(condition)
        assert not any((store.path / "shards").iterdir())
    server.damaged = {"toy/manifest.json": 1}
    with pytest.raises(StoreError, match=r"/toy/manifest.json is damaged"):
        CellSetStore.open(f"{server.address}/toy", cache_dir=cache)


def test_damage_in_the_cache_is_repaired(local, server, cache):
    name, condition = next(iter(one_condition_per_shard(local).items()))
    address = f"{server.address}/toy"
    with CellSetStore.open(address, cache_dir=cache) as store:
        store.read(condition)
        folder = store.path
    os.truncate(folder / name, 100)  # seen by its size
    genes = bytearray((folder / "genes.parquet").read_bytes())
    genes[50] ^= 4
    (folder / "genes.parquet").write_bytes(genes)
    with CellSetStore.open(address, cache_dir=cache) as store:
        assert_same_cells(store, local, condition)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 4
    (folder / name).write_bytes(content)  # seen when every byte is looked at
    with CellSetStore.open(address, cache_dir=cache, verify="full") as store:
        assert {path.name for path in (store.path / "shards").iterdir()} == {
            path.name for path in (local.path / "shards").iterdir()
        }
        assert (folder / name).read_bytes() == (local.path / name).read_bytes()


def test_a_store_that_was_replaced_at_its_address(folder, server, cache, tmp_path):
    server.folder = tmp_path / "served"
    shutil.copytree(folder / "toy", server.folder / "toy")
    address = f"{server.address}/toy"
    with CellSetStore.open(address, cache_dir=cache) as before:
        names = one_condition_per_shard(before)
        shutil.rmtree(server.folder / "toy")
        write_store(server.folder / "toy", sizes=(64, 150, 97, 16, 40))
        with pytest.raises(StoreError, match="if the store was replaced meanwhile, open it anew"):
            before.read(next(iter(names.values())))
        with (
            CellSetStore.open(address, cache_dir=cache) as after,
            CellSetStore.open(server.folder / "toy") as expected,
        ):
            assert after.fingerprint == expected.fingerprint != before.fingerprint
            assert after.path != before.path
            for condition in one_condition_per_shard(expected).values():
                assert_same_cells(after, expected, condition)


# --- the limit ----------------------------------------------------------------------------------


def test_the_cache_makes_room_by_removing_what_was_opened_longest_ago(local, server, cache):
    names = one_condition_per_shard(local)
    sizes = {name: (local.path / name).stat().st_size for name in names}
    limit = max(sizes.values()) * 3
    address = f"{server.address}/toy"
    order = []
    for _ in range(2):
        for name, condition in names.items():
            with CellSetStore.open(address, cache_dir=cache, cache_bytes=limit) as store:
                assert_same_cells(store, local, condition)
            order = [*(n for n in order if n != name), name]
            kept = cached(cache)
            assert sum(sizes[n] for n in kept) <= limit
            assert kept == set(order[-len(kept) :])
            assert (
                len(kept) == min(len(order), 3)
                or sum(sizes[n] for n in order[-len(kept) - 1 :]) > limit
            )


def test_shards_in_use_stay_beyond_the_limit_and_it_is_said_once(local, server, cache, caplog):
    names = one_condition_per_shard(local)
    address = f"{server.address}/toy"
    with CellSetStore.open(address, cache_dir=cache, cache_bytes=1) as store:
        for condition in names.values():
            assert_same_cells(store, local, condition)
        store.read(0)  # a control shard, which is mapped
        num_used = len(names) + 1
        assert len(cached(cache)) == num_used
        with CellSetStore.open(address, cache_dir=cache, cache_bytes=1) as other:
            other.read(next(iter(names.values())))
        assert len(cached(cache)) == num_used
        server.requests.clear()
        for condition in names.values():
            assert_same_cells(store, local, condition)
        assert not server.shards()
    assert caplog.text.count("shards in use leave no room for data.cache_bytes=1") == 1


def test_a_shard_that_another_process_uses_stays_until_it_ends(local, server, cache):
    first, second, third = itertools.islice(one_condition_per_shard(local).items(), 3)
    address = f"{server.address}/toy"
    with Reading(server, cache, first[0]) as reading:
        reading.tell()
        reading.crc32()
        with CellSetStore.open(address, cache_dir=cache, cache_bytes=1) as store:
            store.read(second[1])
        assert cached(cache) == {first[0], second[0]}
    with CellSetStore.open(address, cache_dir=cache, cache_bytes=1) as store:
        store.read(third[1])
    assert cached(cache) == {third[0]}


# --- what can go wrong --------------------------------------------------------------------------


def test_what_was_fetched_works_when_the_server_is_gone(folder, local, cache, caplog):
    names = one_condition_per_shard(local)
    *known, unknown = names.values()
    server = Server(folder)
    address = f"{server.address}/toy"
    try:
        with CellSetStore.open(address, cache_dir=cache) as store:
            for condition in known:
                store.read(condition)
    finally:
        server.close()
    with caplog.at_level(logging.WARNING), CellSetStore.open(address, cache_dir=cache) as store:
        assert "going on with what was fetched of it before" in caplog.text
        for condition in known:
            assert_same_cells(store, local, condition)
        with pytest.raises(StoreError, match=r"http://127.* cannot be fetched \(ClientConnector"):
            store.read(unknown)
    with pytest.raises(StoreError, match=r"/toy/manifest.json cannot be fetched"):
        CellSetStore.open(address, cache_dir=cache.with_name("other"))


def test_a_store_that_is_not_there(server, cache, folder, tmp_path):
    with pytest.raises(StoreError, match=r"/x/manifest.json does not exist; there is no"):
        CellSetStore.open(f"{server.address}/x", cache_dir=cache)
    server.folder = tmp_path / "served"
    shutil.copytree(folder / "toy", server.folder / "toy")
    (server.folder / "toy" / "codes.parquet").unlink()
    with pytest.raises(StoreError, match=r"toy/codes.parquet does not exist; the manifest names"):
        CellSetStore.open(f"{server.address}/toy", cache_dir=cache)


def test_a_server_without_ranges(local, server, cache):
    server.answers_ranges = False
    with pytest.raises(StoreError, match="or the server does not answer range requests"):
        CellSetStore.open(f"{server.address}/toy", cache_dir=cache)


def test_addresses_that_cannot_be_opened(cache, monkeypatch):
    with pytest.raises(StoreError, match=r"gopher://host/store cannot be opened: .*gopher"):
        CellSetStore.open("gopher://host/store", cache_dir=cache)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(StoreError, match=r"pip install 'scale-virtual-cell\[remote\]'"):
        CellSetStore.open("https://host/store", cache_dir=cache)


def test_a_path_is_no_address(tmp_path):
    assert is_remote("s3://bucket/store")
    assert not is_remote("data/toy")
    assert not is_remote(tmp_path)
    with pytest.raises(StoreError, match="a Path loses a slash of an address; give it as text"):
        CellSetStore.open(type(tmp_path)("https://host/store"))


def test_a_cache_that_cannot_be_written_names_the_setting(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used: .* choose another.* data.cache_dir"):
        CellSetStore.open(f"{server.address}/toy", cache_dir=tmp_path / "file" / "cache")


def test_the_cache_is_in_the_users_cache_folder_if_no_setting_says_it(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with CellSetStore.open(f"{server.address}/toy") as store:
        assert store.path.parent == tmp_path / "xdg" / "scale" / "stores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "scale" / "stores"


def test_a_password_is_not_shown(server, cache, caplog):
    address = server.address.replace("//", "//user:secret@") + "/toy"
    with caplog.at_level(logging.DEBUG), CellSetStore.open(address, cache_dir=cache) as store:
        assert store.address == f"{server.address}/toy"
        store.read(0)
    records = [r.getMessage() for r in caplog.records if r.name.startswith("scale")]
    assert any("fetched" in text for text in records)
    assert not any("secret" in text for text in records)
    for path in (cache / "addresses").iterdir():
        assert json.loads(path.read_text())["address"] == f"{server.address}/toy"
