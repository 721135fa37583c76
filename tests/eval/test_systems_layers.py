"""Files of layers, the memory that layers stay in, and the systems that load all of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import some_ids, tiny_llama
from transformers import DynamicCache

from eval.systems import AttentionStore, FlexGen, NotStoredError, State, StateError, departure
from eval.systems.layer_file import RANGE_BYTES, DamagedFileError, LayerShape, read_header, row_pieces, write_layers
from eval.systems.layer_memory import LayerMemory
from eval.systems.layer_reader import LayerFile, ReaderThreads
from hf_contiguouskv.hardware.aligned_memory import PAGE, aligned_buffer
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.store.files import FileBlob
from hf_contiguouskv.timeline import Timeline

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8
# Rows of whole pages have multiples of this many tokens.
ALIGN = PAGE // (HEAD_DIM * 4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(
        hidden_size=6 * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
    )


SUFFIX = some_ids(6, 2)


def ask(model: Any, system: Any, prefix: torch.Tensor) -> tuple[torch.Tensor, Any]:
    cache = system.cache(prefix)
    with torch.no_grad():
        logits = model(input_ids=SUFFIX[None], **{cache_argument(model): cache}).logits[0]
    return logits, system.finish(cache)


def whole(model: Any, prefix: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.cat([prefix, SUFFIX])[None]).logits[0, len(prefix) :]


def random_states(tokens: int, dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM) -> DynamicCache:
    chance = torch.Generator().manual_seed(tokens)
    states = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, KV_HEADS, tokens, head_dim, generator=chance).to(dtype)
        states.update(keys, values, layer)
    return states


# ---- files ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [(1,), (ALIGN,), (300,), (2 * ALIGN, 300), (2 * ALIGN, 2 * ALIGN, 7)], ids=str)
def test_what_was_written_is_read(tmp_path: Path, parts: tuple[int, ...], dtype: str) -> None:
    shape = LayerShape(LAYERS, KV_HEADS, HEAD_DIM, dtype, parts)
    states = random_states(sum(parts), getattr(torch, dtype))
    path = tmp_path / "one.layers"
    write_layers(path, shape, states)
    assert read_header(path).shape == shape
    assert path.stat().st_size % PAGE == 0
    capacity = shape.capacity(room=5)
    assert capacity >= sum(parts) + 5
    threads = ReaderThreads(3)
    file = LayerFile(path, threads)
    buffer = aligned_buffer(shape.rows * capacity * shape.token_bytes).view(shape.torch_dtype)
    buffer = buffer.view(2, 1, KV_HEADS, capacity, HEAD_DIM)
    for number, layer in enumerate(states.layers):
        buffer.fill_(7)
        read = 0
        for part in range(len(parts)):
            arrival = file.read(number, part, file.rows_of(buffer, part), Timeline())
            arrival.wait()
            read += arrival.bytes_read
        assert torch.equal(buffer[0, :, :, : sum(parts)], layer.keys)
        assert torch.equal(buffer[1, :, :, : sum(parts)], layer.values)
        assert read == shape.layer_bytes
    file.close()
    threads.close()


def test_rows_of_whole_pages_need_no_more_than_a_page_each() -> None:
    for dtype, head_dim in (("bfloat16", 64), ("float32", 64), ("bfloat16", 128), ("bfloat16", 80)):
        shape = LayerShape(1, 3, head_dim, dtype, (7936,))
        assert shape.align * shape.token_bytes % PAGE == 0
        assert shape.padded(7936) - 7936 < shape.align
        assert shape.capacity(256) % shape.align == 0
    assert LayerShape(1, 3, 64, "bfloat16", (7936,)).layer_bytes == 2 * 3 * 7936 * 64 * 2


def test_ranges_cross_rows() -> None:
    rows = [memoryview(bytearray(10)) for _ in range(4)]
    found = row_pieces(rows, 7, 33)
    assert [(place, view.nbytes) for place, view in found] == [(7, 3), (10, 10), (20, 10), (30, 3)]
    assert [view.obj for _, view in found] == [row.obj for row in rows]


def damaged(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(1)
        file.seek(at)
        file.write(bytes([before[0] ^ 1]))


def test_functions_that_are_held_start_together() -> None:
    threads, begun = ReaderThreads(), threading.Event()
    try:
        with threads.together():
            threads.run([begun.set])
            assert not begun.wait(0.05)
        assert begun.wait(60)
        ended = threading.Event()

        def fail() -> None:
            with threads.together():
                threads.run([ended.set])
                raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            fail()
        # What was queued has an arrival that a request waits for: it runs.
        assert ended.wait(60)
    finally:
        threads.close()


def test_all_memory_is_borrowed_before_the_first_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    lend, read = LayerMemory.lend, FileBlob.read_into

    def lending(self: LayerMemory, *arguments: Any, **options: Any) -> Any:
        events.append("lend")
        return lend(self, *arguments, **options)

    def reading(self: FileBlob, *arguments: Any) -> int:
        events.append("read")
        return read(self, *arguments)

    prefix = some_ids(600, 3)
    with AttentionStore(model, tmp_path, overlap=True) as system:
        system.store(prefix)
        system.enter(State.COLD, prefix)
        monkeypatch.setattr(LayerMemory, "lend", lending)
        monkeypatch.setattr(FileBlob, "read_into", reading)
        ask(model, system, prefix)
    layers = model.config.num_hidden_layers
    assert events[:layers] == ["lend"] * layers
    assert events.count("lend") == layers
    assert events.count("read") >= layers


@pytest.mark.parametrize("make", [AttentionStore, FlexGen], ids=["attentionstore", "flexgen"])
@pytest.mark.parametrize("overlap", [False, True])
def test_one_wrong_bit_is_an_error(model: Any, tmp_path: Path, make: Any, overlap: bool) -> None:
    options = {"overlap": overlap} if make is AttentionStore else {"host_share": 0.5 if overlap else 0.0}
    prefix = some_ids(600, 3)
    with make(model, tmp_path, **options) as system:
        system.store(prefix)
        (path,) = system.files()
        begin = read_header(path).begin
        for at in (begin, (begin + path.stat().st_size) // 2, path.stat().st_size - PAGE):
            damaged(path, at)
            system.enter(State.COLD, prefix)
            with pytest.raises(DamagedFileError, match="the checksum of layer"):
                ask(model, system, prefix)
            damaged(path, at)  # Back again.
            system.enter(State.COLD, prefix)
            torch.testing.assert_close(ask(model, system, prefix)[0], whole(model, prefix), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at", [0, 9, 20, 40])
def test_a_damaged_header_is_an_error(model: Any, tmp_path: Path, at: int) -> None:
    prefix = some_ids(100, 3)
    with AttentionStore(model, tmp_path) as system:
        system.store(prefix)
        damaged(system.files()[0], at)
        system.enter(State.COLD, prefix)
        with pytest.raises(DamagedFileError):
            system.cache(prefix)


def test_a_file_that_was_cut_is_an_error(model: Any, tmp_path: Path) -> None:
    prefix = some_ids(600, 3)
    with AttentionStore(model, tmp_path, overlap=True) as system:
        system.store(prefix)
        (path,) = system.files()
        size = path.stat().st_size
        system.enter(State.COLD, prefix)
        cache = system.cache(prefix)  # Open, and all of it asked for.
        system.finish(cache)
        for kept in (size - 1, size // 2, PAGE, 10, 0):
            with path.open("r+b") as file:
                file.truncate(kept)
            system.enter(State.COLD, prefix)
            with pytest.raises(DamagedFileError):
                system.cache(prefix)


def test_large_layers_are_read_in_several_ranges(tmp_path: Path) -> None:
    head_dim, tokens = 256, 5000
    shape = LayerShape(LAYERS, KV_HEADS, head_dim, "float32", (tokens,))
    assert shape.layer_bytes > 2 * RANGE_BYTES
    states = random_states(tokens, head_dim=head_dim)
    path = tmp_path / "large.layers"
    write_layers(path, shape, states)
    threads = ReaderThreads()
    file = LayerFile(path, threads)
    buffer = aligned_buffer(shape.rows * shape.capacity(0) * shape.token_bytes).view(torch.float32)
    buffer = buffer.view(2, 1, KV_HEADS, -1, head_dim)
    file.read(1, 0, file.rows_of(buffer, 0), Timeline()).wait()
    assert torch.equal(buffer[0, :, :, :tokens], states.layers[1].keys)
    damaged(path, read_header(path).begin + shape.offset(1, 0) + RANGE_BYTES + 5)
    with pytest.raises(DamagedFileError, match="layer 1"):
        file.read(1, 0, file.rows_of(buffer, 0), Timeline()).wait()
    file.close()
    threads.close()


# ---- memory ----


def test_the_least_recently_used_layers_go_first() -> None:
    memory = LayerMemory("host", 3 * 4096, aligned_buffer)
    for layer in range(3):
        memory.give_back(memory.lend(4096), ("a", layer))
    assert memory.kept_bytes == 3 * 4096
    piece = memory.take(("a", 0))  # Used again.
    assert piece is not None
    memory.give_back(piece, ("a", 0))
    memory.give_back(memory.lend(4096), ("b", 0))
    assert [("a", layer) in memory for layer in range(3)] == [True, False, True]
    assert ("b", 0) in memory
    assert memory.peak_bytes == 3 * 4096


def test_memory_is_used_again() -> None:
    made: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return aligned_buffer(nbytes)

    memory = LayerMemory("host", 2 * 8192, allocate)
    first = memory.lend(8000)
    memory.give_back(first)
    assert memory.lend(8192) is first
    memory.give_back(first, "a")
    memory.give_back(memory.lend(8192), "b")
    # Full: what would have to go gives its memory.
    assert memory.lend(8192) is first
    assert "a" not in memory
    assert made == [8192, 8192]
    memory.give_back(memory.lend(5 * 8192), "too large")
    assert "too large" not in memory
    assert memory.kept_bytes <= 2 * 8192
    memory.drop()
    assert memory.kept_bytes == 0


def test_memory_that_is_busy_is_left_alone() -> None:
    class Event:
        happened = False

        def query(self) -> bool:
            return self.happened

    memory, event = LayerMemory("host", 2 * 4096, aligned_buffer), Event()
    piece = memory.lend(4096)
    piece.busy = event
    memory.give_back(piece)
    other = memory.lend(4096)
    assert other is not piece
    memory.give_back(other)
    event.happened = True
    assert {memory.lend(4096), memory.lend(4096)} == {piece, other}
    piece.busy = Event()
    memory.give_back(piece)
    assert memory.lend(4096, reuse_busy=True) is piece


@pytest.mark.parametrize("overlap", [False, True])
def test_memory_never_holds_more_than_its_limit(model: Any, tmp_path: Path, overlap: bool) -> None:
    prefixes = [some_ids(tokens, tokens) for tokens in (200, 300, 900)]
    with AttentionStore(model, tmp_path, overlap=overlap, host_bytes=100_000) as system:
        for prefix in prefixes:
            system.store(prefix)
        for turn in range(9):
            prefix = prefixes[(turn * turn) % 3]
            torch.testing.assert_close(ask(model, system, prefix)[0], whole(model, prefix), atol=1e-4, rtol=1e-4)
            assert 0 < system.opened().host.peak_bytes <= 100_000


def test_what_was_read_stays_as_far_as_it_fits(model: Any, tmp_path: Path) -> None:
    prefix = some_ids(200, 1)
    with AttentionStore(model, tmp_path) as system:
        system.store(prefix)
        assert ask(model, system, prefix)[1].hits == {"device": 0, "host": 0, "disk": LAYERS}
        stats = ask(model, system, prefix)[1]
        assert stats.hits == {"device": 0, "host": LAYERS, "disk": 0}
        assert stats.bytes_read == 0
        assert stats.bytes_used == LAYERS * 2 * KV_HEADS * 200 * HEAD_DIM * 4
    with AttentionStore(model, tmp_path, host_bytes=0) as system:
        for _ in range(2):
            assert ask(model, system, prefix)[1].hits["disk"] == LAYERS


def test_a_chat_finds_its_last_turn_in_memory(model: Any, tmp_path: Path) -> None:
    chat = some_ids(400, 4)
    with AttentionStore(model, tmp_path) as system:
        for tokens in (100, 250, 400):
            system.store(chat[:tokens])
            assert len(system.files()) == 1
            logits, stats = ask(model, system, chat[:tokens])
            torch.testing.assert_close(logits, whole(model, chat[:tokens]), atol=1e-4, rtol=1e-4)
            assert (stats.bytes_read == 0) is (tokens > 100)
        with pytest.raises(NotStoredError):
            system.cache(chat[:100])
        system.enter(State.OPEN, chat)
        assert ask(model, system, chat)[1].hits["disk"] == LAYERS


def test_layers_that_are_in_use_are_not_shared(model: Any, tmp_path: Path) -> None:
    """A request that begins ends the one before; what the first one's cache holds is its own no more."""
    prefix = some_ids(200, 1)
    with AttentionStore(model, tmp_path) as system:
        system.store(prefix)
        expected, _ = ask(model, system, prefix)
        system.cache(prefix)  # Given up.
        torch.testing.assert_close(ask(model, system, prefix)[0], expected, atol=0, rtol=0)


# ---- FlexGen ----


@pytest.mark.parametrize(("share", "resident"), [(0.0, 0), (0.3, 384), (0.5, 640), (0.99, 1280)])
def test_shares_stay_in_memory_and_the_rest_is_read(model: Any, tmp_path: Path, share: float, resident: int) -> None:
    prefix = some_ids(1300, 5)
    expected = whole(model, prefix)
    with FlexGen(model, tmp_path, host_share=share) as system:
        system.store(prefix)
        token_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
        padded = -(-1300 // ALIGN) * ALIGN
        for state, kept in ((State.COLD, 0), (State.OPEN, resident), (State.WARM_HOST, padded), (State.OPEN, resident)):
            system.enter(state, prefix)
            logits, stats = ask(model, system, prefix)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert departure(state, stats) is None
            assert stats.bytes_read == (padded - kept) * token_bytes
            if state is State.OPEN:
                assert system.details() == ({"resident_bytes": kept * token_bytes} if kept else {})
        # Nothing else stays: the next request reads as much again.
        assert ask(model, system, prefix)[1].bytes_read == (padded - resident) * token_bytes


def test_shares_of_one_leave_nothing_to_read(model: Any, tmp_path: Path) -> None:
    prefix = some_ids(300, 5)
    with FlexGen(model, tmp_path, host_share=1.0) as system:
        assert system.name == "flexgen+host=1"
        assert system.states == (State.COLD, State.WARM_HOST)
        system.store(prefix)
        for state in system.states:
            system.enter(state, prefix)
            logits, stats = ask(model, system, prefix)
            torch.testing.assert_close(logits, whole(model, prefix), atol=1e-4, rtol=1e-4)
            assert departure(state, stats) is None


def test_flexgen_and_attentionstore_share_a_file(model: Any, tmp_path: Path) -> None:
    prefix = some_ids(300, 5)
    with AttentionStore(model, tmp_path) as one, FlexGen(model, tmp_path) as other:
        one.store(prefix)
        other.store(prefix)
        assert one.files() == other.files()
        assert len(one.files()) == 1
        assert torch.equal(ask(model, one, prefix)[0], ask(model, other, prefix)[0])


def test_shares_that_cannot_be_are_refused(model: Any, tmp_path: Path) -> None:
    for shares in ({"host_share": 1.2}, {"host_share": -0.1}, {"host_share": 0.6, "device_share": 0.6}):
        with pytest.raises(ValueError, match="shares must be"):
            FlexGen(model, tmp_path, **shares)
    prefix = some_ids(600, 5)
    with FlexGen(model, tmp_path, host_share=0.5, host_bytes=10_000) as system:
        system.store(prefix)
        with pytest.raises(StateError, match="there is no room for"):
            system.enter(State.OPEN, prefix)
        system.enter(State.COLD, prefix)
        torch.testing.assert_close(ask(model, system, prefix)[0], whole(model, prefix), atol=1e-4, rtol=1e-4)


def test_only_the_next_layer_is_read_ahead(model: Any, tmp_path: Path) -> None:
    prefix = some_ids(300, 5)
    with FlexGen(model, tmp_path) as system:
        system.store(prefix)
        system.enter(State.OPEN, prefix)
        cache = system.cache(prefix)
        read = {span.layer for span in system.timeline(cache).spans} | {0}
        assert read == {0}
        seen: list[set[int]] = []
        hooks = [
            layer.register_forward_hook(
                lambda *_: seen.append({span.layer for span in system.timeline(cache).spans if span.kind == "read"})
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(input_ids=SUFFIX[None], **{cache_argument(model): cache})
        for hook in hooks:
            hook.remove()
        system.finish(cache)
    # While a layer computes, no read of a layer behind the next one has been made.
    for layer, layers in enumerate(seen):
        assert max(layers) <= layer + 1
