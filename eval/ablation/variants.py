"""The parameters that can be varied, and the variants that docs/research.md reports."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """One way to choose and store chunks of 16 tokens.

    Attributes:
        name: name in tables.
        share: share of the chunks that attention sees in each layer; 1.0 for all.
        rule: `"strongest"`: a chunk's best logit, softmax over chunks; `"mass"`: attention mass of its tokens.
        power: exponent on a chunk's share per head and query.
        voters: number of suffix queries that vote; `None` for all.
        recent: number of voters that are the last queries; the others are spread evenly over the earlier queries.
        period: number of layers that share the selection of the first of them.
        unit: `"chunk"`, or `"token"`: single tokens are scored and kept, as many as the chunks would have.
        singles: part of the share that is spent on small pieces, scored by themselves; chunks get the rest.
        piece_tokens: tokens of a small piece: 1, 2, 4 or 8, neighbours in one chunk.
        single_power: `power` of small pieces.
        single_voters: `voters` for small pieces.
        least_chunks: at least so many chunks are kept whole, whatever `singles` says.
        beside_chunks: pieces of one token are scored beside chunks, by their largest share, as the library does it;
            otherwise among themselves, as chunks are.
        nominees: small pieces come from the best chunks, this many times as many as the share keeps; 0: from all.
        per_head: whether each KV head keeps chunks of its own.
        hot: part of the share that is spent on tokens to which the prefix's own last tokens attend most, of each KV
            head; chunks get the rest.
        grouped: whether the query heads of a KV head vote as one, with their mean.
        summary: chunks are scored by a summary of their keys (see `summaries`) instead of by each key; empty: they are
            not.
        nominated: part of the chunks that a summary nominates for the scores of single keys; 1.0: the summary decides.
        index_bits: bits of the scored keys: 16 (exact), 8, 4, 3, 2 or 1.
        index_spread: whether scored keys of fewer than 8 bits are rounded to steps of a channel's standard deviation
            around its mean, over all tokens. Otherwise `key_group` tokens share a minimum and a scale.
        index_coarse: whether scored keys are the coarse index: 2 bits, four levels for each block of 64 tokens.
        key_bits, value_bits: bits of the keys and values that attention sees: 16 (exact), 8, 4 or 2.
        key_group: tokens that share a scale and a minimum, per channel (with 8 bits, all tokens share a scale).
        value_group: channels that share a scale and a minimum, per token.
        ends: number of chunks that are always kept at the beginning, and at the end.
    """

    name: str
    share: float = 0.1
    rule: str = "strongest"
    power: float = 2.0
    voters: int | None = 16
    recent: int = 4
    period: int = 1
    unit: str = "chunk"
    singles: float = 0.0
    piece_tokens: int = 1
    single_power: float = 2.0
    single_voters: int | None = 16
    least_chunks: int = 0
    beside_chunks: bool = False
    nominees: float = 0.0
    per_head: bool = False
    hot: float = 0.0
    grouped: bool = False
    summary: str = ""
    nominated: float = 1.0
    index_bits: int = 8
    index_spread: bool = False
    index_coarse: bool = False
    key_bits: int = 16
    value_bits: int = 16
    key_group: int = 64
    value_group: int = 64
    ends: int = 1


FULL = Variant("full", share=1.0)
PUBLISHED = Variant("published", rule="mass", power=1.0, voters=None, period=8, index_bits=16, ends=0)
EXACT = Variant("exact payload")
PACKED = Variant("packed", key_bits=8, value_bits=4)


def at(variant: Variant, share: float) -> Variant:
    """The same variant at another share of the chunks."""
    name = re.sub(r" \d+%$", "", variant.name)
    return replace(variant, name=f"{name} {share:.0%}", share=share)


def _of_packed(name: str, **changes: object) -> Variant:
    return replace(PACKED, name=name, **changes)  # type: ignore[arg-type]


# From the published method to our default, one idea after the other.
_STEPS: list[tuple[str, dict[str, object]]] = [
    ("published", {}),
    ("+ a selection in each layer", {"period": 1}),
    ("+ a chunk's strongest token", {"rule": "strongest"}),
    ("+ squares", {"power": 2.0}),
    ("+ 16 queries only, 12 of them spread", {"voters": 16, "recent": 4}),
    ("+ both ends kept", {"ends": 1}),
    ("+ 8-bit index", {"index_bits": 8}),
    ("+ packed (ours)", {"key_bits": 8, "value_bits": 4}),
]


def _steps(share: float) -> list[Variant]:
    found: list[Variant] = []
    changes: dict[str, object] = {}
    for name, change in _STEPS:
        changes |= change
        found.append(at(replace(PUBLISHED, name=name, **changes), share))  # type: ignore[arg-type]
    return found


# Each set answers one question of docs/research.md.
SETS: dict[str, list[Variant]] = {
    "published": [at(PUBLISHED, share) for share in (0.05, 0.10, 0.25)],
    "share": [at(kind, share) for kind in (EXACT, PACKED) for share in (0.05, 0.10, 0.20, 0.30, 0.40, 0.60, 1.0)],
    "precision": [
        replace(at(EXACT, 0.25), name=f"keys {key}, values {value} bits", key_bits=key, value_bits=value)
        for key, value in ((16, 16), (8, 16), (8, 8), (8, 4), (4, 4), (8, 2), (4, 2))
    ],
    "rule": [
        at(_of_packed(f"{rule}, power {power:g}", rule=rule, power=power), 0.25)
        for rule in ("strongest", "mass")
        for power in (1.0, 2.0, 4.0)
    ],
    "voters": [
        at(_of_packed(f"last {voters}" if voters else "all", voters=voters, recent=voters or 0), 0.25)
        for voters in (1, 2, 4, 8, 16, None)
    ],
    "spread": [
        at(_of_packed(f"{voters} voters, {recent} of them the last", voters=voters, recent=recent), 0.25)
        for voters, recent in ((8, 8), (8, 4), (8, 2), (8, 1), (8, 0), (12, 4), (16, 8), (16, 4), (16, 0))
    ],
    "spread share": [
        at(_of_packed(f"{voters} voters, {recent} of them the last", voters=voters, recent=recent), share)
        for voters, recent, shares in (
            (8, 8, (0.25, 0.40, 0.60)),
            (16, 4, (0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.50, 0.60)),
        )
        for share in shares
    ],
    # Both methods at the shares that docs/results compares, and with the earlier choice of voters.
    "beside": [
        *(at(PUBLISHED, share) for share in (0.05, 0.10, 0.25)),
        *(at(_of_packed("ours"), share) for share in (0.20, 0.25, 0.35, 0.60)),
        *(at(_of_packed("ours, the last 8 vote", voters=8, recent=8), share) for share in (0.25, 0.40, 0.60)),
    ],
    "period": [at(_of_packed(f"period {period}", period=period), 0.25) for period in (1, 2, 3, 4, 8)],
    "index": [
        *(at(_of_packed(f"index {bits} bits", index_bits=bits), 0.25) for bits in (16, 8, 4, 2)),
        *(
            at(_of_packed(f"index {bits} bits, by spread", index_bits=bits, index_spread=True), 0.25)
            for bits in (4, 3, 2, 1)
        ),
    ],
    "coarse": [
        at(variant, share)
        for share in (0.05, 0.10, 0.25)
        for variant in (
            _of_packed("index 8 bits"),
            _of_packed("index 2 bits, from end to end", index_bits=2),
            _of_packed("index 2 bits, coarse", index_coarse=True),
        )
    ],
    # Where the index has few bits, the keys of attention come with the chunk.
    "keys": [
        at(_of_packed(f"index {bits} bits, keys {key}", index_bits=bits, index_spread=bits < 8, key_bits=key), 0.25)
        for bits, key in ((8, 8), (2, 8), (2, 4), (4, 4))
    ],
    "singles": [
        *(at(_of_packed(f"{part:.0%} on single tokens", singles=part), 0.25) for part in (0.0, 0.25, 0.5, 0.75, 1.0)),
        at(_of_packed("half on single tokens, per KV head", singles=0.5, per_head=True), 0.25),
    ],
    # How much of a share goes to small pieces, how large they are, and from which chunks they come.
    "pieces": [
        at(_of_packed(name, **changes), share)
        for share in (0.05, 0.10, 0.25)
        for name, changes in (
            ("ours", {}),
            ("half on single tokens", {"singles": 0.5}),
            ("three quarters on single tokens", {"singles": 0.75}),
            ("three quarters on pairs", {"singles": 0.75, "piece_tokens": 2}),
            ("three quarters on fours", {"singles": 0.75, "piece_tokens": 4}),
            ("all on fours", {"singles": 1.0, "piece_tokens": 4}),
            ("three quarters on tokens of twice as many chunks", {"singles": 0.75, "nominees": 2.0}),
            ("three quarters on tokens of three times as many chunks", {"singles": 0.75, "nominees": 3.0}),
        )
    ],
    "whole chunks": [
        at(_of_packed(f"three quarters on single tokens, {least} whole chunks{more}", **changes), share)
        for share, leasts in ((0.05, (5, 6)), (0.10, (5, 6, 8, 10)), (0.25, (6, 8, 12)))
        for least in leasts
        for more, nominees in (("", 0.0), (", twice as many nominees", 2.0))
        for changes in ({"singles": 1.0 if share == 0.25 else 0.75, "least_chunks": least, "nominees": nominees},)
    ],
    # Beside more chunks, which take as long to choose and attend to.
    "more chunks": [at(_of_packed("chunks alone"), share) for share in (0.25, 0.40, 0.60)],
    "beside chunks": [
        at(
            _of_packed(
                f"three quarters on single tokens, {name}", singles=0.75, least_chunks=8, nominees=2.0, **changes
            ),
            share,
        )
        for share in (0.05, 0.10, 0.25)
        for name, changes in (("among themselves", {}), ("beside chunks", {"beside_chunks": True}))
    ],
    "piece rule": [
        at(_of_packed(name, singles=0.75, **changes), 0.10)
        for name, changes in (
            ("three quarters on single tokens, power 1", {"single_power": 1.0}),
            ("three quarters on single tokens, power 8", {"single_power": 8.0}),
            ("three quarters on single tokens, 8 voters", {"single_voters": 8}),
            ("three quarters on single tokens, coarse index", {"index_coarse": True}),
            ("three quarters on single tokens, per KV head", {"per_head": True}),
        )
    ],
    "summary": [
        at(_of_packed(name, **changes), 0.25)
        for name, changes in (
            ("every key", {}),
            ("bounds", {"summary": "bounds"}),
            ("mean", {"summary": "mean"}),
            ("expected", {"summary": "expected"}),
            ("expected, power 1", {"summary": "expected", "power": 1.0}),
            ("expected nominates 40%", {"summary": "expected", "nominated": 0.4}),
            ("bounds nominate 40%", {"summary": "bounds", "nominated": 0.4}),
        )
    ],
    "groups": [
        at(_of_packed(f"{voters} voters" + (", of groups" if grouped else ""), voters=voters, grouped=grouped), 0.25)
        for voters, grouped in ((16, False), (16, True), (8, False), (8, True), (None, True))
    ],
    "breadth": [
        at(_of_packed(name, **changes), 0.25)
        for name, changes in (
            ("ours", {}),
            ("power 1", {"power": 1.0}),
            ("mass, power 1", {"rule": "mass", "power": 1.0}),
            ("tokens", {"unit": "token"}),
            ("tokens, power 1", {"unit": "token", "power": 1.0}),
            ("per KV head", {"per_head": True}),
            ("tokens, per KV head", {"unit": "token", "per_head": True}),
            ("a quarter on hot tokens", {"hot": 0.25}),
            ("half on hot tokens", {"hot": 0.5}),
            ("all on hot tokens", {"hot": 1.0}),
        )
    ],
    "steps": _steps(0.25),
    "without": [
        at(_of_packed(name, **changes), 0.25)
        for name, changes in (
            ("ours", {}),
            ("without a selection in each layer", {"period": 8}),
            ("without a chunk's strongest token", {"rule": "mass"}),
            ("without squares", {"power": 1.0}),
            ("with all queries", {"voters": None}),
            ("with the last 16 queries", {"recent": 16}),
            ("without ends", {"ends": 0}),
            ("with an exact index", {"index_bits": 16}),
            ("with an exact payload", {"key_bits": 16, "value_bits": 16}),
        )
    ],
    "ends": [at(_of_packed(f"ends {ends}", ends=ends), 0.25) for ends in (0, 1, 2)],
}
