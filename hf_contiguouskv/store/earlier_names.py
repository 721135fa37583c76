"""Names of chunks in formats 1 and 2, of earlier releases.

    hash[-1] = H("hf_contiguouskv/1", fingerprint, chunk_size, salt)
    hash[i]  = H(hash[i-1] + token ids of chunk i)

The payload is that of the present format. But a name does not tell whether it stands for a root or for a chunk.
"""

from __future__ import annotations

from hashlib import blake2b

from .hashing import HASH_BYTES, TokenIds


def earlier_root(fingerprint: str, chunk_size: int, salt: bytes) -> bytes:
    """The hash before the first chunk."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (b"hf_contiguouskv/1", fingerprint.encode(), str(chunk_size).encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def earlier_name(before: bytes, octets: bytes) -> bytes:
    """The name of a chunk.

    Args:
        before: of the chunk before it, or the root.
        octets: its token ids, int64.
    """
    return blake2b(before + octets, digest_size=HASH_BYTES).digest()


def earlier_names(before: bytes, ids: TokenIds, chunk_size: int) -> list[bytes]:
    """The names of the chunks of `ids` (int64 `[n]`), a partial last one included, after `before`."""
    names = []
    for start in range(0, len(ids), chunk_size):
        before = earlier_name(before, ids[start : start + chunk_size].tobytes())
        names.append(before)
    return names
