"""Quarantine, leftovers, accounting, closing; and what two objects on one place owe each other."""

from __future__ import annotations

from .tools import Make, is_gone, is_whole, listed, made, new_key, promise, publish, read, require, some_bytes, written


@promise
def quarantines_what_it_is_asked_to(make: Make) -> None:
    """`quarantine` takes exactly the blob with this identity out of service, and keeps it."""
    first, second, key = some_bytes(5000, 1), some_bytes(5000, 2), new_key()
    with made(make) as backend:
        publish(backend, key, first)
        old = backend.open(key)
        require(backend.quarantine(key, None) is False, "quarantine takes None for the identity of a blob")
        publish(backend, key, second)
        require(backend.quarantine(key, old.identity) is False, "quarantine must not take another blob's identity")
        is_whole(backend, key, second, "after a quarantine that was refused")
        require(listed(backend.quarantined(), key) is None, "what was not quarantined is listed")
        current = backend.open(key)
        require(backend.quarantine(key, current.identity) is True, "quarantine must be True where the blob was there")
        is_gone(backend, key, "after quarantine")
        info = listed(backend.quarantined(), key)
        require(info is not None and info.nbytes == 5000, f"quarantined() says {info}, expected 5000 bytes")
        require(read(current) == second, "who had the blob open when it was quarantined cannot read it any more")
        require(backend.quarantine(key, current.identity) is False, "quarantine of what is gone must be False")
        publish(backend, key, first)
        is_whole(backend, key, first, "published again beside its quarantine")
        for blob in (old, current):
            blob.close()
        backend.drop_quarantined(key)
        backend.delete(key)


@promise
def drops_its_quarantine(make: Make) -> None:
    """`drop_quarantined` deletes what was put aside, and only that, also when it was more than one."""
    content, keys = some_bytes(20_000), [new_key(), new_key()]
    with made(make) as backend:
        for key in (keys[0], *keys):
            publish(backend, key, content)
            require(backend.quarantine(key, backend.identity(key)), "quarantine must be True where the blob was there")
        publish(backend, keys[0], content)
        info = listed(backend.quarantined(), keys[0])
        require(info is not None, "quarantined() does not have it")
        freed = backend.drop_quarantined(keys[0])
        require(freed >= info.stored_bytes > 0, f"{freed} bytes freed, {info} was there")  # type: ignore[union-attr]
        require(listed(backend.quarantined(), keys[0]) is None, "quarantined() still has what was dropped")
        require(backend.drop_quarantined(keys[0]) == 0, "dropping it again must free 0 bytes")
        require(listed(backend.quarantined(), keys[1]) is not None, "the quarantine of another key was dropped")
        is_whole(backend, keys[0], content, "after its predecessor's quarantine was dropped")
        backend.drop_quarantined(keys[1])
        backend.delete(keys[0])


@promise
def counts_its_overhead(make: Make) -> None:
    """`overhead_bytes` covers the quarantine, and no published blob."""
    content, key = some_bytes(2**20), new_key()
    with made(make) as backend:
        empty = backend.overhead_bytes()
        require(empty >= 0, f"overhead_bytes is {empty}")
        publish(backend, key, content)
        published = backend.overhead_bytes()
        require(published - empty < len(content) // 2, f"a published blob counts: {empty} before, {published} after")
        stored = backend.open(key).stored_bytes
        backend.quarantine(key, backend.identity(key))
        aside = backend.overhead_bytes()
        require(aside - published >= stored, f"{stored} bytes of quarantine: {published} before, {aside} after")
        backend.drop_quarantined(key)
        dropped = backend.overhead_bytes()
        require(aside - dropped >= stored, f"a quarantine of {stored} was dropped: {aside} before, {dropped} after")


@promise
def collects_no_living_writer(make: Make) -> None:
    """`collect` removes nothing that is published, put aside, or still being written."""
    content, keys = some_bytes(5000), [new_key() for _ in range(3)]
    with made(make) as backend:
        publish(backend, keys[0], content)
        publish(backend, keys[1], content)
        backend.quarantine(keys[1], backend.identity(keys[1]))
        writer = written(backend, keys[2], content)
        for dry_run in (True, False):
            found = backend.collect(dry_run)
            mine = [name for name in found.removed if any(key in name for key in keys)]
            require(not mine, f"collect(dry_run={dry_run}) removes what is in use: {mine}")
        is_whole(backend, keys[0], content, "after collect")
        require(listed(backend.quarantined(), keys[1]) is not None, "collect has removed a quarantine")
        writer.seal()
        backend.collect()
        writer.publish()
        writer.discard()
        is_whole(backend, keys[2], content, "collected while it was being written")
        backend.drop_quarantined(keys[1])
        for key in (keys[0], keys[2]):
            backend.delete(key)


@promise
def discards_writers(make: Make) -> None:
    """`discard` gives up what is being written, and nothing that is published; it may be called again."""
    first, second, key = some_bytes(2**20, 1), some_bytes(2**20, 2), new_key()
    with made(make) as backend:
        publish(backend, key, first)
        before = backend.overhead_bytes()
        for sealed in (False, True):
            writer = written(backend, key, second)
            if sealed:
                writer.seal()
            writer.discard()
            writer.discard()
            after = backend.overhead_bytes()
            require(after - before < len(second) // 2, f"overhead_bytes {before} before, {after} after a discard")
            found = backend.collect()
            left = [name for name in found.in_use + found.removed if key in name]
            require(not left, f"a discarded writer has left {left}")
            is_whole(backend, key, first, "after the writer of its successor was discarded")
        writer = written(backend, key, second)
        writer.seal()
        writer.publish()
        writer.discard()
        writer.discard()
        is_whole(backend, key, second, "discard after publish")
        backend.delete(key)


@promise
def closes_twice(make: Make) -> None:
    """`close` may be called again, also where blobs were open; and these may be closed after it."""
    backend = make()
    key = new_key()
    publish(backend, key, some_bytes(100))
    blob = backend.open(key)
    backend.delete(key)
    backend.close()
    backend.close()
    blob.close()
    backend.close()


@promise
def shares_what_is_published(make: Make) -> None:
    """Two objects on one place see the same blobs under the same identities."""
    first, second, key = some_bytes(5000, 1), some_bytes(5000, 2), new_key()
    with made(make) as one, made(make) as two:
        publish(one, key, first)
        is_whole(two, key, first, "published by the other object")
        require(key in two.list_keys(), "list_keys lacks what the other object has published")
        require(one.identity(key) == two.identity(key), "the objects differ in the identity of one blob")
        blob = two.open(key)
        publish(one, key, second)
        require(two.identity(key) != blob.identity, "the other object's successor has the same identity")
        require(read(blob) == first, "replaced by the other object: an open reader reads something else")
        is_whole(two, key, second, "replaced by the other object")
        blob.close()
        require(two.delete(key) is True, "delete must be True for what the other object has published")
        is_gone(one, key, "deleted by the other object")


@promise
def shares_its_quarantine(make: Make) -> None:
    """What one object puts aside is gone for the other, who may drop it."""
    content, key = some_bytes(5000), new_key()
    with made(make) as one, made(make) as two:
        publish(one, key, content)
        require(two.quarantine(key, one.identity(key)), "an identity means nothing to the other object")
        is_gone(one, key, "quarantined by the other object")
        require(listed(one.quarantined(), key) is not None, "quarantined() lacks what the other object has put aside")
        require(one.drop_quarantined(key) > 0, "what the other object has put aside cannot be dropped")


@promise
def collects_no_writer_of_another(make: Make) -> None:
    """`collect` of one object leaves what another one is writing alone, and outlives its closing."""
    content, key = some_bytes(5000), new_key()
    with made(make) as one:
        writer = written(one, key, content)
        with made(make) as two:
            found = two.collect()
            require(not [name for name in found.removed if key in name], f"collect has removed {found.removed}")
        writer.seal()
        writer.publish()
        writer.discard()
        is_whole(one, key, content, "collected by another object while it was being written")
        one.delete(key)
