"""The names in a Mooncake Store, from its master's HTTP service: its Python package cannot list."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from urllib.request import ProxyHandler, build_opener

from ..engine import EngineUnavailableError
from .address import MooncakeAddress


def list_keys(address: MooncakeAddress, prefix: str, seconds: float) -> Iterator[str]:
    """The keys that begin with `prefix`. All keys of the master cross the network for it.

    Args:
        address: with `metrics_port`.
        prefix: of the keys.
        seconds: after which nothing more is waited for.

    Raises:
        EngineUnavailableError: the service does not answer.
    """
    url = f"http://{address.master}:{address.metrics_port}/get_all_keys"
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=seconds) as answer:
            for line in answer:
                key = line.decode(errors="replace").rstrip("\n")
                if key.startswith(prefix):
                    yield key
    except (OSError, http.client.HTTPException) as error:
        raise EngineUnavailableError(f"the names cannot be listed at {url}: {error}") from None
