"""What an address of a Mooncake Store says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

from ....errors import ConfigError
from ..names import SHARED_FORMAT

SCHEME = "mooncake"
_FORM = "mooncake://MASTER:PORT[/FOLDER][?segment=4GiB&host=ADDRESS&metrics_port=PORT]"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})?")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
# Mooncake takes memory in units of this size.
_LEAST_SEGMENT = 16 * 2**20


@dataclass(frozen=True, slots=True)
class MooncakeAddress:
    """A store in a Mooncake Store.

    Attributes:
        master: host name or IPv4 address of the master.
        port: of its RPC service.
        folder: tells stores of one master apart; may be empty.
        segment_bytes: memory that this process lends; 0: none.
        host: name or IPv4 address under which other machines reach this one; `None`: the one that leads to the master.
        metrics_port: of the master's HTTP service, which lists names; `None`: not known.
    """

    master: str
    port: int
    folder: str = ""
    segment_bytes: int = 0
    host: str | None = None
    metrics_port: int | None = None

    @classmethod
    def parse(cls, url: str) -> MooncakeAddress:
        """What `mooncake://MASTER:PORT[/FOLDER][?segment=4GiB&host=ADDRESS&metrics_port=PORT]` says.

        Raises:
            ConfigError: it is no such address.
        """
        parts = urlsplit(url)
        try:
            master, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"{_plain(parts)}: {error}; expected {_FORM}") from None
        if parts.scheme != SCHEME or not port or parts.fragment or "@" in parts.netloc or not _HOST.fullmatch(master):
            # (IPv6 was never tried with Mooncake Store.)
            raise ConfigError(f"{_plain(parts)}: expected {_FORM}, with a host name or an IPv4 address")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(set(options) - {"segment", "host", "metrics_port"})
        if unknown:
            raise ConfigError(f"{_plain(parts)}: unknown option {unknown[0]!r}; expected {_FORM}")
        host = options.get("host")
        if host is not None and not _HOST.fullmatch(host):
            raise ConfigError(f"{_plain(parts)}: host={host!r} is neither a host name nor an IPv4 address")
        return cls(
            master,
            port,
            parts.path.strip("/"),
            _size(options.get("segment", "0"), parts),
            host,
            _port(options["metrics_port"], parts) if "metrics_port" in options else None,
        )

    @property
    def root(self) -> str:
        """What all keys of this store begin with: the format, and the folder as one word."""
        return f"contiguouskv-{SHARED_FORMAT}/{quote(self.folder, safe='')}"


def _plain(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _size(text: str, parts: SplitResult) -> int:
    found = _SIZE.fullmatch(text)
    if not found:
        raise ConfigError(f"{_plain(parts)}: segment={text!r} is no size; expected one such as 4GiB, or 0")
    nbytes = int(float(found[1]) * _UNITS[found[2] or "B"])
    if nbytes and nbytes < _LEAST_SEGMENT:
        raise ConfigError(f"{_plain(parts)}: segment={text} is too small; expected 0, or at least 16MiB")
    return nbytes


def _port(text: str, parts: SplitResult) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"{_plain(parts)}: metrics_port={text!r} is no port")
    return int(text)
