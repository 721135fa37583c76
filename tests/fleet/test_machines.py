"""Is what one machine stores found, read and kept by others, and nothing lost or wrong?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from machines import Machines, engine_of, found, found_tokens, is_right, remote
from scenarios import IDS, branch_off, converse, damage_and_replace
from store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv import metrics
from hf_contiguouskv.errors import ConfigError, SegmentKeyError, StoreError, StoreFormatError
from hf_contiguouskv.session.arguments import opened_store
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.conformance import CHECKS, SHARED_CHECKS, Check
from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.fleet.backend import FleetBackend
from hf_contiguouskv.store.fleet.catalog import Catalog
from hf_contiguouskv.store.fleet.names import MARKER
from hf_contiguouskv.store.fleet.objects import ObjectStorage
from hf_contiguouskv.store.fleet.records import Records
from hf_contiguouskv.store.local_disk import LocalDisk


def test_another_machine_finds_what_was_stored_after_it_was_opened(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    assert found_tokens(two, IDS) == 0
    write_prefix(one, IDS)
    assert one.flush()
    stored = found(two, np.concatenate([IDS, some_tokens(50, seed=1)]))
    assert stored is not None
    assert stored.tokens == len(IDS)
    assert is_right(two, stored, IDS)
    assert remote(one)["published"] == 1
    assert remote(two)["found"] == 1


def test_what_was_read_once_is_read_from_this_machine(machines: Machines) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two")
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)
    crossed = remote(two)["bytes_read"]
    assert is_right(two, stored, IDS)
    assert remote(two)["bytes_read"] == crossed
    two.flush()
    assert crossed // 2 < two.stats.segment_bytes <= 2 * crossed
    crossed = remote(two)["bytes_read"]
    assert two.verify() == []
    assert remote(two)["bytes_read"] == crossed
    two.close()
    again = machines("two")
    stored = found(again, IDS)
    assert stored is not None
    assert is_right(again, stored, IDS)
    assert "bytes_read" not in remote(again)


def test_only_what_is_asked_for_crosses_the_network(machines: Machines) -> None:
    ids = some_tokens(8000)
    segment = write_prefix(machines("one"), ids).spans[0].segment
    machines("one").flush()
    two = machines("two")
    stored = found(two, ids)
    assert stored is not None
    before = remote(two)["bytes_read"]
    blob = stored.spans[0].segment.blob
    extents = stored.spans[0].segment.extents()
    some = [(extents.offset(1, chunk), memoryview(bytearray(extents.nbytes))) for chunk in range(0, 2000, 40)]
    blob.read_into(some)
    crossed = remote(two)["bytes_read"] - before
    asked = sum(into.nbytes for _, into in some)
    assert asked <= crossed <= 1.1 * asked
    for chunk, (offset, into) in zip(range(0, 2000, 40), some, strict=True):
        assert offset == segment.extents().offset(1, chunk)
        assert segment.checksum(into) == segment.run_checksums(1, chunk, 1)[0]


@pytest.mark.parametrize("shared", [300, 640, 999])
def test_a_prompt_that_branches_off_finds_what_it_shares(machines: Machines, shared: int) -> None:
    branch_off(machines, shared)


def test_a_conversation_that_went_from_machine_to_machine(machines: Machines) -> None:
    converse(machines)
    assert remote(machines("three"))["asked"] == 1


def test_match_asks_the_other_machines(folder_machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_contiguouskv.store.prefix_store.model_fingerprint", lambda model: FINGERPRINT)
    ids = some_tokens(1001)
    write_prefix(folder_machines("one"), ids, g=geometry(chunk_size=16))
    folder_machines("one").flush()
    assert folder_machines("two").match(None, ids) == 1001


def test_metrics_of_a_shared_store(folder_machines: Machines) -> None:
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    write_prefix(folder_machines("one"), IDS)
    folder_machines("one").flush()
    two = folder_machines("two")
    metrics.register(two, registry)
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)
    counts = two.stats.remote
    assert counts["read_us"] > 0
    for name, what in (("lookups", "asked"), ("hits", "found"), ("bytes_read", "bytes_read"), ("reads", "reads")):
        assert registry.get_sample_value(f"contiguouskv_remote_{name}_total") == counts[what] > 0


def test_few_missing_tokens_are_not_asked_for(machines: Machines) -> None:
    one = machines("one")
    write_prefix(one, IDS)
    assert found_tokens(one, np.concatenate([IDS, some_tokens(200, seed=1)])) == len(IDS)
    assert found_tokens(one, some_tokens(200, seed=3)) == 0
    assert "asked" not in remote(one)


def test_two_machines_that_store_the_same_keep_one_copy(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    write_prefix(one, IDS)
    write_prefix(two, IDS)
    one.flush(), two.flush()
    counts = [remote(one), remote(two)]
    assert sum(count.get("published", 0) for count in counts) == 1
    assert sum(count.get("published_by_others", 0) for count in counts) == 1
    objects = [info.name for info in engine_of(one).walk("segments")]
    assert len(objects) == 1
    assert found_tokens(machines("three"), IDS) == len(IDS)


def test_evicting_here_deletes_nothing_there(machines: Machines) -> None:
    one = machines("one")
    prefixes = [some_tokens(1000, seed=seed) for seed in range(6)]
    for ids in prefixes:
        write_prefix(one, ids)
    one.flush()
    size = one.entries()[0].bytes
    two = machines("two", max_disk_bytes=2 * size)
    for ids in prefixes:
        stored = found(two, ids)
        assert stored is not None
        assert is_right(two, stored, ids)
        two.flush()
        assert two.stats.segment_bytes <= 2 * size
    assert two.stats.evicted > 0
    assert len(list(engine_of(one).walk("segments"))) == len(prefixes)
    for ids in prefixes:
        stored = found(two, ids)
        assert stored is not None
        assert is_right(two, stored, ids)


def test_deleting_here_deletes_nothing_there(machines: Machines) -> None:
    key = write_prefix(machines("one"), IDS).spans[0].segment.key
    machines("one").flush()
    two = machines("two")
    assert found_tokens(two, IDS) == len(IDS)
    assert two.delete(key) == [key]
    assert two.entries() == []
    assert found_tokens(two, IDS) == len(IDS)


def test_what_is_gone_there_is_a_miss(machines: Machines) -> None:
    key = write_prefix(machines("one"), IDS).spans[0].segment.key
    machines("one").flush()
    two, three = machines("two"), machines("three")
    assert found_tokens(two, IDS) == len(IDS)
    Catalog(engine_of(two)).withdraw(key)
    assert list(engine_of(two).walk("segments")) == list(engine_of(two).walk("anchors")) == []
    assert found_tokens(three, IDS) == 0
    # This one knows the segment, and reads what it does not keep of it.
    stored = found(two, IDS)
    assert stored is not None
    with pytest.raises(StoreError, match="not in the shared store any more"):
        is_right(two, stored, IDS)
    assert remote(two)["missing"] >= 1
    assert found_tokens(two, IDS) == 0


def test_damage_here_is_told_from_damage_there(machines: Machines) -> None:
    segment = write_prefix(machines("one"), IDS).spans[0].segment
    machines("one").flush()
    two = machines("two")
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)
    two.flush()
    (kept,) = Path(two.path, "shared").iterdir()
    octets = bytearray(kept.read_bytes())
    octets[segment.extents().offset(1, 3)] ^= 1
    kept.write_bytes(octets)
    with pytest.raises(StoreError, match="checksum"):
        is_right(two, stored, IDS)
    two.inner.discard(stored.spans[0].segment, "its bytes were wrong")
    two.flush()
    assert "damaged" not in remote(two)
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)


def test_damage_there_is_replaced_by_who_has_it_right(machines: Machines) -> None:
    engine, before = engine_of(machines("one")), []

    def damage() -> None:
        (info,) = engine.walk("segments")
        octets = bytearray(info.nbytes)
        engine.read_ranges(info.name, [(0, memoryview(octets))])
        octets[len(octets) // 2] ^= 1
        engine.put(info.name, bytes(octets))
        before.append(info.name)

    damage_and_replace(machines, damage)
    names = [info.name for info in engine.walk("segments")]
    assert len(names) == 1
    assert names != before


def test_an_object_that_lies_is_not_used(machines: Machines) -> None:
    one = machines("one")
    write_prefix(one, IDS)
    write_prefix(one, some_tokens(1001, seed=7))
    one.flush()
    engine = engine_of(one)
    first, second = engine.walk("segments")
    for target, source in ((first, second), (second, first)):
        octets = bytearray(source.nbytes)
        engine.read_ranges(source.name, [(0, memoryview(octets))])
        engine.put(f"{target.name}.other", bytes(octets))
    for target in (first, second):
        engine.put(target.name, engine.get(f"{target.name}.other", 2**30))
        engine.delete([f"{target.name}.other"])
    two = machines("two")
    assert found_tokens(two, IDS) == 0
    assert found_tokens(two, some_tokens(1001, seed=7)) == 0
    assert two.entries() == []


def test_tenants_do_not_find_each_other(machines: Machines) -> None:
    one = machines("one", salt="a")
    write_prefix(one, IDS)
    one.flush()
    assert found_tokens(machines("two", salt="b"), IDS) == 0
    assert found_tokens(machines("three"), IDS) == 0
    assert found_tokens(machines("four", salt="a"), IDS) == len(IDS)


def test_a_store_with_a_key_uses_only_what_was_made_with_it(machines: Machines) -> None:
    key, other = b"k" * 32, b"o" * 32
    one = machines("one", key=key)
    write_prefix(one, IDS)
    one.flush()
    two = machines("two", key=key)
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)
    assert found_tokens(machines("three", key=other), IDS) == 0
    assert found_tokens(machines("four"), IDS) == 0
    assert issubclass(SegmentKeyError, StoreError)


def test_what_an_earlier_process_could_not_send_is_sent_later(folder_machines: Machines, tmp_path: Path) -> None:
    alone = PrefixStore(tmp_path / "one")
    write_prefix(alone, IDS)
    alone.close()
    one = folder_machines("one")
    one.flush()
    assert remote(one)["published"] == 1
    one.close()
    again = folder_machines("one")
    again.flush()
    assert remote(again) == {}
    assert found_tokens(folder_machines("two"), IDS) == len(IDS)


def test_a_writer_that_died_before_it_named_its_segment_is_helped(folder_machines: Machines) -> None:
    one = folder_machines("one")
    write_prefix(one, IDS)
    one.flush()
    engine = engine_of(one)
    engine.delete([info.name for info in engine.walk("anchors")])
    assert found_tokens(folder_machines("two"), IDS) == 0
    three = folder_machines("three")
    write_prefix(three, IDS)
    three.flush()
    assert remote(three)["published_by_others"] == 1
    assert found_tokens(folder_machines("two"), IDS) == len(IDS)


def test_a_creation_that_is_sent_twice_keeps_its_bytes(
    folder_machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = ObjectStorage.create
    # (The answer to the first request was lost, and the second one meets what the first has written.)
    monkeypatch.setattr(ObjectStorage, "create", lambda self, *args: create(self, *args) and create(self, *args))
    one = folder_machines("one")
    write_prefix(one, IDS)
    one.flush()
    assert remote(one)["published"] == 1
    stored = found(folder_machines("two"), IDS)
    assert stored is not None
    assert is_right(folder_machines("two"), stored, IDS)


def test_a_head_without_its_object_is_replaced(folder_machines: Machines) -> None:
    one, two = folder_machines("one"), folder_machines("two")
    write_prefix(one, IDS)
    one.flush()
    engine = engine_of(one)
    engine.delete([info.name for info in engine.walk("segments")])
    assert found_tokens(two, IDS) == 0
    write_prefix(two, IDS)
    two.flush()
    assert remote(two)["published"] == 1
    assert found_tokens(folder_machines("three"), IDS) == len(IDS)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"x" * 100_000, b'{"segment": {}, "names": [], "about": {}}'])
def test_a_head_that_makes_no_sense_is_left_alone(folder_machines: Machines, text: bytes) -> None:
    one = folder_machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    engine = engine_of(one)
    engine.put(f"heads/{key}", text)
    two = folder_machines("two")
    write_prefix(two, IDS)
    two.flush()
    assert remote(two)["send_failures"] == 1
    assert engine.get(f"heads/{key}", 2**20) == text
    assert two.shared_upkeep.entries() == []
    assert found_tokens(folder_machines("three"), IDS) == len(IDS)


def test_a_head_that_lies_about_its_place_stops_nothing(folder_machines: Machines) -> None:
    one = folder_machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    engine = engine_of(one)
    told = json.loads(engine.get(f"heads/{key}", 2**20))
    told["segment"]["first_chunk"] = 2**40
    engine.put(f"heads/{key}", json.dumps(told).encode())
    two = folder_machines("two")
    write_prefix(two, IDS)
    write_prefix(two, some_tokens(900, seed=5))
    two.flush()
    assert remote(two)["published"] == 2


def test_fields_of_a_later_release_are_passed_over(folder_machines: Machines) -> None:
    one = folder_machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    engine = engine_of(one)
    told = json.loads(engine.get(f"heads/{key}", 2**20))
    told |= {"new": 1, "segment": told["segment"] | {"colour": "red"}, "about": told["about"] | {"taste": "sweet"}}
    engine.put(f"heads/{key}", json.dumps(told).encode())
    assert [entry.key for entry in one.shared_upkeep.entries()] == [key]


def test_a_prefix_among_thousands_that_share_its_beginning(folder_machines: Machines) -> None:
    one = folder_machines("one")
    write_prefix(one, IDS)
    one.flush()
    engine = engine_of(one)
    rng = np.random.default_rng(0)
    others = []
    for info in engine.walk("anchors"):
        beginning, samples, _, _ = info.name.rsplit("-", 3)
        if samples:
            others += [
                f"{beginning}-{rng.bytes(len(samples) // 2).hex()}-{rng.bytes(16).hex()}-00000000" for _ in range(1200)
            ]
    engine.put_many(others)
    stored = found(folder_machines("two"), IDS)
    assert stored is not None
    assert stored.tokens == len(IDS)


def test_a_file_that_takes_the_place_of_what_was_kept_is_not_taken_for_it(folder_machines: Machines) -> None:
    write_prefix(folder_machines("one"), IDS)
    folder_machines("one").flush()
    two = folder_machines("two")
    stored = found(two, IDS)
    assert stored is not None
    assert is_right(two, stored, IDS)
    two.flush()
    (kept,) = Path(two.path, "shared").iterdir()
    size = kept.stat().st_size
    kept.rename(kept.with_name("moved"))
    with open(kept, "wb") as file:
        file.truncate(size)
    assert is_right(two, stored, IDS)
    two.close()
    again = folder_machines("two")
    stored = found(again, IDS)
    assert stored is not None
    assert is_right(again, stored, IDS)


def test_what_crosses_a_network_is_always_verified(folder_machines: Machines) -> None:
    store = folder_machines("one")
    with pytest.raises(ConfigError, match="always verified"):
        opened_store(store, needed=True, verify=False)


def test_word_of_use_is_left(folder_machines: Machines) -> None:
    one = folder_machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    two = folder_machines("two")
    for _ in range(3):
        assert found_tokens(two, IDS) == len(IDS)
    two.flush()
    assert [info.name for info in engine_of(one).walk("used")] == [f"used/{key}"]


def test_a_folder_of_another_format_is_refused(folder_machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / MARKER).write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreFormatError, match="expected"):
        folder_machines("one")


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache="):
        PrefixStore(tmp_path / "store", cache=tmp_path / "other")
    with pytest.raises(ConfigError, match="backend="):
        PrefixStore(f"file://{tmp_path}/x", cache=tmp_path / "c", backend=LocalDisk(tmp_path))
    for seconds in (0, -1, float("nan"), None, "1"):
        with pytest.raises(ConfigError, match="remote_timeout_s"):
            PrefixStore(f"file://{tmp_path}/x", cache=tmp_path / "c", remote_timeout_s=seconds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass it as text"):
        PrefixStore(Path("s3://bucket/folder"))
    with pytest.raises(ConfigError, match="expected an address"):
        PrefixStore("ftp://host/x", cache=tmp_path / "c")


def test_a_path_to_a_cache_may_be_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "caches"))
    url = f"file://{tmp_path / 'shared'}"
    store = PrefixStore.shared(url)
    assert PrefixStore.shared(url) is store
    assert store.path.parent == tmp_path / "caches"
    assert store.url == url
    store.close()


@pytest.mark.parametrize("check", [*CHECKS, *SHARED_CHECKS], ids=lambda check: check.__name__)
def test_the_backend_keeps_its_promises(check: Check, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()

    def make() -> FleetBackend:
        folder = Directory.open(tmp_path / "store")
        engine = ObjectStorage(f"file://{tmp_path / 'shared'}")
        return FleetBackend(LocalDisk(folder), folder, engine, Records(folder))

    check(make)
