"""Do engines keep the promises of their protocol?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.store.fleet.conformance import ENGINE_CHECKS, EngineCheck
from hf_contiguouskv.store.fleet.engine import SharedEngine
from hf_contiguouskv.store.fleet.engines import default_folder, is_address
from hf_contiguouskv.store.fleet.objects import ObjectStorage, shown


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_promise(check: EngineCheck, url: str) -> None:
    check(lambda: ObjectStorage(url))


def test_is_an_engine(tmp_path: object) -> None:
    engine = ObjectStorage(f"file://{tmp_path}/x")
    assert isinstance(engine, SharedEngine)
    engine.close()


def test_requests_are_counted_as_they_are_charged_for(tmp_path: Path) -> None:
    """Ranges that are read together are one request, a part of an upload is one, and so is a page of names."""
    engine = ObjectStorage(f"file://{tmp_path}/x")

    def sent(call: Callable[[], object]) -> dict[str, int]:
        before = dict(engine.requests)
        call()
        return {kind: count - before[kind] for kind, count in engine.requests.items() if count > before[kind]}

    large = tmp_path / "large"
    large.write_bytes(bytes(20 * 2**20))
    assert sent(lambda: engine.create("a", b"1")) == {"puts": 1}
    assert sent(lambda: engine.create("a", b"2")) == {"puts": 1}
    assert sent(lambda: engine.put_many([f"names/{number}" for number in range(1500)])) == {"puts": 1500}
    assert sent(lambda: engine.upload("large", large)) == {"puts": 5}
    assert sent(lambda: engine.upload("small", Path(__file__))) == {"puts": 1}
    buffers = [memoryview(bytearray(1000)) for _ in range(4)]
    places = [0, 1000, 2**20, 5 * 2**20]
    assert sent(lambda: engine.read_ranges("large", list(zip(places, buffers, strict=True)))) == {"gets": 3}
    assert sent(lambda: engine.get("a", 10)) == {"gets": 1}
    assert sent(lambda: engine.list_each(["names", "nothing"], 20)) == {"lists": 2}
    # (Nothing tells that a full page is the last one, so one more is asked for.)
    assert sent(lambda: engine.list_each(["names"], 5000)) == {"lists": 2}
    engine.close()


@pytest.mark.parametrize("url", ["ftp://host/x", "s3//bucket", "http://host/x", ""])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected an address"):
        ObjectStorage(url)


def test_what_is_secret_is_not_shown() -> None:
    assert shown("s3://key:secret@bucket/folder?token=abc") == "s3://bucket/folder"
    assert default_folder("s3://a:b@bucket/folder/") == default_folder("s3://bucket/folder")
    assert default_folder("s3://bucket/folder") != default_folder("s3://bucket/folder2")


def test_addresses_and_paths() -> None:
    assert is_address("s3://bucket/x")
    assert is_address("file:///x")
    assert not is_address("kv-store")
    assert not is_address("/data/s3:/x")
    assert not is_address("C:/x")
