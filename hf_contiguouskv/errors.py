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

    Messages quote what files and strangers say: whatever is not printable is escaped in them, and each part has at most
    2,000 characters.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(in_messages(part) for part in parts))


class ConfigError(ContiguousKVError, ValueError):
    """A field of `ContiguousKVConfig` (or of another argument) has a value that makes no sense."""


class InputError(ContiguousKVError, ValueError):
    """Token ids, masks or lengths that cannot be served: wrong dtype, wrong shape, not the prefix."""


class UnsupportedModelError(ContiguousKVError, ValueError):
    """The model keeps or uses its KV cache in a way that this library cannot serve correctly."""


class AttentionNotActiveError(ContiguousKVError, RuntimeError):
    """The model runs without our attention function although a cache with a prefix is in use."""


class StoreError(ContiguousKVError):
    """Base of all errors about a store folder and the files in it."""


class StoreFormatError(StoreError):
    """The folder is not a store, or was written by a newer format of this library."""


class SegmentKeyError(StoreError):
    """A segment was not put into the store by those who have its key; or it has one, and the store was opened without.

    It is not used, and left alone.
    """


class UntrustedOwnerError(StoreError):
    """A folder or file that another user of this machine owns, or may write; see `trust_owner`."""


class StoreClosedError(StoreError):
    """The store, its reader or a segment writer was closed before."""


class SegmentMissingError(StoreError):
    """There is no segment under this key (any more)."""


class _SegmentError(StoreError):
    """An error about the bytes of one segment.

    Attributes:
        segment: the open segment, where the error showed while it was read; else `None`.
        identity: of the blob that could not be opened, as it was before that was tried; `None` is unknown.
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
        damage: whether it will fail again (a bad block, no ordinary file); otherwise the segment may be sound, and only
            this process could not read it now (out of descriptors or memory, no permission).
    """

    def __init__(self, message: str, segment: object = None, code: int | None = None) -> None:
        super().__init__(message, segment)
        self.damage = code in _LASTING


class StoreFullError(StoreError, OSError):
    """A segment does not fit in `max_disk_bytes`, or the disk is full."""


class PrefixInUseError(StoreError):
    """A stored prefix cannot be deleted, because longer prefixes continue it."""
