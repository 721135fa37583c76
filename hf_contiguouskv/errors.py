"""The exceptions of this library.

Each message names the file or field, what was found, what was expected, and what to do about it.
"""

import errno
from collections.abc import Hashable

from .wording import in_messages

_LASTING = tuple(
    getattr(errno, name)
    for name in ("EIO", "EILSEQ", "EBADMSG", "EUCLEAN", "EINVAL", "EISDIR", "ELOOP", "ENODATA")
    if hasattr(errno, name)
)


class ContiguousKVError(Exception):
    """Base of every error that this library raises on purpose.

    Messages may quote text from files and other users. Characters that are not printable are escaped, and each part is
    cut at 2,000 characters.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(in_messages(part) for part in parts))


class ConfigError(ContiguousKVError, ValueError):
    """An argument, or a field of `ContiguousKVConfig`, is out of its range, or two of them cannot work together."""


class InputError(ContiguousKVError, ValueError):
    """Token ids, masks or lengths cannot be served: wrong dtype, wrong shape, or not the prefix."""


class UnsupportedModelError(ContiguousKVError, ValueError):
    """The model keeps or uses its KV cache in a way that this library cannot serve correctly."""


class AttentionNotActiveError(ContiguousKVError, RuntimeError):
    """The model ran without the library's attention function although a cache with a prefix is in use."""


class StoreError(ContiguousKVError):
    """Base of all errors about a store folder and the files in it."""


class StoreFormatError(StoreError):
    """The folder is not a store or bundle, or is of a format that this release does not read."""


class EarlierFormatError(StoreFormatError):
    """A segment is of format 1 or 2, of an earlier release. It is used once it was brought to the present format."""


class SegmentKeyError(StoreError):
    """A segment was not stored with the key of the store, or has a key although the store was opened without one.

    The segment is neither used nor changed.
    """


class UntrustedOwnerError(StoreError):
    """Another user of this machine owns a folder or file of the store, or may write it (see `trust_owner`)."""


class StoreClosedError(StoreError):
    """The store, its reader or a segment writer was closed before."""


class SegmentMissingError(StoreError):
    """No segment has this key, or it was deleted meanwhile."""


class _SegmentError(StoreError):
    """An error about the bytes of one segment.

    Attributes:
        segment: the open segment if a read failed; `None` if it could not be opened.
        identity: identity of the blob before the attempt to open it; `None` if unknown.
    """

    def __init__(self, message: str, segment: object = None) -> None:
        super().__init__(message)
        self.segment = segment
        self.identity: Hashable = None


class SegmentCorruptError(_SegmentError):
    """A segment is truncated, foreign, or its bytes do not match their checksum."""


class SegmentReadError(_SegmentError):
    """The storage failed to deliver the bytes of a segment.

    Attributes:
        damage: true if the read will fail again (a bad block, not an ordinary file); false if the segment may be sound
            and this process could not read it now (out of descriptors or memory, no permission).
    """

    def __init__(self, message: str, segment: object = None, code: int | None = None) -> None:
        super().__init__(message, segment)
        self.damage = code in _LASTING


class StoreFullError(StoreError, OSError):
    """A segment does not fit in `max_disk_bytes`, or the disk is full."""


class PrefixInUseError(StoreError):
    """A stored prefix cannot be deleted, because longer prefixes continue it."""
