"""The reader returns the bytes of the file, wherever they lie, and notices when they are wrong."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import geometry, open_segment, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.reader import ExtentReader, Read, ReadTotals, aligned_buffer, as_memoryview
from hf_contiguouskv.store.segment import Segment


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment of about 5 MiB."""
    with PrefixStore(tmp_path_factory.mktemp("store")) as store:
        g = geometry(chunk_size=16, head_dim=64, num_layers=4, leader_layers=(0,), indexed_layers=(1,))
        return path_of(write_prefix(store, some_tokens(1203), g=g).spans[0].segment)


@pytest.fixture(params=["direct", "buffered"])
def segment(request: pytest.FixtureRequest, file: Path) -> Iterator[Segment]:
    opened = open_segment(file, direct=request.param == "direct")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reader() -> Iterator[ExtentReader]:
    with ExtentReader(threads=4) as opened:
        yield opened


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_is_read_as_it_stands_in_the_file(
    segment: Segment, reader: ExtentReader, data: st.DataObject
) -> None:
    content = path_of(segment).read_bytes()
    ranges = []
    for _ in range(data.draw(st.integers(1, 5))):
        offset = data.draw(st.integers(0, len(content) - 1) | st.integers(0, len(content) // PAGE).map(PAGE.__mul__))
        length = data.draw(st.integers(0, 3 * PAGE) | st.integers(0, 3 * 2**20) | st.sampled_from([PAGE, 8 * PAGE]))
        ranges.append((offset, min(length, len(content) - offset)))
    skew = data.draw(st.sampled_from([0, 0, 1, 512]))
    buffers = [aligned_buffer(length + skew)[skew:] for _, length in ranges]
    reads = [
        Read(
            segment,
            offset,
            length,
            as_memoryview(buffer),
            [(0, length, xxhash.xxh3_64_intdigest(content[offset : offset + length]))],
        )
        for (offset, length), buffer in zip(ranges, buffers, strict=True)
    ]
    ticket = reader.submit(reads)
    ticket.wait()
    assert ticket.done
    for (offset, length), buffer in zip(ranges, buffers, strict=True):
        assert buffer.numpy().tobytes() == content[offset : offset + length]
    rounded = sum(-(-(o + n) // PAGE) * PAGE - o // PAGE * PAGE for o, n in ranges if n)
    assert ticket.bytes_read == rounded


def test_long_reads_compare_checksums_inside_and_across_their_parts(segment: Segment, reader: ExtentReader) -> None:
    offset, nbytes = segment.tensor_extent("payload.1")
    content = path_of(segment).read_bytes()[offset : offset + nbytes]
    assert nbytes > 2**20
    for step in (16384, 100_001):
        checks = [
            (i, n, xxhash.xxh3_64_intdigest(content[i : i + n]))
            for i in range(0, nbytes, step)
            if (n := min(step, nbytes - i))
        ]
        buffer = aligned_buffer(nbytes)
        reader.submit([Read(segment, offset, nbytes, as_memoryview(buffer), checks)]).wait()
        assert buffer.numpy().tobytes() == content
        for wrong in (0, len(checks) // 2, len(checks) - 1):
            broken = list(checks)
            broken[wrong] = (*broken[wrong][:2], broken[wrong][2] ^ 1)
            with pytest.raises(SegmentCorruptError, match="layer 1, chunk"):
                reader.submit([Read(segment, offset, nbytes, as_memoryview(buffer), broken)]).wait()


def test_a_wrong_byte_is_reported_with_file_layer_and_chunk(tmp_path: Path, reader: ExtentReader) -> None:
    with PrefixStore(tmp_path / "store") as store:
        segment = write_prefix(store, some_tokens(40)).spans[0].segment
        offset, nbytes = segment.extents().offset(2, 7), segment.extents().nbytes
        with path_of(segment).open("r+b") as raw:
            raw.seek(offset + 5)
            raw.write(b"\x7f")
        for chunk, broken in ((6, False), (7, True)):
            offset, nbytes = segment.extents().offset(2, chunk), segment.extents().nbytes
            into = as_memoryview(aligned_buffer(nbytes))
            ticket = reader.submit(
                [Read(segment, offset, nbytes, into, [(0, nbytes, segment.run_checksums(2, chunk, 1)[0])])]
            )
            if broken:
                with pytest.raises(SegmentCorruptError, match=rf"{path_of(segment).name}.*layer 2, chunk 7"):
                    ticket.wait()
                with pytest.raises(SegmentCorruptError):
                    ticket.wait()
            else:
                ticket.wait()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_ends_too_early_is_reported_by_name(tmp_path: Path, reader: ExtentReader, direct: bool) -> None:
    with PrefixStore(tmp_path / "store") as store:
        path = path_of(write_prefix(store, some_tokens(4000)).spans[0].segment)
    segment = open_segment(path, direct=direct)
    with path.open("r+b") as raw:
        raw.truncate(PAGE + 100)
    for nbytes in (PAGE, 100, 50_000):
        into = as_memoryview(aligned_buffer(nbytes))
        with pytest.raises(SegmentCorruptError, match=path.name):
            reader.submit([Read(segment, 2 * PAGE, nbytes, into)]).wait()
    segment.close()


def test_reads_of_a_closed_segment_fail_cleanly(file: Path, reader: ExtentReader) -> None:
    segment = open_segment(file)
    segment.close()
    with pytest.raises(StoreError, match="closed"):
        reader.submit([Read(segment, 0, 10, as_memoryview(aligned_buffer(10)))]).wait()


def test_a_deleted_file_can_still_be_read_through_an_open_segment(tmp_path: Path, reader: ExtentReader) -> None:
    with PrefixStore(tmp_path / "store") as store:
        stored = write_prefix(store, some_tokens(40))
        segment = stored.spans[0].segment
        content = path_of(segment).read_bytes()
        store.delete(segment.key)
        assert not path_of(segment).exists()
        buffer = aligned_buffer(len(content))
        reader.submit([Read(segment, 0, len(content), as_memoryview(buffer))]).wait()
        assert buffer.numpy().tobytes() == content


@pytest.mark.parametrize("refusal", ["EINVAL", "EFAULT"])
def test_where_direct_reads_are_refused_later_the_page_cache_serves(
    file: Path, reader: ExtentReader, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    import errno
    import os

    segment = open_segment(file)
    real = os.preadv

    def refuse(fd: int, buffers: object, offset: int) -> int:
        if fd == segment.blob.fd_direct:
            raise OSError(getattr(errno, refusal), "refused")
        return real(fd, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refuse)
    buffer = aligned_buffer(3 * PAGE)
    reader.submit([Read(segment, PAGE, 3 * PAGE, as_memoryview(buffer))]).wait()
    assert buffer.numpy().tobytes() == file.read_bytes()[PAGE : 4 * PAGE]
    segment.close()


def test_memory_that_direct_reads_cannot_reach_is_filled_through_memory_that_they_can(
    file: Path, reader: ExtentReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that are registered with a GPU's driver may be refused (EFAULT), others of the process are not."""
    import ctypes
    import errno
    import os

    segment, buffer = open_segment(file), aligned_buffer(8 * PAGE)
    if segment.blob.fd_direct is None:
        pytest.skip("the file system refuses O_DIRECT")
    begin, real, refused = buffer.data_ptr(), os.preadv, []

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        for one in buffers:
            if begin <= ctypes.addressof(ctypes.c_char.from_buffer(one)) < begin + 8 * PAGE:
                assert fd == segment.blob.fd_direct, "the page cache was asked"
                refused.append(offset)
                raise OSError(errno.EFAULT, "Bad address")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    octets = as_memoryview(buffer)
    reads = [Read(segment, (1 + 2 * i) * PAGE, 2 * PAGE, octets[2 * i * PAGE :][: 2 * PAGE]) for i in range(3)]
    reader.submit(reads).wait()  # In one call, scattered.
    reader.submit([Read(segment, 7 * PAGE, 100, octets[6 * PAGE :][:100])]).wait()
    assert refused
    assert buffer.numpy()[: 6 * PAGE + 100].tobytes() == file.read_bytes()[PAGE : 7 * PAGE + 100]
    segment.close()


class Calls:
    """Notes every positioned read of the process: `(offset, bytes asked for)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        self.made: list[tuple[int, int]] = []
        real = os.preadv

        def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
            self.made.append((offset, sum(memoryview(one).nbytes for one in buffers)))
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", noted)


@pytest.mark.parametrize("nbytes", [PAGE, 3000])
@pytest.mark.parametrize("distance", [1, 2, 5])
def test_reads_that_are_close_together_are_one_if_they_may_be(
    file: Path, reader: ExtentReader, monkeypatch: pytest.MonkeyPatch, nbytes: int, distance: int
) -> None:
    segment, content = open_segment(file), file.read_bytes()
    if segment.blob.fd_direct is None:
        pytest.skip("the file system refuses O_DIRECT")
    calls = Calls(monkeypatch)
    reader.totals.measured = None  # (What a busy machine made of earlier reads says how far apart they may be.)
    offsets = [PAGE + i * distance * nbytes for i in range(6)]
    for joins in (False, True):
        calls.made.clear()
        buffer = aligned_buffer(6 * nbytes)
        octets = as_memoryview(buffer)
        reads = [Read(segment, at, nbytes, octets[i * nbytes : (i + 1) * nbytes]) for i, at in enumerate(offsets)]
        ticket = reader.submit(reads, joins=joins)
        ticket.wait()
        expected = b"".join(content[at : at + nbytes] for at in offsets)
        assert buffer.numpy().tobytes() == expected
        if joins or distance == 1:
            first, end = PAGE, -(-(offsets[-1] + nbytes) // PAGE) * PAGE
            assert calls.made == [(first, end - first)]
            assert ticket.bytes_read == end - first
        else:
            assert len(calls.made) == 6
    segment.close()


def test_reads_that_are_far_apart_stay_apart(file: Path, reader: ExtentReader, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, calls = open_segment(file), Calls(monkeypatch)
    buffer = aligned_buffer(3 * PAGE)
    octets = as_memoryview(buffer)
    offsets = [0, 5 * PAGE, 11 * PAGE]  # Between them: 4 and 5 pages.
    reads = [Read(segment, at, PAGE, octets[i * PAGE : (i + 1) * PAGE]) for i, at in enumerate(offsets)]
    with ExtentReader(threads=4) as reader:
        assert reader.gap_bytes == 16 * 1024
        reader.submit(reads, joins=True).wait()
    content = file.read_bytes()
    assert buffer.numpy().tobytes() == b"".join(content[at : at + PAGE] for at in offsets)
    assert sorted(calls.made) == [(0, 6 * PAGE), (11 * PAGE, PAGE)]
    segment.close()


def test_how_much_lies_between_joined_reads_goes_by_the_speed_of_the_disk() -> None:
    with ExtentReader(threads=1) as reader:
        total = reader.totals

        def read(nbytes: int, bytes_s: float) -> None:
            total.begins(1.0)
            total.ends(1.0, 1.0 + nbytes / bytes_s, nbytes)

        read(1000, 1000.0)  # Too short to tell.
        assert reader.gap_bytes == 16 * 1024
        read(2**20, 1e9)
        assert reader.gap_bytes == pytest.approx(10_000, abs=1)
        for _ in range(50):
            read(2**24, 7e9)
        assert 69_000 < reader.gap_bytes <= 70_001
        for _ in range(50):
            read(2**24, 100e9)
        assert reader.gap_bytes == 128 * 1024


def test_time_in_which_several_long_reads_are_under_way_counts_once() -> None:
    total, third = ReadTotals(), 2**22
    for began in (0.0, 0.1, 0.2):
        total.begins(began)
    total.ends(0.0, 0.5, third)
    assert total.bytes_per_second is None, "others are under way, and may have read some"
    total.ends(0.1, 0.9, third)
    total.ends(0.2, 1.0, third)
    assert total.bytes_per_second == pytest.approx(3 * third)
    # A pause between two reads is no time of reading.
    total.begins(50.0)
    total.ends(50.0, 51.0, 3 * third)
    assert total.bytes_per_second == pytest.approx(3 * third)


def test_reads_without_a_pause_tell_their_speed_now_and_then() -> None:
    total, some = ReadTotals(), 2**25
    total.begins(0.0)
    for second in range(1, 5):
        total.begins(second - 0.5)  # There is always one under way.
        total.ends(second - 1.0, float(second), some)
        assert (total.bytes_per_second is None) == (second == 1)
    assert total.bytes_per_second == pytest.approx(some, rel=0.01)


@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-3])
def test_reads_that_end_together_do_not_seem_to_be_faster_than_storage(apart: float) -> None:
    """Eight of 10 MiB share 2 GB/s and end at nearly the same time: more than is told at a time."""
    total, each = ReadTotals(), 10 * 2**20
    for turn in range(20):
        began = turn * 1.0
        for _ in range(8):
            total.begins(began)
        for number in range(8):
            total.ends(began, began + 8 * each / 2e9 + number * apart, each)
        assert total.bytes_per_second == pytest.approx(2e9, rel=0.25)


def test_many_short_reads_tell_how_fast_the_interpreter_is_and_do_not_count(file: Path) -> None:
    segment = open_segment(file)
    buffer = aligned_buffer(200 * 2 * PAGE)
    octets = as_memoryview(buffer)
    reads = [Read(segment, i * 5 * PAGE, 2 * PAGE, octets[i * 2 * PAGE : (i + 1) * 2 * PAGE]) for i in range(200)]
    with ExtentReader(threads=2) as reader:
        reader.submit(reads).wait()
        assert reader.totals.nbytes >= 2**20
        assert reader.totals.bytes_per_second is None
    segment.close()


def test_in_a_fork_nothing_is_under_way() -> None:
    total = ReadTotals()
    total.add(7)
    total.begins(0.0)
    total.ends(0.0, 1.0, 2**24)
    total.begins(2.0)  # Never ends in the fork.
    other = total.continued()
    assert (other.nbytes, other.bytes_per_second) == (7, pytest.approx(2**24))
    other.begins(100.0)
    other.ends(100.0, 101.0, 2**24)
    assert other.bytes_per_second == pytest.approx(2**24)


def test_a_long_read_that_fails_is_not_under_way_for_ever(file: Path) -> None:
    segment = open_segment(file)
    with ExtentReader(threads=2) as reader:
        buffer = aligned_buffer(2 * 2**20)
        with pytest.raises(SegmentCorruptError):
            reader.submit([Read(segment, 2**40, 2 * 2**20, as_memoryview(buffer))]).wait()
        assert reader.totals.bytes_per_second is None
        reader.submit([Read(segment, 0, 2 * 2**20, as_memoryview(buffer))]).wait()
        assert reader.totals.bytes_per_second is not None
    segment.close()


def test_a_long_read_tells_how_fast_the_disk_is(file: Path) -> None:
    segment = open_segment(file)
    with ExtentReader(threads=2) as reader:
        assert reader.totals.bytes_per_second is None
        buffer = aligned_buffer(2 * 2**20)
        reader.submit([Read(segment, 0, 2 * 2**20, as_memoryview(buffer))]).wait()
        speed = reader.totals.bytes_per_second
        assert speed is not None
        assert speed > 0
    segment.close()


def test_each_of_the_joined_reads_is_compared_by_itself(file: Path, reader: ExtentReader) -> None:
    segment, content = open_segment(file), file.read_bytes()
    for wrong in (None, 0, 1):
        buffer = aligned_buffer(2 * PAGE)
        octets, reads = as_memoryview(buffer), []
        for number, at in enumerate((PAGE, 3 * PAGE)):
            checksum = xxhash.xxh3_64_intdigest(content[at : at + PAGE]) ^ (number == wrong)
            into = octets[number * PAGE : (number + 1) * PAGE]
            reads.append(Read(segment, at, PAGE, into, ((0, PAGE, checksum),)))
        ticket = reader.submit(reads, joins=True)
        if wrong is None:
            ticket.wait()
            assert buffer.numpy().tobytes() == content[PAGE : 2 * PAGE] + content[3 * PAGE : 4 * PAGE]
        else:
            with pytest.raises(SegmentCorruptError):
                ticket.wait()
    segment.close()


def test_short_reads_are_continued(segment: Segment, reader: ExtentReader, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.preadv

    def short(fd: int, buffers: tuple[memoryview], offset: int) -> int:
        return real(fd, (memoryview(buffers[0])[:PAGE],), offset)

    monkeypatch.setattr(os, "preadv", short)
    content = path_of(segment).read_bytes()
    for offset, nbytes in ((0, 5 * PAGE), (4097, 30_000), (PAGE, 30_000)):
        buffer = aligned_buffer(nbytes)
        reader.submit([Read(segment, offset, nbytes, as_memoryview(buffer))]).wait()
        assert buffer.numpy().tobytes() == content[offset : offset + nbytes]


def test_direct_reads_reach_the_device_and_are_counted(file: Path) -> None:
    segment = open_segment(file)
    if segment.blob.fd_direct is None:
        pytest.skip("the file system refuses O_DIRECT")

    def from_device() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    with ExtentReader() as reader:
        before = from_device()
        into = as_memoryview(aligned_buffer(16 * PAGE))
        for _ in range(3):
            reader.submit([Read(segment, 0, 16 * PAGE, into)]).wait()
        # Three times: the page cache did not serve the repeats.
        seen = from_device() - before
        assert seen == 0 or seen >= 3 * 16 * PAGE
        assert reader.bytes_read == 3 * 16 * PAGE
    segment.close()


def test_threads_have_names_and_end_with_the_reader(file: Path) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("contiguouskv-read")]

    before = len(names())
    reader = ExtentReader(threads=3)
    assert len(names()) == before + 3
    segment = open_segment(file)
    buffers = [aligned_buffer(2**21) for _ in range(8)]
    tickets = [reader.submit([Read(segment, 0, 2**21, as_memoryview(buffer))]) for buffer in buffers]
    reader.close()
    assert all(ticket.done for ticket in tickets)
    assert len(names()) == before
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.submit([])
    segment.close()


def test_a_forgotten_reader_ends_its_threads() -> None:
    before = set(threading.enumerate())
    reader = ExtentReader(threads=2)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    del reader
    gc.collect()
    for worker in workers:
        worker.join(timeout=5)
        assert not worker.is_alive()


def test_many_threads_may_submit_at_once(segment: Segment, reader: ExtentReader) -> None:
    content = path_of(segment).read_bytes()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            draw = random.Random(seed)
            for _ in range(20):
                offsets = [draw.randrange(len(content) - 9000) for _ in range(20)]
                buffer = aligned_buffer(20 * 9000)
                view = as_memoryview(buffer)
                reads = [Read(segment, o, 9000, view[i * 9000 : (i + 1) * 9000]) for i, o in enumerate(offsets)]
                reader.submit(reads).wait()
                for i, o in enumerate(offsets):
                    assert view[i * 9000 : (i + 1) * 9000] == content[o : o + 9000]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_idle_reader_holds_no_buffers(segment: Segment, reader: ExtentReader) -> None:
    import weakref

    buffer = aligned_buffer(2**21)
    ticket = reader.submit([Read(segment, 0, 2**21, as_memoryview(buffer))])
    ticket.wait()
    gone = weakref.ref(buffer)
    del buffer
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    assert ticket.bytes_read == 2**21


def test_buffers_are_aligned_and_lengths_are_checked(segment: Segment, reader: ExtentReader) -> None:
    for nbytes in (0, 1, PAGE, 3 * 2**20 + 1):
        buffer = aligned_buffer(nbytes)
        assert buffer.shape == (nbytes,)
        assert nbytes == 0 or buffer.data_ptr() % PAGE == 0
    with pytest.raises(InputError, match="buffer of 10 bytes"):
        reader.submit([Read(segment, 0, 11, as_memoryview(aligned_buffer(10)))])
    with pytest.raises(InputError, match="contiguous"):
        as_memoryview(torch.zeros(4, 4).t())
    assert reader.submit([]).done
    reader.submit([]).wait()
