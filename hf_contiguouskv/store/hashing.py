"""Names of chunks: a chain of BLAKE2b hashes, so that equal beginnings have equal names and share storage.

    root    = H("hf_contiguouskv/1", fingerprint, chunk_size, salt)
    hash[0] = H(root    + token ids of chunk 0)
    hash[i] = H(hash[i-1] + token ids of chunk i)

A hash therefore stands for the whole prefix up to the end of its chunk, for one model, chunk size and tenant. Token
ids are hashed as little-endian int64. A partial last chunk is hashed the same way; it has fewer bytes, so its name
differs from that of every whole chunk.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ..errors import InputError

HASH_BYTES = 16
TokenIds = npt.NDArray[np.int64]


def as_token_ids(ids: object) -> TokenIds:
    """`ids` (anything numpy or torch, `[n]` or `[1, n]`, integers) as a contiguous int64 array `[n]`.

    Raises:
        InputError: not integers, or more than one row.
    """
    array = np.asarray(ids)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise InputError(f"token ids must have shape [n] or [1, n], got {list(array.shape)}")
    if array.dtype.kind not in "iu" and array.size:
        raise InputError(f"token ids must be integers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype="<i8")


def root_hash(fingerprint: str, chunk_size: int, salt: bytes = b"") -> bytes:
    """The hash before the first chunk: 16 bytes that differ by model, chunk size and salt."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (b"hf_contiguouskv/1", fingerprint.encode(), str(chunk_size).encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def chunk_hash(parent: bytes, token_ids_bytes: bytes | memoryview) -> bytes:
    """The 16-byte hash of a chunk after `parent`; `token_ids_bytes` are its ids as little-endian int64."""
    digest = blake2b(parent, digest_size=HASH_BYTES)
    digest.update(token_ids_bytes)
    return digest.digest()


def chain_hashes(root: bytes, ids: TokenIds, chunk_size: int) -> list[bytes]:
    """Hashes of the whole chunks of `ids` (int64 `[n]`): `n // chunk_size` of them; a partial tail has none here."""
    octets = ids.tobytes()
    step = 8 * chunk_size
    hashes = []
    parent = root
    for start in range(0, len(octets) - step + 1, step):
        parent = blake2b(parent + octets[start : start + step], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


class ChainMemory:
    """`chain_hashes`, but what begins like a prompt of late is hashed only from the first different chunk on.

    Requests on one document differ in their last tokens; hashing is most of what a look-up costs. Thread-safe.

    Args:
        prompts: how many are remembered.
    """

    def __init__(self, prompts: int = 8) -> None:
        # Replaced as a whole, never changed, so that threads need no lock.
        self._recent: tuple[tuple[bytes, int, TokenIds, list[bytes]], ...] = ()
        self._prompts = prompts

    def hashes(self, root: bytes, ids: TokenIds, chunk_size: int) -> list[bytes]:
        """See `chain_hashes`."""
        best: list[bytes] = []
        for known_root, known_size, known_ids, known_hashes in self._recent:
            if (known_root, known_size) == (root, chunk_size):
                shared = shared_beginning(known_ids, ids) // chunk_size
                if shared > len(best):
                    best = known_hashes[:shared]
        begin = len(best) * chunk_size
        found = best + chain_hashes(best[-1] if best else root, ids[begin:], chunk_size)
        if len(found) > len(best):
            self._recent = ((root, chunk_size, ids.copy(), found), *self._recent[: self._prompts - 1])
        return found


def shared_beginning(left: TokenIds, right: TokenIds) -> int:
    """How many leading ids agree."""
    length = min(len(left), len(right))
    different = left[:length] != right[:length]
    return int(different.argmax()) if different.any() else length


def segment_hashes(parent: bytes, ids: TokenIds, chunk_size: int) -> list[bytes]:
    """Hashes of all chunks of `ids`, which continue `parent`; a partial last chunk is included."""
    hashes = chain_hashes(parent, ids, chunk_size)
    tail = ids[len(hashes) * chunk_size :]
    if tail.size:
        hashes.append(chunk_hash(hashes[-1] if hashes else parent, tail.tobytes()))
    return hashes
