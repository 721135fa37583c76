"""Reading: what every backend promises of an open blob."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np

from ..backend import Blob
from .tools import PAGE, Make, is_whole, made, new_key, promise, publish, read, refuses, require, some_bytes


@promise
def ends_where_it_ends(make: Make) -> None:
    """`EOFError` for what is past the end, wholly or in part, wherever in the list it stands."""
    key = new_key()
    with made(make) as backend:
        for nbytes in (1000, 2 * PAGE, 2 * PAGE + 1):
            content = some_bytes(nbytes)
            publish(backend, key, content)
            blob = backend.open(key)
            for offset, length in ((nbytes, 1), (nbytes - 1, 2), (0, nbytes + 1), (nbytes + 3 * PAGE, 10), (0, 10**5)):
                what = f"{length} bytes at {offset} of {nbytes}"
                refuses(EOFError, functools.partial(read, blob, offset, length), what)
                good, bad = memoryview(bytearray(10)), memoryview(bytearray(length))
                for extents in ([(0, good), (offset, bad)], [(offset, bad), (0, good)]):
                    refuses(EOFError, functools.partial(blob.read_into, extents), f"{what}, beside a good extent")
            require(read(blob) == content, "nothing can be read after an EOFError")
            blob.close()
        backend.delete(key)


@promise
def knows_what_is_backed(make: Make) -> None:
    """What was written is backed by storage, also when nobody finds it any more; what is past the end is not."""
    key, content = new_key(), some_bytes(3 * PAGE + 5)
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        backend.delete(key)
        for offset, nbytes in ((0, len(content)), (0, 1), (PAGE - 1, 2), (len(content) - 1, 1), (PAGE, 0)):
            require(blob.is_backed(offset, nbytes) is True, f"{nbytes} bytes at {offset} were written, are not backed")
        for offset, nbytes in ((len(content), 1), (0, len(content) + 1), (2**40, 1), (0, 2**62)):
            what = f"{nbytes} bytes at {offset} of {len(content)}"
            require(blob.is_backed(offset, nbytes) is False, f"{what} are backed, it says")
        blob.close()


@promise
def reads_nothing(make: Make) -> None:
    """Extents without length, and no extents at all, read nothing and disturb nothing."""
    content, key = some_bytes(5000), new_key()
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        require(blob.read_into([]) == 0, "no extents must read 0 bytes")
        octets = bytearray(20)
        extents = [(0, memoryview(bytearray())), (7, memoryview(octets)[:20]), (5000, memoryview(bytearray()))]
        require(blob.read_into(extents) >= 20, "fewer bytes are counted than were read")
        require(bytes(octets) == content[7:27], "an extent beside one of no length reads something else")
        blob.close()
        backend.delete(key)


@promise
def reads_unaligned(make: Make) -> None:
    """Any offset and length, into memory at any address; not one byte beside it is touched."""
    content, key = some_bytes(4 * PAGE + 123), new_key()
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        for offset in (0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE):
            for length in (1, 511, 512, PAGE, PAGE + 1, len(content) - offset):
                for shift in (0, 1, 64, 513):
                    around = bytearray(b"\0" * (shift + length + 100))
                    count = blob.read_into([(offset, memoryview(around)[shift : shift + length])])
                    where = f"{length} bytes at {offset} into memory shifted by {shift}"
                    require(around[shift : shift + length] == content[offset : offset + length], f"{where}: wrong")
                    require(not any(around[:shift] + around[shift + length :]), f"{where}: the bytes beside changed")
                    require(count >= length, f"{where}: only {count} bytes are counted")
        blob.close()
        backend.delete(key)


@promise
def reads_many_extents(make: Make) -> None:
    """Many extents in one call, in any order, of ranges that overlap or repeat."""
    content, key = some_bytes(2**18), new_key()
    chance = np.random.default_rng(5)
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        for count in (2, blob.extents_per_read, 3 * blob.extents_per_read + 1, 300):
            begins = chance.integers(0, len(content) - 9000, count)
            lengths = np.where(chance.integers(0, 2, count), 2 * PAGE, chance.integers(1, 9000, count))
            begins = np.where(chance.integers(0, 2, count), begins & -PAGE, begins)
            begins[-1], lengths[-1] = begins[0], lengths[0]
            _compare(blob, content, begins.tolist(), lengths.tolist())
        blob.close()
        backend.delete(key)


def _compare(blob: Blob, content: bytes, begins: Sequence[int], lengths: Sequence[int]) -> None:
    buffers = [bytearray(length) for length in lengths]
    counted = blob.read_into([(begin, memoryview(into)) for begin, into in zip(begins, buffers, strict=True)])
    touched = np.zeros(len(content), dtype=bool)
    for begin, into in zip(begins, buffers, strict=True):
        touched[begin : begin + len(into)] = True
        require(into == content[begin : begin + len(into)], f"{len(into)} bytes at {begin}, among others: wrong")
    # (Ranges that overlap may be fetched once.)
    require(counted >= touched.sum(), f"{counted} bytes are counted, {touched.sum()} were needed")


@promise
def serves_many_threads(make: Make) -> None:
    """Several threads read one blob at once, each of them what it asked for; others write and delete meanwhile."""
    content, key = some_bytes(2**18), new_key()
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        errors: list[BaseException] = []
        start = threading.Barrier(7)

        def work(seed: int) -> None:
            try:
                chance = np.random.default_rng(seed)
                start.wait()
                for _ in range(40):
                    begins = chance.integers(0, len(content) - 20_000, 5).tolist()
                    _compare(blob, content, begins, chance.integers(1, 20_000, 5).tolist())
            except BaseException as error:
                errors.append(error)

        def disturb() -> None:
            try:
                start.wait()
                for seed in range(10):
                    other = new_key()
                    publish(backend, other, some_bytes(5000, seed))
                    is_whole(backend, other, some_bytes(5000, seed), "published by one of several threads")
                    require(backend.list_keys() >= {key, other}, "a thread does not find what it has published")
                    backend.delete(other)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
        threads += [threading.Thread(target=disturb) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        blob.close()
        backend.delete(key)


@promise
def closes_blobs(make: Make) -> None:
    """A closed blob raises `OSError`, may be closed again, and disturbs no other handle on the same blob."""
    content, key = some_bytes(PAGE), new_key()
    with made(make) as backend:
        publish(backend, key, content)
        one, two = backend.open(key), backend.open(key)
        require(one.identity == two.identity, "two handles on one blob differ in identity")
        one.close()
        one.close()
        refuses(OSError, lambda: read(one), "reading a closed blob")
        require(read(two) == content, "closing one handle closes another")
        two.close()
        backend.delete(key)
