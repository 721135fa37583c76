"""Commands that only look: `ls` and `info`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..store import PrefixInfo, PrefixStore
from ..store.chains import chains, children, parents_of_all
from ..wording import shown
from .app import (
    Address,
    AsJson,
    CacheFolder,
    OptionalKey,
    StorePath,
    app,
    find_entry,
    find_shared,
    folder_of,
    open_store,
)
from .messages import messages_instead_of_tracebacks
from .output import (
    columns,
    counted,
    facts,
    human_age,
    human_bytes,
    human_seconds,
    human_time,
    print_json,
    say,
    show,
    styled,
)

_SHORT = 12
_LARGEST = 5
_MAX_INDENT = 5
_SHOWN_OF_CHAIN = 20


@app.command()
@messages_instead_of_tracebacks
def ls(store: StorePath, cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """List the stored prefixes, oldest first; what continues a prefix stands below it.

    Of a shared store: those of all machines.
    """
    if isinstance(store, Address):
        _ls_shared(store, cache, as_json)
        return
    with open_store(store, cache, create=False) as opened:
        entries, parents = opened.entries(), parents_of_all(opened)
    if as_json:
        print_json([asdict(entry) | {"continues": parents.get(entry.key, "")} for entry in entries])
        return
    if entries:
        now = time.time()
        table = columns("key", "tokens", "size", "model", "uses", "used", "", right=("tokens", "size", "uses"))
        for indent, entry in _as_tree(entries, parents):
            notes = ["pinned"] * entry.pinned + ["parent lost"] * (bool(entry.parent) and entry.key not in parents)
            table.add_row(
                styled((indent, "dim"), entry.key[:_SHORT]),
                f"{entry.tokens:,}",
                human_bytes(entry.bytes),
                entry.fingerprint[:8],
                f"{entry.uses:,}",
                human_age(entry.last_used, now),
                styled((", ".join(notes), "yellow")),
            )
        show(table)
    total = sum(entry.bytes for entry in entries)
    say(f"{counted(len(entries), 'stored prefix')}, {human_bytes(total)}")


def _ls_shared(address: Address, cache: Path | None, as_json: bool) -> None:
    with open_store(address, cache, create=False) as opened:
        entries, name = opened.shared_upkeep.entries(), opened.url
    if as_json:
        print_json([entry.as_dict() for entry in entries])
        return
    if entries:
        now = time.time()
        table = columns("key", "tokens", "size", "model", "stored", "used", right=("tokens", "size"))
        for entry in entries:
            table.add_row(
                entry.key[:_SHORT],
                f"{entry.tokens:,}",
                human_bytes(entry.bytes),
                entry.fingerprint[:8],
                human_age(entry.created, now),
                human_age(entry.last_used, now),
            )
        show(table)
    total = human_bytes(sum(entry.bytes for entry in entries))
    say(f"{name}: {counted(len(entries), 'stored prefix')}, {total}")


def _as_tree(entries: list[PrefixInfo], parents: dict[str, str]) -> Iterator[tuple[str, PrefixInfo]]:
    """Entries in the order of a tree, each with the lines that lead to it."""
    children: dict[str, list[PrefixInfo]] = {}
    for entry in entries:
        children.setdefault(parents.get(entry.key, ""), []).append(entry)
    # A conversation may be hundreds of segments deep: no recursion, and the lines do not grow without end.
    waiting = [(0, "", "", entry) for entry in reversed(children.get("", []))]
    while waiting:
        depth, lines, branch, entry = waiting.pop()
        yield lines + branch, entry
        if depth:
            lines += "  " if branch.startswith("└") else "│ "
        if depth >= _MAX_INDENT:
            lines = f"{depth + 2:>{2 * _MAX_INDENT - 1}} "  # Which one of its prefix it is, not lines without end.
        below = children.get(entry.key, [])
        waiting += [
            (depth + 1, lines, "└ " if number == 0 else "├ ", child) for number, child in enumerate(reversed(below))
        ]


@app.command()
@messages_instead_of_tracebacks
def info(store: StorePath, key: OptionalKey = None, cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """Describe a store, or one stored prefix. Of a shared store: what this machine keeps, and how much there is."""
    if isinstance(store, Address):
        _info_shared(store, cache, key, as_json)
        return
    with open_store(store, cache, create=False) as opened:
        content = _about_store(opened) if key is None else _about_prefix(opened, find_entry(opened, key))
    if as_json:
        print_json(content)
    elif key is None:
        _show_store(content)
    else:
        _show_prefix(content)


def _info_shared(address: Address, cache: Path | None, key: str | None, as_json: bool) -> None:
    is_kept = folder_of(address, cache).exists()
    with open_store(address, cache, create=False) as opened:
        upkeep = opened.shared_upkeep
        if key is not None:
            (entry,) = find_shared(upkeep, [key])
            content: dict[str, Any] = {"url": opened.url} | entry.as_dict()
        else:
            entries = upkeep.entries()
            content = {
                "url": opened.url,
                "segments": len(entries),
                "bytes": sum(entry.bytes for entry in entries),
                "models": sorted({entry.fingerprint for entry in entries}),
                "here": _about_store(opened) if is_kept else None,
            }
    if as_json:
        print_json(content)
    elif key is not None:
        when = ("created", "last_used")
        show(facts({name: human_time(value) if name in when else str(value) for name, value in content.items()}))
    else:
        say(f"{content['url']}: {counted(content['segments'], 'segment')}, {human_bytes(content['bytes'])}")
        say("on this machine:" if is_kept else f"on this machine: nothing (no folder {folder_of(address, cache)})")
        if is_kept:
            _show_store(content["here"])


def _about_store(store: PrefixStore) -> dict[str, Any]:
    entries, stats = store.entries(), store.stats
    models: dict[str, int] = {}
    for entry in entries:
        models[entry.fingerprint] = models.get(entry.fingerprint, 0) + entry.bytes
    space = shutil.disk_usage(store.path)
    # (A tenant is not shown what others have there.)
    quarantined = store.backend.quarantined() if stats.quarantined_bytes else ()
    largest = sorted(entries, key=lambda entry: entry.bytes, reverse=True)[:_LARGEST]
    return {
        "path": str(store.path),
        "segments": stats.segments,
        "prefix_tokens": stats.prefix_tokens,
        "segment_bytes": stats.segment_bytes,
        "disk_bytes": stats.disk_bytes,
        "free_bytes": space.free,
        "pinned": sum(entry.pinned for entry in entries),
        "last_used": max((entry.last_used for entry in entries), default=None),
        "direct_reads": stats.direct_reads,
        "models": [{"fingerprint": name, "bytes": nbytes} for name, nbytes in models.items()],
        "quarantined_bytes": stats.quarantined_bytes,
        "quarantine": [{"key": blob.key, "bytes": blob.stored_bytes} for blob in quarantined],
        "largest": [{"key": entry.key, "bytes": entry.bytes, "tokens": entry.tokens} for entry in largest],
    }


def _show_store(content: dict[str, Any]) -> None:
    quarantine, models = content["quarantine"], content["models"]
    others = content["disk_bytes"] - content["segment_bytes"] - content["quarantined_bytes"]
    pairs = {
        "store": content["path"],
        "segments": f"{content['segments']:,}, {content['pinned']:,} of them pinned",
        "tokens": f"{content['prefix_tokens']:,}",
        "size": f"{human_bytes(content['segment_bytes'])}, and {human_bytes(others)} for index and folders",
        "free": human_bytes(content["free_bytes"]),
        "last used": human_time(content["last_used"]) if content["last_used"] else "never",
        "reads": "past the page cache (O_DIRECT)" if content["direct_reads"] else "through the page cache",
        "quarantine": f"{counted(len(quarantine), 'damaged segment')}, {human_bytes(content['quarantined_bytes'])}; "
        "`gc` deletes them"
        if quarantine
        else "empty",
    }
    show(facts(pairs))
    for blob in quarantine:
        say(f"  {blob['key']}  {human_bytes(blob['bytes'])}")
    total = max(1, content["segment_bytes"])
    if models:
        table = columns("models", "size", "share", "", right=("size", "share"))
        for model in models:
            table.add_row(shown(model["fingerprint"]), human_bytes(model["bytes"]), f"{model['bytes'] / total:.0%}")
        show("")
        show(table)
    if content["largest"]:
        table = columns("largest segments", "size", "share", "tokens", "", right=("size", "share", "tokens"))
        for row in content["largest"]:
            share = f"{row['bytes'] / total:.0%}"
            table.add_row(row["key"], human_bytes(row["bytes"]), share, f"{row['tokens']:,}")
        show("")
        show(table)


def _about_prefix(store: PrefixStore, entry: PrefixInfo) -> dict[str, Any]:
    content = asdict(entry) | {"continued_by": children(store, entry.key)}
    try:
        chain = chains(store, [entry.key])[entry.key]
    except StoreError as error:
        return content | {"chain": None, "chain_problem": str(error), "prefix_bytes": None, "prefix_compute_s": None}
    known = all(row.compute_ms for row in chain)
    return content | {
        "chain": [
            {
                "key": row.key,
                "first_token": row.first_chunk * row.chunk_size,
                "tokens": row.num_tokens,
                "bytes": row.nbytes,
                "compute_s": row.compute_ms / 1000,
            }
            for row in chain
        ],
        "chain_problem": None,
        "prefix_bytes": sum(row.nbytes for row in chain),
        "prefix_compute_s": sum(row.compute_ms for row in chain) / 1000 if known else None,
    }


def _show_prefix(content: dict[str, Any]) -> None:
    chain = content["chain"] or []
    cost = human_seconds(content["compute_s"]) if content["compute_s"] else "unknown"
    if content["prefix_compute_s"] and len(chain) > 1:
        cost += f"; with all that it continues {human_seconds(content['prefix_compute_s'])}"
    pairs = {
        "key": content["key"] + (" (pinned)" if content["pinned"] else ""),
        "tokens": f"{content['tokens']:,}" + (f", {chain[-1]['tokens']:,} of them here" if len(chain) > 1 else ""),
        "size": f"{human_bytes(content['bytes'])} ({content['bytes']:,} bytes), {counted(content['chunks'], 'chunk')}",
        "model": f"{shown(content['fingerprint'])}, {counted(content['layers'], 'layer')}, {content['dtype']}",
        "to recompute": cost,
        "stored": human_time(content["created"]),
        "last used": f"{human_time(content['last_used'])}, {counted(content['uses'], 'use')}",
        "continued by": ", ".join(key[:_SHORT] for key in content["continued_by"]) or "nothing",
    }
    if content["chain_problem"]:
        pairs["problem"] = content["chain_problem"]
    show(facts(pairs))
    if len(chain) > 1:
        table = columns("chain", "tokens", "size", "to recompute", right=("size", "to recompute"))
        for number, link in enumerate(chain):
            if _SHOWN_OF_CHAIN <= number < len(chain) - _SHOWN_OF_CHAIN:
                if number == _SHOWN_OF_CHAIN:
                    table.add_row(f"({len(chain) - 2 * _SHOWN_OF_CHAIN:,} more)", "", "", "")
                continue
            table.add_row(
                link["key"],
                f"{link['first_token']:,} to {link['first_token'] + link['tokens']:,}",
                human_bytes(link["bytes"]),
                human_seconds(link["compute_s"]) if link["compute_s"] else "unknown",
            )
        show("")
        show(table)
