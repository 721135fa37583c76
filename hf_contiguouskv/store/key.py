"""The key of a store, and the checksums that only its holders can make.

Without a key, checksums are XXH3: they tell damage from soundness, and anybody can make them. With a key they are keyed
BLAKE2b, of 8 bytes each, with a key of their own for every segment; and the header has a code of 32 bytes (`mac`) over
itself and all checksums. Those who do not have the key can delete segments, but not make one that is used.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import xxhash

from ..errors import ConfigError, StoreError

MAC_BYTES = 32
NO_MAC = "0" * (2 * MAC_BYTES)
_SHORTEST = 16
_LONGEST = 4096

Octets = bytes | bytearray | memoryview
# What a caller may name a key by: its bytes, the file that holds it, "file:PATH" or "env:NAME".
KeySource = bytes | str | os.PathLike[str]


class Digest(Protocol):
    """A checksum that is fed piece by piece."""

    def update(self, octets: Octets, /) -> None:
        """Add bytes."""
        ...

    def intdigest(self) -> int:
        """The checksum of what was added, 0 to 2**64 - 1."""
        ...


class Checksums:
    """How the checksums of one segment are made.

    Args:
        key: of the segment; `None`: XXH3, which needs none.

    Attributes:
        of: the checksum of some bytes, 0 to 2**64 - 1.
    """

    of: Callable[[Octets], int]

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        if key is None:
            self.of = xxhash.xxh3_64_intdigest
        else:
            self.of = lambda octets: int.from_bytes(blake2b(octets, digest_size=8, key=key).digest(), "little")

    def begin(self) -> Digest:
        """A checksum to be fed."""
        return xxhash.xxh3_64() if self._key is None else _KeyedDigest(self._key)


class _KeyedDigest:
    def __init__(self, key: bytes) -> None:
        self._digest = blake2b(digest_size=8, key=key)

    def update(self, octets: Octets, /) -> None:
        self._digest.update(octets)

    def intdigest(self) -> int:
        return int.from_bytes(self._digest.digest(), "little")


class StoreKey:
    """A secret that those share who may put segments into a store.

    Args:
        secret: 16 to 4096 bytes that nobody can guess, such as `secrets.token_bytes(32)`.

    Raises:
        ConfigError: it is too short or too long.
    """

    def __init__(self, secret: bytes) -> None:
        if not _SHORTEST <= len(secret) <= _LONGEST:
            raise ConfigError(f"a key has {_SHORTEST} to {_LONGEST} bytes, got {len(secret)}")
        # Of fixed length, as BLAKE2b takes it.
        self._secret = blake2b(secret, digest_size=32, person=b"hf_ckv key").digest()

    @classmethod
    def of(cls, source: KeySource | None) -> StoreKey | None:
        """The key that `source` names.

        Args:
            source: the secret itself (bytes), a path or `"file:PATH"` of a file that holds it, `"env:NAME"` of an
                environment variable that does; `None`: no key. White space around what a file or variable holds is
                left out.

        Raises:
            ConfigError: something else, or too short; or a file that others may write, or (if it is not root's) read.
            StoreError: the file cannot be read.
        """
        if source is None:
            return None
        if isinstance(source, bytes):
            return cls(source)
        if isinstance(source, os.PathLike):
            return cls(_from_file(Path(source)))
        if isinstance(source, str):
            kind, _, name = source.partition(":")
            if kind == "env" and name:
                text = os.environb.get(os.fsencode(name))
                if text is None:
                    raise ConfigError(f"key: there is no environment variable {name!r}")
                return cls(text.strip())
            if kind == "file" and name:
                return cls(_from_file(Path(name)))
        # (Not the value: the secret itself may have been passed as text.)
        raise ConfigError(
            f"key must be bytes, a path, 'file:PATH' or 'env:NAME', got a {type(source).__name__} that is none of these"
        )

    @property
    def public_name(self) -> str:
        """16 hexadecimal digits that tell this key from others and do not help to find it."""
        return blake2b(b"", key=self._secret, digest_size=8, person=b"hf_ckv name").hexdigest()

    def checksums(self, name: str) -> Checksums:
        """Those of the segment with this name."""
        return Checksums(blake2b(name.encode(), digest_size=32, key=self._secret, person=b"hf_ckv checks").digest())

    def mac(self, header: bytes, checksums: Octets) -> str:
        """The code of a segment, 64 hexadecimal digits.

        Args:
            header: its JSON and padding, with zeros for `mac` and `checksum`.
            checksums: the bytes of its tensors of checksums, in file order, padding between them left out.
        """
        code = blake2b(digest_size=MAC_BYTES, key=self._secret, person=b"hf_ckv mac")
        code.update(len(header).to_bytes(8, "little"))
        code.update(header)
        code.update(checksums)
        return code.hexdigest()

    def __repr__(self) -> str:
        return "StoreKey(...)"


def same_mac(left: str, right: str) -> bool:
    """Whether two codes are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(left, right)


def _from_file(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            # What root owns, and nobody else may write, is as the administrator wants it: secrets that are mounted into
            # containers are so, and cannot be changed there.
            shared = 0o022 if status.st_uid == 0 else 0o077
            if status.st_uid not in (os.geteuid(), 0) or status.st_mode & shared:
                raise ConfigError(
                    f"{path}: others may read or change this key. Make it yours alone (chmod 600), or name an "
                    "environment variable (env:NAME)"
                )
            secret = file.read(_LONGEST + 1)
    except OSError as error:
        raise StoreError(f"{path}: the key cannot be read: {error.strerror or error}") from error
    return secret.strip()
