"""Names of chunks: a chain of BLAKE2b hashes, so that equal beginnings have equal names and share storage.

    root    = Hroot("hf_contiguouskv/3", fingerprint, chunk_size, salt)
    hash[0] = Hfirst(root      + token ids of chunk 0)
    hash[i] = Hnext (hash[i-1] + token ids of chunk i)

A hash therefore stands for the whole prefix up to the end of its chunk, for one model, chunk size and tenant. Token
ids are hashed as little-endian int64. A partial last chunk is hashed the same way; it has fewer bytes, so its name
differs from that of every whole chunk.

The three functions are one with different personalisation: a segment that calls the name of another prefix's chunk its
root cannot have the names of the chunks that follow there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ..errors import InputError

HASH_BYTES = 16
# (What follows has none: of thousands of small hashes, it would take half of the time.)
_ROOT, _FIRST = b"hf_ckv root", b"hf_ckv first"
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
    digest = blake2b(digest_size=HASH_BYTES, person=_ROOT)
    for part in (b"hf_contiguouskv/3", fingerprint.encode(), str(chunk_size).encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def chunk_hash(before: bytes, token_ids_bytes: bytes | memoryview, *, first: bool) -> bytes:
    """The 16-byte hash of a chunk.

    Args:
        before: hash of the chunk before it; for the first chunk of a prefix, the root.
        token_ids_bytes: its ids as little-endian int64.
        first: whether it is the first chunk of a prefix.
    """
    digest = blake2b(before, digest_size=HASH_BYTES, person=_FIRST if first else b"")
    digest.update(token_ids_bytes)
    return digest.digest()


def chain_hashes(before: bytes, ids: TokenIds, chunk_size: int, *, first: bool) -> list[bytes]:
    """Hashes of the whole chunks of `ids` (int64 `[n]`): `n // chunk_size` of them; a partial tail has none here.

    `before` and `first`: as for `chunk_hash` of the first one.
    """
    octets = ids.tobytes()
    step = 8 * chunk_size
    hashes = []
    begin = 0
    if first and len(octets) >= step:
        before, begin = chunk_hash(before, octets[:step], first=True), step
        hashes.append(before)
    for start in range(begin, len(octets) - step + 1, step):
        before = blake2b(before + octets[start : start + step], digest_size=HASH_BYTES).digest()
        hashes.append(before)
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
        """The chain hashes of `ids` (int64 `[n]`), which begin a prefix, as `chain_hashes` makes them."""
        best: list[bytes] = []
        for known_root, known_size, known_ids, known_hashes in self._recent:
            if (known_root, known_size) == (root, chunk_size):
                shared = shared_beginning(known_ids, ids) // chunk_size
                if shared > len(best):
                    best = known_hashes[:shared]
        begin = len(best) * chunk_size
        found = best + chain_hashes(best[-1] if best else root, ids[begin:], chunk_size, first=not best)
        if len(found) > len(best):
            self._recent = ((root, chunk_size, ids.copy(), found), *self._recent[: self._prompts - 1])
        return found


def shared_beginning(left: TokenIds, right: TokenIds) -> int:
    """How many leading ids agree."""
    length = min(len(left), len(right))
    different = left[:length] != right[:length]
    return int(different.argmax()) if different.any() else length


def segment_hashes(before: bytes, ids: TokenIds, chunk_size: int, *, first: bool) -> list[bytes]:
    """Hashes of all chunks of `ids`, a partial last one included; `before` and `first` as for `chain_hashes`."""
    hashes = chain_hashes(before, ids, chunk_size, first=first)
    tail = ids[len(hashes) * chunk_size :]
    if tail.size:
        hashes.append(chunk_hash(hashes[-1] if hashes else before, tail.tobytes(), first=first and not hashes))
    return hashes
