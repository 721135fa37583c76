"""Do engines keep the promises of their protocol?"""

from __future__ import annotations

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
