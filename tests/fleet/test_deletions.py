"""Does what was deleted for all machines stay deleted, and may what is computed later be sent?"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from machines import Machines, engine_of, found_tokens, remote
from store_helpers import some_tokens, write_prefix
from typer.testing import CliRunner

from hf_contiguouskv.cli import app
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fleet import upkeep
from hf_contiguouskv.store.fleet.catalog import Catalog
from hf_contiguouskv.store.fleet.computed import RESOLUTION_S, Since, ticks, unknown
from hf_contiguouskv.store.fleet.engine import EngineUnavailableError
from hf_contiguouskv.store.fleet.names import deleted_name

IDS = some_tokens(1001)


def names(store: PrefixStore) -> list[str]:
    """What lies in the shared store of segments."""
    engine = engine_of(store)
    return [info.name for folder in ("segments", "heads", "anchors") for info in engine.walk(folder)]


def store_and_delete(store: PrefixStore) -> str:
    """Store the prefix on one machine, send it, and delete it for all; its key."""
    key = write_prefix(store, IDS).spans[0].segment.key
    store.flush()
    assert remote(store)["published"] == 1
    assert [entry.key for entry in store.shared_upkeep.delete([key])] == [key]
    assert names(store) == []
    return key


def test_a_copy_of_an_earlier_process_is_not_sent_after_the_deletion(machines: Machines, tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "one") as alone:
        write_prefix(alone, IDS)
    store_and_delete(machines("two"))
    one = machines("one")
    one.flush()
    assert remote(one) == {"withheld": 1}
    assert names(one) == []
    assert found_tokens(one, IDS) == len(IDS)
    assert found_tokens(machines("three"), IDS) == 0
    # It is not asked about at each start.
    one.close()
    machines("one").flush()
    assert remote(machines("one")) == {}


def test_a_copy_that_waits_to_be_sent_is_not_sent_after_the_deletion(
    folder_machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = folder_machines("one")

    def down(*ignored: object) -> bytes:
        raise EngineUnavailableError("for a test")

    with monkeypatch.context() as patched:
        patched.setattr(engine_of(one), "get", down)
        write_prefix(one, IDS)
        one.flush()
        assert one.inner.fleet is not None
        assert one.inner.fleet.waiting == 1
    store_and_delete(folder_machines("two"))
    one.flush()
    assert one.inner.fleet.waiting == 0
    assert remote(one)["withheld"] == 1
    assert names(one) == []


def test_what_is_computed_after_the_deletion_is_sent(machines: Machines) -> None:
    store_and_delete(machines("two"))
    time.sleep(RESOLUTION_S + 1.2)  # (Object servers tell whole seconds.)
    three = machines("three")
    write_prefix(three, IDS)
    three.flush()
    assert remote(three) == {"published": 1}
    assert found_tokens(machines("four"), IDS) == len(IDS)
    # So is a second copy of it on the machine that deleted it, once it computes it again.
    two = machines("two")
    two.delete(two.entries()[0].key)
    write_prefix(two, IDS)
    two.flush()
    assert remote(two)["published_by_others"] == 1


def test_a_deletion_while_the_bytes_are_sent_counts(folder_machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder_machines("one")
    engine = engine_of(one)
    catalog, create = Catalog(engine), engine.create

    def delete_first(name: str, octets: bytes) -> bool:
        key = name.rpartition("/")[2]
        catalog.report_deletion(key, catalog.now())
        catalog.withdraw(key)
        return create(name, octets)

    monkeypatch.setattr(engine, "create", delete_first)
    write_prefix(one, IDS)
    one.flush()
    assert remote(one) == {"withheld": 1}
    assert names(one) == []


@pytest.mark.parametrize("word", [b"", b"nonsense", b"[]", b'{"until": NaN}', b'{"until": "soon"}'])
def test_word_that_makes_no_sense_withholds(folder_machines: Machines, word: bytes) -> None:
    key = store_and_delete(folder_machines("two"))
    one = folder_machines("one")
    engine_of(one).put(deleted_name(key), word)
    write_prefix(one, IDS)
    one.flush()
    assert remote(one) == {"withheld": 1}


def test_the_clock_of_the_engine_is_asked_only_after_a_deletion(folder_machines: Machines) -> None:
    one = folder_machines("one")
    write_prefix(one, IDS)
    one.flush()
    assert list(engine_of(one).walk("clock")) == []


def test_when_it_was_computed_is_told_by_the_engine_and_by_what_has_passed_since() -> None:
    asked = []

    def engine_now() -> float:
        asked.append(now)
        return 1_000_000.0 + now

    now = 50.0
    since = Since(40.0, engine_now, lambda: now)
    assert asked == []
    assert since() == pytest.approx(1_000_040.0, abs=0.1)
    # A clock that nobody corrects may run too slow: the moment comes out too early, not too late.
    now += 86400
    assert 1_000_040.0 - 100 < since() < 1_000_040.0
    assert unknown() < since()
    assert 0 < ticks() <= ticks()


def test_push_withholds_what_was_deleted_unless_it_is_told_otherwise(
    folder_machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "commands"))
    folder = tmp_path / "folder"
    with PrefixStore(folder) as alone:
        write_prefix(alone, IDS)
        write_prefix(alone, some_tokens(500, seed=5))
    store_and_delete(folder_machines("two"))
    arguments = ["push", str(folder), folder_machines.url, "--all"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "1 segment sent" in first.stdout
    assert "--deleted-too" in first.stderr
    assert found_tokens(folder_machines("three"), IDS) == 0
    second = CliRunner().invoke(app, [*arguments, "--deleted-too"])
    assert "1 segment sent" in second.stdout
    assert "deleted" not in second.stderr
    assert found_tokens(folder_machines("three"), IDS) == len(IDS)


def test_word_of_deletions_is_kept_for_a_while(folder_machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    two = folder_machines("two")
    key = store_and_delete(two)
    assert two.shared_upkeep.collect() == ([], 0)
    assert [info.name for info in engine_of(two).walk("deleted")] == [deleted_name(key)]
    monkeypatch.setattr(upkeep, "_DELETIONS_S", -60.0)
    names_of_old, _ = two.shared_upkeep.collect()
    assert names_of_old == [deleted_name(key)]
    assert list(engine_of(two).walk("deleted")) == []
