"""What a model selected, request by request, and in which order requests come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_ARRAYS = ("selected", "mass", "identify_s", "compute_s")


@dataclass(frozen=True)
class Pool:
    """Recorded requests to one prefix, `n` of them, each with another question.

    Attributes:
        tokens: of the prefix.
        selected: whole chunks that attention used, ascending, uint16 `(n, layers, kept)`.
        mass: `A_j`, attention mass of every whole chunk, float16 `(n, layers, whole_chunks)`.
        identify_s: seconds that scoring took, float32 `(n, layers)`.
        compute_s: seconds from the moment that a layer has its chunks until the next layer asks for its own (the last
            layer: until the first token is known), float32 `(n, layers)`.
    """

    tokens: int
    selected: npt.NDArray[np.uint16]
    mass: npt.NDArray[np.float16]
    identify_s: npt.NDArray[np.float32]
    compute_s: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.selected)


@dataclass(frozen=True)
class Trace:
    """A pool of requests for every prefix.

    Attributes:
        pools: by prefix number.
        about: what was recorded: `geometry` (as `KVGeometry.to_metadata`), `budget`, `seed` and the like.
    """

    pools: list[Pool]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write everything into one compressed `.npz`."""
        arrays = {f"{name}.{number}": getattr(pool, name) for number, pool in enumerate(self.pools) for name in _ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = np.array([pool.tokens for pool in self.pools])
        partial = path.with_name(f"partial.{path.name}")
        np.savez_compressed(partial, tokens=tokens, about=np.array(json.dumps(self.about)), **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """The inverse of `save`."""
        with np.load(path, allow_pickle=False) as file:
            pools = [
                Pool(int(tokens), *(file[f"{name}.{number}"] for name in _ARRAYS))
                for number, tokens in enumerate(file["tokens"])
            ]
            return cls(pools, json.loads(str(file["about"])))


@dataclass(frozen=True)
class Workload:
    """How requests spread over prefixes.

    Popularity follows Zipf's law. With drift, a share of the prefixes swap their ranks every so many requests.

    Attributes:
        requests: how many.
        exponent: of Zipf's law.
        drift: share of the prefixes that swap ranks each time; 0: popularity stays as it is.
        drift_every: requests between two swaps.
        seed: of everything that is drawn.
    """

    requests: int = 2000
    exponent: float = 1.0
    drift: float = 0.3
    drift_every: int = 500
    seed: int = 0

    def prefixes(self, count: int) -> Ints:
        """The prefix number of every request, of `count` prefixes, int64 `(requests,)`."""
        chance = np.random.default_rng([self.seed, 0])
        weights = np.arange(1, count + 1, dtype=np.float64) ** -self.exponent
        ranks = chance.choice(count, size=self.requests, p=weights / weights.sum())
        by_rank = chance.permutation(count)
        found = np.empty(self.requests, dtype=np.int64)
        for start in range(0, self.requests, self.drift_every):
            part = slice(start, start + self.drift_every)
            found[part] = by_rank[ranks[part]]
            some = chance.choice(count, size=round(count * self.drift), replace=False)
            by_rank[some] = by_rank[chance.permutation(some)]
        return found

    def draw(self, trace: Trace) -> list[tuple[int, int]]:
        """Every request as `(prefix, number in its pool)`. A pool is used up before one of its requests comes again."""
        chance = np.random.default_rng([self.seed, 1])
        waiting: dict[int, list[int]] = {}
        drawn = []
        for prefix in self.prefixes(len(trace.pools)).tolist():
            left = waiting.setdefault(prefix, [])
            if not left:
                left += chance.permutation(len(trace.pools[prefix])).tolist()
            drawn.append((prefix, left.pop()))
        return drawn
