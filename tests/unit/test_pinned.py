"""Registered host memory: it is lent in pieces, comes back by itself, and is not lent under a copy."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch

from hf_contiguouskv.hardware import accelerator as device
from hf_contiguouskv.hardware import pinned_memory as pinned
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.hardware.pinned_memory import PinnedPool

MEBIBYTE = 2**20


class Event:
    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened


class Driver:
    """Registers up to `most` bytes at a time; `copies` are the events that it was asked for."""

    def __init__(self, most: int = 2**40, free: int = 2**40) -> None:
        self.most = most
        self.free = free
        self.asked: list[int] = []
        self.copies: list[Event] = []
        self.copying = False

    def register(self, memory: torch.Tensor) -> bool:
        assert memory.data_ptr() % PAGE == 0
        self.asked.append(memory.nbytes)
        return memory.nbytes <= self.most

    def marks(self) -> list[Event]:
        self.copies.append(Event())
        self.copies[-1].happened = not self.copying
        return self.copies[-1:]

    def pool(self, nbytes: int = 0) -> PinnedPool:
        found = PinnedPool(self.register, self.marks, lambda: self.free)
        if nbytes:
            found.reserve(nbytes)
        return found


def test_memory_is_registered_once_and_pieces_come_back() -> None:
    driver = Driver()
    pool = driver.pool(8 * PAGE)
    assert driver.asked == [8 * PAGE]
    for _ in range(5):
        pieces = [pool.take(PAGE) for _ in range(8)]
        assert all(piece is not None and piece.nbytes == PAGE for piece in pieces)
        assert len({piece.data_ptr() for piece in pieces}) == 8
        assert all(piece.data_ptr() % PAGE == 0 for piece in pieces)
        assert pool.take(1) is None
        del pieces
    whole = pool.take(8 * PAGE)
    assert whole is not None
    assert driver.asked == [8 * PAGE]


def test_a_piece_is_in_use_until_its_last_view_is_gone() -> None:
    pool = Driver().pool(2 * PAGE)
    piece = pool.take(2 * PAGE)
    view = piece[PAGE:].view(torch.float32)[3:]
    octets = memoryview(view.numpy())
    del piece, view
    assert pool.take(PAGE) is None
    del octets
    assert pool.take(PAGE) is not None


def test_a_piece_is_not_lent_again_under_a_copy() -> None:
    driver = Driver()
    pool = driver.pool(2 * PAGE)
    piece = pool.take(2 * PAGE)
    driver.copying = True
    del piece
    assert pool.take(PAGE) is None
    assert pool.take(PAGE) is None
    assert len(driver.copies) == 1
    driver.copies[0].happened = True
    assert pool.take(2 * PAGE) is not None


def test_stores_add_up_and_what_is_registered_stays() -> None:
    driver = Driver()
    pool = driver.pool(8 * PAGE)
    pool.reserve(4 * PAGE)
    assert driver.asked == [8 * PAGE, 4 * PAGE]
    pool.release(4 * PAGE)
    pool.release(8 * PAGE)
    pool.reserve(12 * PAGE)
    pool.reserve(0)
    assert pool.nbytes == 12 * PAGE
    assert driver.asked == [8 * PAGE, 4 * PAGE]
    assert pool.take(9 * PAGE) is None  # No region is so long.
    assert pool.take(8 * PAGE) is not None


def test_where_the_driver_refuses_less_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(most=40 * MEBIBYTE)
    pool = driver.pool(128 * MEBIBYTE)
    assert driver.asked == [128 * MEBIBYTE, 64 * MEBIBYTE, 32 * MEBIBYTE]
    assert pool.nbytes == 32 * MEBIBYTE
    assert "did not register" in caplog.text
    driver = Driver(most=0)
    assert driver.pool(64 * MEBIBYTE).nbytes == 0
    assert driver.asked == [64 * MEBIBYTE, 32 * MEBIBYTE, 16 * MEBIBYTE]
    assert driver.pool(64 * MEBIBYTE).take(PAGE) is None


def test_a_machine_keeps_half_of_what_it_has() -> None:
    assert Driver(free=10 * PAGE).pool(64 * PAGE).nbytes == 5 * PAGE
    assert 2**20 < pinned.available_bytes() < 2**50


def test_blocks_and_buffers_do_not_cut_each_others_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_BLOCK_BYTES", 4 * PAGE)
    pool = Driver().pool(16 * PAGE)
    buffer, block = pool.take(PAGE), pool.take(4 * PAGE)
    assert block.data_ptr() - buffer.data_ptr() == 12 * PAGE
    del buffer
    assert pool.take(12 * PAGE) is not None


def test_threads_never_share_a_piece() -> None:
    pool, failures = Driver().pool(64 * PAGE), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        held: list[torch.Tensor] = []
        for _ in range(400):
            if held and chance.random() < 0.5:
                piece = held.pop(chance.randrange(len(held)))
                if not bool((piece == seed).all()):
                    failures.append(seed)
                del piece
            else:
                found = pool.take(chance.randrange(1, 6 * PAGE))
                if found is not None:
                    held.append(found.fill_(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert pool.take(64 * PAGE) is not None, "pieces were lost"


class Cudart:
    class cudaError:  # noqa: N801
        success = 0

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int, int]] = []

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append((pointer, nbytes, flags))
        return self.answer


@pytest.mark.parametrize("answer", [0, 2])
def test_cuda_is_asked_for_all_devices(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    cudart = Cudart(answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory, launched = torch.empty(PAGE, dtype=torch.uint8), []

    def told(*_: object, **options: object) -> None:
        launched.append(options["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", told)
    assert pinned.register_with_cuda(memory) is (answer == 0)
    # CUDA reports a refusal at the next launch, which must not be a model's.
    assert launched == ([] if answer == 0 else ["cuda"])
    assert cudart.calls == [(memory.data_ptr(), PAGE, 1)]


def test_buffers_come_from_what_is_reserved_then_from_torch_then_from_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Driver().pool(2 * PAGE)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(device, "_pool", lambda: pool)
    first = device.pinned_buffer(2 * PAGE)
    assert pool.take(PAGE) is None
    pinned_by_torch = []

    def empty(nbytes: int, **options: object) -> torch.Tensor:
        pinned_by_torch.append(nbytes)
        assert options.pop("pin_memory")
        if nbytes > 8 * PAGE:
            raise RuntimeError("CUDA error: out of memory")
        return real(nbytes, **options)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    second = device.pinned_buffer(3 * PAGE)
    third = device.pinned_buffer(9 * PAGE)
    monkeypatch.undo()
    assert [first.nbytes, second.nbytes, third.nbytes] == [2 * PAGE, 3 * PAGE, 9 * PAGE]
    assert pinned_by_torch[0] == 3 * PAGE
    assert pinned_by_torch[-1] == 9 * PAGE
    assert all(one.data_ptr() % PAGE == 0 for one in (first, second, third))
