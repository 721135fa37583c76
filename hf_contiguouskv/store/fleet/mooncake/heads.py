"""How an object of a shared store lies in Mooncake Store: a head, and pieces where it is long.

    contiguouskv-1/FOLDER/o/NAME      the head: what the object is, its content if that is short, and a checksum
    contiguouskv-1/FOLDER/p/NONCE/3   a piece of 8 MiB (the last one shorter), under random names for each write

Pieces are written before the head, so nobody sees a part of an object. Since every write has names of its own, two
writers never mix, and one that dies in the middle keeps nobody from writing the same object: Mooncake Store refuses a
name for 30 s in which a write has begun and not ended, without saying so. A head is checked with what it says of
itself, because bytes may be wrong although they came with a success code; a piece is checked above this engine, as
bytes of a disk are.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import time
from dataclasses import dataclass

# Pieces fit memory that is in pieces itself, spread over machines, and are written in far less than a minute.
PIECE = 8 * 2**20
# Longer content lies in pieces.
MAX_INLINE = 64 * 1024
MAX_OBJECT = 2**40
_HEAD = struct.Struct("<4sB16sdQ?")
_MAGIC, _VERSION = b"ckvh", 1
_DIGEST = 16
MAX_HEAD = _HEAD.size + MAX_INLINE + _DIGEST


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """The head of an object.

    Attributes:
        nonce: 32 hexadecimal digits that tell this write of the object from others.
        nbytes: length of the object.
        created: when it was written, seconds since the epoch, by the clock of its writer.
        content: the object itself if it is short; `None` where it lies in pieces.
    """

    nonce: str
    nbytes: int
    created: float
    content: bytes | None

    @classmethod
    def new(cls, nbytes: int, content: bytes | None = None) -> ObjectHead:
        """The head of a new object."""
        return cls(secrets.token_hex(16), nbytes, time.time(), content)

    def pack(self, key: str) -> bytes:
        """The bytes of the head that lies under `key`."""
        inline = self.content is not None
        body = _HEAD.pack(_MAGIC, _VERSION, bytes.fromhex(self.nonce), self.created, self.nbytes, inline)
        body += self.content or b""
        return body + _digest(key, body)

    @classmethod
    def unpack(cls, key: str, octets: bytes) -> ObjectHead | None:
        """The head in `octets`, which lay under `key`; `None` where they are wrong."""
        body, digest = octets[:-_DIGEST], octets[-_DIGEST:]
        if len(body) < _HEAD.size or _digest(key, body) != digest:
            return None
        magic, version, nonce, created, nbytes, inline = _HEAD.unpack_from(body)
        content = body[_HEAD.size :]
        if (magic, version) != (_MAGIC, _VERSION) or nbytes > MAX_OBJECT:
            return None
        if len(content) != (nbytes if inline else 0):
            return None
        return cls(nonce.hex(), nbytes, created, content if inline else None)

    def piece_keys(self, root: str) -> list[str]:
        """The keys of its pieces, in order."""
        count = 0 if self.content is not None else -(-self.nbytes // PIECE)
        return [self.piece_key(root, number) for number in range(count)]

    def piece_key(self, root: str, number: int) -> str:
        """The key of one piece."""
        return f"{root}/p/{self.nonce}/{number}"


def head_key(root: str, name: str) -> str:
    """Where the head of an object lies."""
    return f"{root}/o/{name}"


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST, key=hashlib.blake2b(key.encode()).digest()).digest()
