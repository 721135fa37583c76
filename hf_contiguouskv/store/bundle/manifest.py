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
from ..backend import checked_key
from ..format import SegmentHeader
from ..local_disk import SUFFIX

BUNDLE_FORMAT = 1
MANIFEST = "bundle.json"
SEGMENTS = "segments"
_NAME = "hf_contiguouskv bundle"
_MAX_MANIFEST = 64 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def prefix_tokens(header: SegmentHeader) -> int:
    """Length of the whole prefix that ends with a segment."""
    return header.first_chunk * header.geometry.chunk_size + header.num_tokens


def encode_manifest(segments: Sequence[BundledSegment]) -> bytes:
    """The content of `bundle.json`."""
    listed = [asdict(segment) | {"file": segment.file} for segment in segments]
    return json.dumps({"format": _NAME, "version": BUNDLE_FORMAT, "segments": listed}, indent=2).encode() + b"\n"


def read_manifest(folder: str | os.PathLike[str]) -> list[BundledSegment]:
    """The list of a bundle, checked.

    Raises:
        StoreFormatError: `folder` is not a bundle, or a newer one.
        BundleError: the list makes no sense.
    """
    path = Path(folder) / MANIFEST
    try:
        require_ordinary(path)
        # (Not more than the bound, however long the file has grown meanwhile.)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            text = file.read(_MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreFormatError(f"{folder} is not a bundle: it has no {MANIFEST}") from None
    if len(text) > _MAX_MANIFEST:
        raise BundleError(f"{path}: more than {_MAX_MANIFEST} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _NAME:
        raise BundleError(f"{path}: does not say that it lists an {_NAME}")
    version, listed = content.get("version"), content.get("segments")
    if type(version) is int and version > BUNDLE_FORMAT:
        raise StoreFormatError(f"{path}: bundle format {version}; this library reads up to {BUNDLE_FORMAT}. Update it.")
    if type(version) is not int or version < 1 or not isinstance(listed, list) or not listed:
        raise BundleError(f"{path}: format version or list of segments is missing")
    segments = [_listed_segment(path, entry) for entry in listed]
    if len({segment.key for segment in segments}) != len(segments):
        raise BundleError(f"{path}: lists a segment twice")
    return segments


def _listed_segment(path: Path, entry: object) -> BundledSegment:
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
        raise BundleError(f"{path}: {error}") from None
    counts_are_sane = all(type(number) is int and 0 < number < 2**53 for number in (segment.tokens, segment.bytes))
    sha256_is_sane = isinstance(segment.sha256, str) and _SHA256.fullmatch(segment.sha256)
    if not counts_are_sane or not sha256_is_sane or fields.get("file") != segment.file:
        raise BundleError(f"{path}: the entry of segment {segment.key} makes no sense")
    return segment


def require_ordinary(path: Path, *, folder: bool = False) -> None:
    """Refuse links, pipes and devices: a bundle is made of ordinary files."""
    mode = os.lstat(path).st_mode
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise BundleError(f"{path} is not an ordinary {'folder' if folder else 'file'}")
