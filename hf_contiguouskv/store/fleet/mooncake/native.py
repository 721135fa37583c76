"""The package of Mooncake Store: loading it, and what its numbers mean."""

from __future__ import annotations

import errno
import importlib
import math
import os
from typing import Any

from ....errors import StoreError
from ..engine import EngineUnavailableError

# What calls answer for a key.
NO_ROOM, MISSING, NOT_READY, LEASED, LEASE_OVER = -200, -704, -703, -706, -707
# Errors of the owner of the memory, and of the master.
TRANSFER_FAILED, MASTER_FAILED, MASTER_SILENT = -800, -900, -901
_MASTER = (MASTER_FAILED, MASTER_SILENT)
_TEXTS = {
    NO_ROOM: "there is no room: no machine lends memory, or all of it is in use",
    -600: "it is not as long as it should be",
    NOT_READY: "another machine is writing it",
    LEASED: "another machine reads it",
    LEASE_OVER: "it was read too slowly, and may have been evicted meanwhile",
    TRANSFER_FAILED: "the machine that holds it does not answer",
    MASTER_FAILED: "the master does not answer",
    MASTER_SILENT: "the master does not answer in time",
}
# System libraries that the package does not bring, and Debian's packages of them.
_LIBRARIES = {"libibverbs": "libibverbs1", "libcurl": "libcurl4", "libnuma": "libnuma1"}
_loaded_in: int | None = None


def load(name: str, timeout_s: float) -> Any:
    """The module `mooncake.store`.

    Its time-outs belong to the process and are read once: the first call sets those that the environment does not have.

    Args:
        name: of the store, for messages.
        timeout_s: seconds that an answer is waited for.

    Raises:
        StoreError: it is not installed, or a system library is missing, or this process is a fork of one that has
            loaded it.
    """
    global _loaded_in
    if _loaded_in not in (None, os.getpid()):
        # (A child would wait for ever, and take answers away from its parent, with which it shares the sockets.)
        raise StoreError(f"{name}: this process was forked from one that uses Mooncake Store; spawn it instead")
    seconds = str(max(1, math.ceil(timeout_s)))
    for variable, value in (
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", seconds),
        ("MC_TCP_STATUS_TIMEOUT_SEC", seconds),
        ("MC_RPC_TIMEOUT_MS", str(max(1, math.ceil(1000 * timeout_s)))),
        ("MC_RPC_CONNECT_TIMEOUT_MS", str(max(1, math.ceil(1000 * timeout_s)))),
        ("MC_STORE_CLIENT_SETUP_RETRIES", "1"),
        ("MC_LOG_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(variable, value)
    try:
        module = importlib.import_module("mooncake.store")
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{name}: Mooncake Store needs its package: pip install 'hf_contiguouskv[mooncake]' ({error})"
        ) from error
    except ImportError as error:
        missing = next((package for library, package in _LIBRARIES.items() if library in str(error)), None)
        remedy = (
            f"a system library is missing: apt-get install {' '.join(_LIBRARIES.values())} (newer releases of Debian "
            "and Ubuntu have libcurl4t64)"
            if missing
            else "its package cannot be loaded"
        )
        raise StoreError(f"{name}: Mooncake Store cannot be used, {remedy} ({error})") from error
    _loaded_in = os.getpid()
    return module


def checked(codes: list[int]) -> list[int]:
    """The answers of a call, if the master has given them.

    Raises:
        EngineUnavailableError: it has not.
    """
    failed = next((code for code in codes if code in _MASTER), None)
    if failed is not None:
        raise EngineUnavailableError(text_of(failed))
    return codes


def text_of(code: int) -> str:
    """What an answer means."""
    return _TEXTS.get(code, "Mooncake Store refused it") + f" ({code})"


def error_of(code: int, name: str) -> OSError | EOFError:
    """The error of this project for the answer of an object.

    Args:
        code: negative.
        name: of the object.
    """
    if code in (MISSING, NOT_READY):
        return FileNotFoundError(errno.ENOENT, "it is not there", name)
    if code in (*_MASTER, TRANSFER_FAILED, LEASE_OVER):
        return EngineUnavailableError(text_of(code))
    if code == -600:
        return EOFError(f"{name}: {text_of(code)}")
    return OSError(errno.ENOSPC if code == NO_ROOM else errno.EIO, text_of(code), name)
