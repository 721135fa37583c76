"""From an address to an engine, and to the folder that a machine keeps for it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit, urlunsplit

from ...errors import ConfigError
from .engine import SharedEngine
from .mooncake.address import SCHEME as MOONCAKE
from .mooncake.engine import MooncakeStore
from .objects import SCHEMES, ObjectStorage, shown

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
# Where folders for shared stores lie by default, unless this variable names another place.
_VARIABLE = "CONTIGUOUSKV_CACHE"
_DEFAULT = "~/.cache/contiguouskv"


def is_address(place: object) -> TypeGuard[str]:
    """Whether this is the address of a shared store, not a path."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


def engine_for(address: str, timeout_s: float) -> SharedEngine:
    """The engine that an address means.

    Raises:
        ConfigError: there is none for it.
        StoreError: what it needs is not installed.
    """
    scheme = urlsplit(address).scheme
    if scheme == MOONCAKE:
        return MooncakeStore(address, timeout_s)
    if scheme in SCHEMES:
        return ObjectStorage(address, timeout_s)
    known = ", ".join((*SCHEMES, MOONCAKE))
    raise ConfigError(f"{shown(address)}: expected an address that begins with one of {known}")


def within(address: str, folder: str) -> str:
    """The address of a folder in the place that an address means."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{folder}"))


def address_for_key(address: str, key_name: str | None) -> str:
    """The part of a shared store that those use who have a key: what was made with another one is of no use to them.

    Args:
        address: of the shared store.
        key_name: what may be told of the key; `None`: there is none.
    """
    return address if key_name is None else within(address, f"keyed-{key_name}")


def default_folder(address: str) -> Path:
    """Where this machine keeps what it has of a shared store: one folder for each address."""
    plain = shown(address).rstrip("/")
    digest = hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()
    readable = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[-40:].strip("-")
    return Path(os.environ.get(_VARIABLE) or _DEFAULT).expanduser() / f"{readable}-{digest}"
