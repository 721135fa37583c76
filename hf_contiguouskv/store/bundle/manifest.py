"""The list of a bundle: `bundle.json`, and what it may say."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import InputError, StoreError, StoreFormatError
from ...wording import quoted
from ..backend import checked_key
from ..local_disk import SUFFIX
from ..strict_json import once_each

BUNDLE_FORMAT = 1
MANIFEST = "bundle.json"
SEGMENTS = "segments"
_NAME = "hf_contiguouskv bundle"
MAX_MANIFEST_BYTES = 32 * 2**20
MAX_SEGMENTS = 100_000
# What Python makes of a list takes many times its bytes where it says little with many signs ("[{},{},{},"): so the
# signs are counted first. A list of this library has one brace that opens and six commas for each segment.
_MAX_SIGNS = ((b"{", 2 * MAX_SEGMENTS), (b"[", 2 * MAX_SEGMENTS), (b",", 12 * MAX_SEGMENTS))
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")


class BundleError(StoreError):
    """A bundle is damaged, or is not what it says."""


@dataclass(frozen=True)
class BundledSegment:
    """One segment of a bundle, as its list says.

    Attributes:
        key: name of the segment, 32 hex digits.
        parent: chain hash of the chunk that it continues, hex; "" when it begins a prefix.
        tokens: length of the whole prefix that ends with it, parents included.
        bytes: length of its file.
        sha256: of its file, hex.
    """

    key: str
    parent: str
    tokens: int
    bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """Where it lies in the bundle."""
        return f"{SEGMENTS}/{self.key}{SUFFIX}"


def encode_manifest(segments: Sequence[BundledSegment]) -> bytes:
    """The content of `bundle.json`, one segment a line.

    Raises:
        InputError: there are more segments than a reader takes.
    """
    if len(segments) > MAX_SEGMENTS:
        raise InputError(f"a bundle holds at most {MAX_SEGMENTS:,} segments, got {len(segments):,}; make several")
    listed = ",\n".join(json.dumps(asdict(segment) | {"file": segment.file}) for segment in segments)
    return f'{{"format": "{_NAME}", "version": {BUNDLE_FORMAT}, "segments": [\n{listed}\n]}}\n'.encode()


def read_manifest(folder: str | os.PathLike[str]) -> list[BundledSegment]:
    """The list of a bundle, checked.

    Raises:
        StoreFormatError: `folder` is not a bundle, or a newer one.
        BundleError: the list makes no sense, or is longer than 32 MiB or 100,000 segments.
    """
    path = Path(folder) / MANIFEST
    try:
        require_ordinary(path)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        # (Not more than the bound, however long the file has grown meanwhile.)
        with open(os.open(path, flags), "rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1) or b""
    except (FileNotFoundError, NotADirectoryError):
        raise StoreFormatError(f"{folder} is not a bundle: it has no {MANIFEST}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, name: str) -> list[BundledSegment]:
    """The list in the bytes of a `bundle.json`, checked; `name` is that of the file, for messages.

    Raises:
        StoreFormatError: it is of a newer format.
        BundleError: see `read_manifest`.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{name}: more than {MAX_MANIFEST_BYTES:,} bytes")
    for sign, most in _MAX_SIGNS:
        if text.count(sign) > most:
            raise BundleError(f"{name}: lists more than {MAX_SEGMENTS:,} segments, or is not a list of segments")
    try:
        content = json.loads(text.decode(), object_pairs_hook=once_each, parse_int=_plain_int)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _NAME:
        raise BundleError(f"{name}: does not say that it lists an {_NAME}")
    version, listed = content.get("version"), content.get("segments")
    if type(version) is int and version > BUNDLE_FORMAT:
        raise StoreFormatError(f"{name}: bundle format {version}; this library reads up to {BUNDLE_FORMAT}. Update it.")
    if type(version) is not int or version < 1 or not isinstance(listed, list) or not listed:
        raise BundleError(f"{name}: format version or list of segments is missing")
    if len(listed) > MAX_SEGMENTS:
        raise BundleError(f"{name}: lists {len(listed):,} segments; a bundle holds at most {MAX_SEGMENTS:,}")
    segments = [_listed_segment(name, entry) for entry in listed]
    if len({segment.key for segment in segments}) != len(segments):
        raise BundleError(f"{name}: lists a segment twice")
    return segments


def _plain_int(digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        raise ValueError(f"{quoted(digits)} is no count or size")
    return int(digits)


def _listed_segment(name: str, entry: object) -> BundledSegment:
    fields = entry if isinstance(entry, dict) else {}
    try:
        segment = BundledSegment(
            key=checked_key(fields.get("key")),
            parent=checked_key(fields.get("parent")) if fields.get("parent") != "" else "",
            tokens=fields.get("tokens", 0),
            bytes=fields.get("bytes", 0),
            sha256=fields.get("sha256", ""),
        )
    except InputError as error:
        raise BundleError(f"{name}: {error}") from None
    counts_are_sane = all(type(number) is int and 0 < number < 2**53 for number in (segment.tokens, segment.bytes))
    sha256_is_sane = isinstance(segment.sha256, str) and _SHA256.fullmatch(segment.sha256)
    if not counts_are_sane or not sha256_is_sane or fields.get("file") != segment.file:
        raise BundleError(f"{name}: the entry of segment {segment.key} makes no sense")
    return segment


def require_ordinary(path: Path, *, folder: bool = False) -> None:
    """Refuse links, pipes and devices: a bundle is made of ordinary files."""
    mode = os.lstat(path).st_mode
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise BundleError(f"{path} is not an ordinary {'folder' if folder else 'file'}")
