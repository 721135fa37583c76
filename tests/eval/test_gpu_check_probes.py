"""The probes of the GPU check, run on a CPU with stand-ins for CUDA's calls: every line of them, with other sizes."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.gpu_check import copy_probes, device, disk_probes, file_system, kernel_probes, traces, where
from eval.gpu_check.file_system import InMemoryError, choose_folder, memory_behind, mount_of, read_mounts
from eval.gpu_check.results import Clock, FatalError, Results
from eval.gpu_check.settings import Settings
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer

CPU = torch.device("cpu")


class FakeCuda:
    """What probes call of `torch.cuda`, with a note of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.registered: set[int] = set()
        self.error = 0
        waiting = SimpleNamespace(synchronize=lambda: self.calls.append("stream"))
        event = SimpleNamespace(record=lambda: None, query=lambda: True)
        fakes = {
            "synchronize": lambda *_: self.calls.append("synchronize"),
            "current_stream": lambda *_: waiting,
            "Event": lambda *_: event,
            "Stream": lambda *_: SimpleNamespace(wait_event=lambda _: self.calls.append("wait")),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister),
            "mem_get_info": lambda *_: (60 * 2**30, 80 * 2**30),
            "device_count": lambda: 1,
            "get_arch_list": lambda: ["sm_90"],
            "max_memory_allocated": lambda: 7,
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "is_available": lambda: True,
            "get_device_properties": lambda _: SimpleNamespace(
                name="Card", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=1
            ),
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(copy_probes, "pinned", aligned_buffer)

    def register(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        self.registered.add(address)
        return self.error

    def unregister(self, address: int) -> None:
        self.registered.remove(address)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(copy_probes, "ALLOCATED_MIB", (1, 2))
    monkeypatch.setattr(copy_probes, "COPIED_MIB", (1,))
    monkeypatch.setattr(kernel_probes, "LAUNCHES", 20)
    for name, size in (("HEADS", 4), ("KV_HEADS", 2), ("HEAD_DIM", 16), ("QUERIES", 3), ("FIRST_KEYS", 1100)):
        monkeypatch.setattr(kernel_probes, name, size)
    return FakeCuda(monkeypatch)


def positive(found: Any) -> bool:
    if isinstance(found, dict):
        return bool(found) and all(positive(one) for one in found.values())
    return found >= 0


def test_memory_is_allocated_and_registered_and_given_back(cuda):
    assert positive(copy_probes.pinned_allocation())
    found = copy_probes.registration()
    assert set(found) == {"1 MiB", "2 MiB"}
    assert set(found["1 MiB"]) == {"fresh_ms_per_mib", "touched_ms_per_mib", "is_pinned"}
    assert cuda.registered == set()


def test_a_refused_registration_is_an_error(cuda):
    cuda.error = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister of 1048576 bytes: error 2"):
        copy_probes.registration()


def test_direct_reads_are_tried_in_each_kind_of_memory(cuda, tmp_path):
    found = copy_probes.direct_reads(tmp_path)
    assert set(found) == {"pageable", "pinned by torch", "registered"}
    assert set(found.values()) <= {"works", "EINVAL"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "said"), [(errno.EFAULT, "EFAULT"), (errno.EINVAL, "EINVAL")])
def test_the_error_of_a_direct_read_is_named(cuda, tmp_path, monkeypatch, code, said):
    def refuse(*_: Any) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "preadv", refuse)
    assert set(copy_probes.direct_reads(tmp_path).values()) == {said}


def test_wrong_and_missing_bytes_are_told(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: copy_probes.MEBIBYTE)
    assert copy_probes.direct_reads(tmp_path)["registered"] == "wrong bytes"
    monkeypatch.setattr(os, "preadv", lambda *_: 512)
    assert copy_probes.direct_reads(tmp_path)["registered"] == "only 512 of 1048576 bytes"


def test_copies_are_timed_both_ways(cuda):
    (row,) = copy_probes.copy_speeds(CPU).values()
    assert len(row) == 5
    assert positive(row)
    assert cuda.calls.count("synchronize") >= 5 * copy_probes.REPEATS


def test_launches_waits_and_arithmetic_are_timed(cuda):
    assert positive(kernel_probes.launches(CPU))
    assert len(kernel_probes.synchronisation(CPU)) == 6
    assert positive(kernel_probes.arithmetic(CPU, size=64, rounds=2))
    assert {"stream", "wait"} <= set(cuda.calls)


def test_every_way_to_ask_for_attention_is_tried_with_new_lengths(cuda, monkeypatch):
    asked: list[tuple[str, int]] = []
    once = kernel_probes._once

    def noted(device: Any, way: str, keys: int) -> Any:
        asked.append((way, keys))
        return once(device, way, keys)

    monkeypatch.setattr(kernel_probes, "_once", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    found = kernel_probes.attention_shapes(CPU)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert len(found) == 6
    assert {(row["cudnn_allowed"], row["way"]) for row in found} == {
        (cudnn, way) for cudnn in (True, False) for way in ("mask, repeated", "mask, grouped", "lower right, grouped")
    }
    for row in found:
        assert len(row["first_ms"]) == len(row["second_ms"]) == kernel_probes.FRESH_LENGTHS
        assert row["backend"] in (*kernel_probes.BACKENDS.values(), "a mask")
    fresh = [keys for _, keys in asked if keys >= kernel_probes.FIRST_KEYS]
    assert len(fresh) == len(set(fresh)) == 6 * kernel_probes.FRESH_LENGTHS


def test_a_disk_is_written_and_read_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_probes, "SECONDS_EACH", 0.02)
    found = disk_probes.read_speeds(tmp_path, 2**22)
    assert found["file_bytes"] == 2**22
    if found["direct"] is True:
        assert len(found["reads"]) == len(disk_probes.SIZES) * len(disk_probes.THREADS)
        assert all(row["bytes_per_s"] > 0 and row["reads_per_s"] > 0 for row in found["reads"])
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_gets_a_smaller_file(tmp_path):
    found = disk_probes.write(tmp_path / "file", 2**40, limit_s=0.05)
    assert 0 < found["file_bytes"] < 2**40
    assert (tmp_path / "file").stat().st_size == found["file_bytes"]


def test_a_short_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(2**20))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        monkeypatch.setattr(os, "preadv", lambda *_: 1)
        with pytest.raises(OSError, match="short"):
            disk_probes.read_for(descriptor, 2**20, 2**14, 2, 1.0)
    finally:
        os.close(descriptor)


# ---- the stage ----


def test_a_card_is_described(cuda, monkeypatch):
    where.smi.cache_clear()
    values = ", ".join(str(number) for number in range(len(where.SMI_FIELDS)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=values + "\n"))
    found = where.card()
    assert found["name"] == "Card"
    assert found["capability"] == "9.0"
    assert found["driver"]["driver_version"] == "0"
    where.smi.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert where.smi() == {}
    where.smi.cache_clear()


def test_all_probes_of_a_real_device_are_done_and_one_that_fails_leaves_the_others(cuda, monkeypatch, tmp_path):
    def broken() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(where, "card", broken)
    settings = Settings(str(tmp_path), str(tmp_path), device="cpu", disk_probe_bytes=2**21)
    monkeypatch.setattr(kernel_probes, "arithmetic", lambda device: {"large_flops": 1.0})
    results = Results(tmp_path)
    where.run(settings, results, Clock(time.time() + 60))
    stage = results.stage("where")
    assert list(stage["failed"]) == ["card"]
    assert set(stage["found"]) == set(where.probes(settings)) - {"card"}


def test_probes_stop_when_time_is_over(tmp_path):
    settings = Settings.rehearsal(str(tmp_path), str(tmp_path))
    results = Results(tmp_path)
    where.run(settings, results, Clock(0.0))
    assert set(results.stage("where")["failed"]) == set(where.probes(settings))


def test_a_real_check_wants_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings(str(tmp_path), str(tmp_path))
    with pytest.raises(FatalError, match="--rehearse"):
        where.run(settings, Results(tmp_path), Clock(0.0))
    with pytest.raises(FatalError, match="no CUDA device"), device.device_ready(settings):
        raise AssertionError


def test_a_device_says_whether_it_works_and_what_is_free(cuda, tmp_path):
    settings = Settings(str(tmp_path), str(tmp_path), device="cpu")
    with device.device_ready(settings):
        device.alive_on(settings)()
    device.free_memory(settings)
    assert "empty_cache" in cuda.calls
    assert device.memory_in_use(settings) == {"free": 60 * 2**30, "total": 80 * 2**30, "peak_allocated": 7}
    assert device.memory_in_use(Settings.rehearsal("o", "f")) is None


def test_a_request_is_profiled_on_a_device_too(cuda, tmp_path):
    settings = Settings(str(tmp_path), str(tmp_path), device="cpu")
    value, events = traces._profiled(settings, lambda: float(torch.ones(3).sum()))
    assert value == 3.0
    assert "synchronize" in cuda.calls
    assert any(one.get("name") == "aten::sum" for one in events)


# ---- file systems ----

MOUNTS = r"""
/dev/root / ext4 rw,relatime 0 0
tmpfs /dev/shm tmpfs rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/nvme0n1 /tmp/with\040space xfs rw 0 0
overlay /layers overlay rw,lowerdir=/a:/b,upperdir=/dev/shm/upper,workdir=/w 0 0
overlay /kept overlay rw,lowerdir=/a,upperdir=/var/upper,workdir=/w 0 0
/dev/sdb /data ext4 rw 0 0
tmpfs /data tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/home/me", None),
        ("/dev/shm/x", "/dev/shm is tmpfs"),
        ("/tmp", "/tmp is tmpfs"),
        ("/tmp/with space/kv", None),
        ("/tmpfile", None),
        ("/layers/kv", "an overlay whose upper folder /dev/shm/upper is on tmpfs"),
        ("/kept/kv", None),
        ("/data", "/data is tmpfs"),
    ],
)
def test_memory_is_found_behind_a_folder(folder, reason):
    found = memory_behind(folder, read_mounts(MOUNTS))
    assert found is None if reason is None else reason in found


def test_the_longest_mount_point_counts_and_of_equals_the_last():
    mounts = read_mounts(MOUNTS)
    assert mount_of("/tmp/with space/kv", mounts).kind == "xfs"
    assert mount_of("/data/x", mounts).kind == "tmpfs"
    assert mount_of("/", mounts).kind == "ext4"
    assert mount_of("/x", []) is None
    assert memory_behind("/x", []) is None


def test_a_disk_is_chosen_among_folders_and_memory_only_if_asked(tmp_path, monkeypatch):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    for folder in (memory, disk):
        folder.mkdir()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/x / ext4 rw 0 0\ntmpfs {memory} tmpfs rw 0 0\n")
    monkeypatch.setattr(file_system, "MOUNTS", mounts)
    assert choose_folder([memory, disk]) == disk
    with pytest.raises(InMemoryError, match=r"tmpfs.*--any-file-system"):
        choose_folder([memory])
    assert choose_folder([memory], any_file_system=True) == memory
    found = file_system.describe(memory)
    assert (found["kind"], found["in_memory"]) == ("tmpfs", f"{memory} is tmpfs")
    assert found["free_bytes"] > 0


def test_a_folder_that_cannot_be_written_to_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(file_system, "memory_behind", lambda *_: None)
    with pytest.raises(InMemoryError, match="cannot be written to"):
        choose_folder([tmp_path])


def test_pages_are_looked_for_in_memory(tmp_path, monkeypatch):
    assert where.lets_go(tmp_path) in (True, False)
    monkeypatch.setattr(where, "resident_pages", lambda _: 3)
    assert where.lets_go(tmp_path) is False
    assert where.lets_go(Path("/no/such/folder")).startswith("[Errno 2]")
    assert list(tmp_path.iterdir()) == []
