"""Segments are published whole or not at all, whatever else writes or crashes."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_helpers import FINGERPRINT, expected_kv, geometry, path_of, read_back, some_tokens, write_prefix

from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.local_disk import FileBlobWriter

IDS = some_tokens(40)


def writers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("contiguouskv-write")]


def test_chunks_may_come_in_any_order(store_path: Path) -> None:
    g = geometry(layers_per_group=2)
    with PrefixStore(store_path) as store:
        with store.inner.begin_segment(FINGERPRINT, g, IDS[:38], 0) as writer:
            for layer in (2, 0, 1):
                kv = expected_kv(g, IDS[:38], layer)
                kv[-1, :, :, 2:] = float("nan")  # Past the last token: never stored.
                writer.write_chunks(layer, 7, kv[7:])
                writer.write_chunks(layer, 0, kv[:7])
            writer.write_index(1, torch.ones(2, 4, 10, 8, dtype=torch.int8), torch.ones(2, 8))
            stored = writer.commit()
        assert store.verify() == []
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(g, IDS[:38], layer))
        assert stored.spans[0].segment.read_tensor("leader_keys.2").shape == (10, 2, 4, 8)
        assert not writers()


def test_an_error_on_the_writer_thread_is_raised_by_commit(store_path: Path) -> None:
    def fail() -> None:
        raise ValueError("from the writer thread")

    with PrefixStore(store_path) as store:
        for layer in (0, 2):
            writer = store.inner.begin_segment(FINGERPRINT, geometry(), IDS, 0)
            writer.write_chunks(layer, 0, expected_kv(geometry(), IDS, layer), ready=fail)
            with pytest.raises(ValueError, match="from the writer thread"):
                writer.commit()
            with pytest.raises(StoreError, match="before"):
                writer.commit()
        assert store.entries() == []
        assert not list(store_path.glob("partial/*"))


def test_an_incomplete_segment_is_not_published(store_path: Path) -> None:
    g = geometry()
    with PrefixStore(store_path) as store:
        writer = store.inner.begin_segment(FINGERPRINT, g, IDS, 0)
        for layer in range(3):
            writer.write_chunks(layer, 0, expected_kv(g, IDS, layer)[: 10 - (layer == 1)])
        with pytest.raises(StoreError, match="layer 1, chunk 9"):
            writer.commit()
        writer = store.inner.begin_segment(FINGERPRINT, g, IDS, 0)
        for layer in range(3):
            writer.write_chunks(layer, 0, expected_kv(g, IDS, layer))
        with pytest.raises(StoreError, match=r"no key index for layers \[1\]"):
            writer.commit()
        assert store.entries() == []


@pytest.mark.parametrize(
    ("layer", "first", "make"),
    [
        pytest.param(3, 0, lambda kv: kv, id="layer"),
        pytest.param(0, 1, lambda kv: kv, id="past the end"),
        pytest.param(0, -1, lambda kv: kv, id="before the beginning"),
        pytest.param(0, 0, lambda kv: kv.half(), id="dtype"),
        pytest.param(0, 0, lambda kv: kv[0], id="shape"),
        pytest.param(0, 0, lambda kv: kv.transpose(3, 4).contiguous().transpose(3, 4), id="strides"),
    ],
)
def test_wrong_chunks_are_refused(
    store_path: Path, layer: int, first: int, make: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with PrefixStore(store_path) as store, store.inner.begin_segment(FINGERPRINT, geometry(), IDS, 0) as writer:
        with pytest.raises(InputError):
            writer.write_chunks(layer, first, make(expected_kv(geometry(), IDS, 0)))
        with pytest.raises(InputError, match="key_index"):
            writer.write_index(1, torch.zeros(1, dtype=torch.int8), torch.ones(2, 8))
        with pytest.raises(InputError, match="layer 0"):
            writer.write_index(0, torch.zeros(1, dtype=torch.int8), torch.ones(2, 8))


def test_a_dropped_writer_leaves_nothing_behind(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        writer = store.inner.begin_segment(FINGERPRINT, geometry(), IDS, 0)
        assert list(store_path.glob("partial/*.partial"))
        del writer
        gc.collect()
        assert not list(store_path.glob("partial/*"))
        assert not writers()


def test_many_threads_may_store_the_same_prefix(store_path: Path) -> None:
    results: list[object] = []
    with PrefixStore(store_path) as store:

        def work() -> None:
            try:
                results.append(write_prefix(store, IDS).tokens)
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [40] * 8
        assert len(store.entries()) == 1
        assert store.stats.published == 1
        assert not list(store_path.glob("partial/*"))
        assert store.verify() == []


def _store_in_process(path: Path, seed: int) -> None:
    with PrefixStore(path) as store:
        for number in range(4):
            write_prefix(store, some_tokens(40, seed=number))
            write_prefix(store, some_tokens(40, seed=100 * seed + number + 10))
            assert store.inner.lookup(FINGERPRINT, some_tokens(40, seed=number), 4).tokens == 40  # type: ignore[union-attr]


def test_many_processes_may_open_and_fill_one_new_store(store_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_store_in_process, args=(store_path, seed)) for seed in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    with PrefixStore(store_path) as store:
        assert len(store.entries()) == 4 + 4 * 4
        assert store.verify() == []
        assert store.gc().removed == ()


def test_a_forked_child_may_use_the_store_of_its_parent(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        stored = write_prefix(store, IDS)
        read_back(store, stored, [0])
        child = os.fork()
        if child == 0:
            ok = False
            try:
                found = store.inner.lookup(FINGERPRINT, IDS, 4)
                ok = found is not None and torch.equal(read_back(store, found, [1])[0], expected_kv(geometry(), IDS, 1))
            finally:
                os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(read_back(store, stored, [1])[0], expected_kv(geometry(), IDS, 1))


def test_a_look_up_does_not_wait_for_a_publish(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_publish, go_on = threading.Event(), threading.Event()
    real = FileBlobWriter.publish

    def slow(writer: FileBlobWriter) -> None:
        in_publish.set()
        assert go_on.wait(30)
        real(writer)

    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        monkeypatch.setattr(FileBlobWriter, "publish", slow)
        thread = threading.Thread(target=write_prefix, args=(store, IDS, 5))
        thread.start()
        assert in_publish.wait(30)
        # Neither sees half of what is being published.
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 20  # type: ignore[union-attr]
        go_on.set()
        thread.join()
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]


def test_copies_share_the_store_and_its_files(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        stored = write_prefix(store, IDS)
        assert copy.deepcopy(store) is store
        assert copy.deepcopy(stored).spans[0].segment is stored.spans[0].segment


CRASH = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    from store_helpers import *
    from hf_contiguouskv.store import PrefixStore, publishing
    store = PrefixStore({path!r})
    write_prefix(store, some_tokens(40))
    if {moment!r} == "while writing":
        writer = store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(40, seed=1), 0)
        writer.write_chunks(0, 0, expected_kv(geometry(), some_tokens(40, seed=1), 0))
    else:
        publishing.insert_segment = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_prefix(store, some_tokens(40, seed=1))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between rename and index"])
def test_a_crash_loses_nothing_that_was_published_and_opening_cleans_up(store_path: Path, moment: str) -> None:
    code = textwrap.dedent(CRASH).format(here=str(Path(__file__).parent), path=str(store_path), moment=moment)
    root = str(Path(__file__).parents[2])
    crashed = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": root}, timeout=120)
    assert crashed.returncode == -signal.SIGKILL
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]
        # What was in its place already has been indexed; what was not is gone.
        there = store.inner.lookup(FINGERPRINT, some_tokens(40, seed=1), 4)
        assert (there is None) == (moment == "while writing")
        assert not list(store_path.glob("partial/*"))
        again = store.gc()
        assert (again.removed, again.indexed, again.forgotten) == ((), (), ())
        assert store.verify() == []


def test_gc_leaves_alone_what_is_being_written(store_path: Path) -> None:
    with PrefixStore(store_path) as store, store.inner.begin_segment(FINGERPRINT, geometry(), IDS, 0) as writer:
        with PrefixStore(store_path) as other:
            report = other.gc()
        assert len(report.in_use) == 1
        assert report.removed == ()
        for layer in range(3):
            writer.write_chunks(layer, 0, expected_kv(geometry(), IDS, layer))
        writer.write_index(1, torch.ones(2, 4, 10, 8, dtype=torch.int8), torch.ones(2, 8))
        assert writer.commit().tokens == 40


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "no tables", "broken page"])
def test_the_index_is_rebuilt_from_the_files(store_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        write_prefix(store, IDS, first_chunk=5)
    index = store_path / "index.sqlite"
    if damage == "missing":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"not a database" * 1000)
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "no tables":
        index.unlink()
        sqlite3.connect(index).close()
        with sqlite3.connect(index) as db:
            db.execute("CREATE TABLE other (x)")
    else:
        content = bytearray(index.read_bytes())
        for page in range(1, len(content) // 4096):
            content[page * 4096 : page * 4096 + 2048] = b"\xa5" * 2048
        index.write_bytes(content)
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]
        assert len(store.entries()) == 2
        # Said once, for nobody else will find it out.
        reported = [str(problem) for problem in store.verify()]
        assert len(reported) == (damage != "missing")
        assert all("index: was damaged" in text for text in reported)
        assert store.verify() == []
        moved = list(store_path.glob("index.sqlite.damaged-*"))
        assert len(moved) == (damage != "missing")
        assert len(store.gc().removed) == len(moved)


def test_an_index_that_disappears_under_an_open_store_is_rebuilt(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)
        for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            (store_path / name).unlink(missing_ok=True)
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]


@pytest.mark.parametrize("opened_before", [True, False])
@pytest.mark.parametrize("damage", ["missing", "cut", "header", "foreign"])
def test_a_lost_file_shortens_the_match_and_can_be_stored_again(
    store_path: Path, damage: str, opened_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        path = path_of(write_prefix(store, IDS, first_chunk=5).spans[1].segment)
        if not opened_before:
            store.close()
            store = PrefixStore(store_path)
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            os.truncate(path, path.stat().st_size - 1)
        elif damage == "header":
            fresh = path.with_suffix(".new")
            fresh.write_bytes(b"\0" * path.stat().st_size)
            fresh.replace(path)
        else:
            fresh = path.with_suffix(".new")
            fresh.write_bytes(path_of(store.inner.lookup(FINGERPRINT, IDS[:20], 4).spans[0].segment).read_bytes())  # type: ignore[union-attr]
            fresh.replace(path)
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 20  # type: ignore[union-attr]
        assert "lost" in caplog.text
        write_prefix(store, IDS, first_chunk=5)
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]
        assert store.verify() == []
        store.close()


def test_children_of_a_lost_parent_are_found_again_when_it_is_stored_anew(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        parent = path_of(write_prefix(store, IDS[:20]).spans[0].segment)
        write_prefix(store, IDS, first_chunk=5)
        parent.unlink()
        assert store.inner.lookup(FINGERPRINT, IDS, 4) is None
        assert len(store.gc().unreachable) == 1
        write_prefix(store, IDS[:20])
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]
        assert store.gc().unreachable == ()


def test_verify_names_every_damaged_part(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        segment = write_prefix(store, IDS).spans[0].segment
        write_prefix(store, some_tokens(40, seed=1))
        seen: list[tuple[int, int]] = []
        assert store.verify(progress=lambda done, total: seen.append((done, total))) == []
        assert seen[-1][0] == seen[-1][1] == store.stats.segment_bytes
        for offset in (segment.extents().offset(1, 3), segment.tensor_extent("key_index.1")[0] + 9):
            with path_of(segment).open("r+b") as raw:
                raw.seek(offset)
                byte = raw.read(1)[0]
                raw.seek(offset)
                raw.write(bytes([byte ^ 255]))
        problems = [str(problem) for problem in store.verify()]
        assert len(problems) == 2
        assert any("layer 1, chunk 3" in text for text in problems)
        assert any("key_index.1" in text for text in problems)
        assert store.verify(store.entries()[1].key) == []
        with pytest.raises(SegmentCorruptError, match=r"key_index\.1"):
            segment.read_tensor("key_index.1")
        store.inner.discard(segment, "a test")
        assert store.inner.lookup(FINGERPRINT, IDS, 4) is None
        assert store.verify() == []
        assert (store_path / "damaged" / path_of(segment).name).exists()


def test_background_work_runs_in_order_and_failures_are_counted(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    def fail() -> None:
        raise ValueError("on purpose")

    with PrefixStore(store_path) as store:
        store.inner.submit_background(slow)
        store.inner.submit_background(fail)
        store.inner.submit_background(lambda: (done.append(2), store.flush()))
        store.flush()
        assert done == [1, 2]
        assert store.inner.background_failures == 1
        assert "on purpose" in caplog.text
        store.inner.submit_background(slow)
    assert done == [1, 2, 1]


def test_the_interpreter_waits_for_background_work(store_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from store_helpers import *
store = PrefixStore({str(store_path)!r})
store.inner.submit_background(lambda: (time.sleep(0.3), write_prefix(store, some_tokens(40))))
"""
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": root}, timeout=120, check=True
    )
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, IDS, 4).tokens == 40  # type: ignore[union-attr]
