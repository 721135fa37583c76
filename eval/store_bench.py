"""Measures the cost of the store: look-ups, opening, checksums, publishing, verifying, fingerprints, accounting.

    python -m eval.store_bench --json docs/results/store-bench.json

Every part reports its medians with quartiles, and whether it met its goal. Results are checked during measurement: a
look-up with a wrong result, a read of wrong bytes, or a file in the page cache that should have been cold is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from hf_contiguouskv import PrefixStore
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer, as_memoryview
from hf_contiguouskv.model import fingerprint
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.hashing import TokenIds, chain_hashes
from hf_contiguouskv.store.search import longest_match

from .store_fixtures import CHUNK, MODEL, TINY, Sizes, fill, large_model, no_fsync, some_ids, store_kv
from .timing import drop_page_cache, interleave, machine, median_spread, resident_pages


def timed(repeats: int, action: Callable[[], object]) -> list[float]:
    """Seconds of each of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def spread_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    spread = median_spread([1e3 * value for value in seconds]).as_dict()
    return {name: round(value, 4) for name, value in spread.items()}


# ---- a large store ----


def lookups(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The longest match of a prompt in an open store; its parts are timed separately."""
    suffix = some_ids(32, 0)
    whole, chained = (np.append(some_ids(sizes.tokens, seed), suffix) for seed in (1, 2))
    half = whole.copy()
    half[sizes.tokens // 2 + 5 :] += 1
    prompts = {
        "all of it, one segment": (whole, sizes.tokens),
        "all of it, eight segments": (chained, sizes.tokens),
        "half of it": (half, sizes.tokens // 2 + 5),
        "nothing": (some_ids(sizes.tokens + 32, 10**6), 0),
    }
    found: dict[str, Any] = {}
    with PrefixStore(folder) as store:
        root = store.inner.finder.root(MODEL, CHUNK)
        for name, (ids, expected) in prompts.items():
            hashes = chain_hashes(root, ids, CHUNK, first=True)
            query = partial(longest_match, root=root, hashes=hashes, ids=ids, chunk_size=CHUNK)
            actions: dict[str, Callable[[], object]] = {
                "first_look_up_ms": partial(_look_up, store, ids, expected),
                "hashing_ms": partial(chain_hashes, root, ids, CHUNK, first=True),
                "index_query_ms": partial(store.inner.index.read, query),
                "look_up_of_a_new_prompt_ms": partial(_look_up, store, ids, expected, new=True),
                "look_up_ms": partial(_look_up, store, ids, expected),
            }
            first = spread_ms(timed(1, actions.pop("first_look_up_ms")))["median"]
            seconds: dict[str, list[float]] = {part: [] for part in actions}
            for _, part in interleave(list(actions), 20 * sizes.rounds):
                seconds[part] += timed(1, actions[part])
            parts = {part: spread_ms(values) for part, values in seconds.items()}
            # The time without hashing: the query, and verifying its result against the segments' headers.
            pairs = zip(seconds["look_up_of_a_new_prompt_ms"], seconds["hashing_ms"], strict=True)
            match = [look_up - hashing for look_up, hashing in pairs]
            found[name] = parts | {"match_ms": spread_ms(match), "first_look_up_ms": first}
            found[name]["met"] = found[name]["match_ms"]["median"] < 1.0 and found[name]["look_up_ms"]["median"] < 1.0
    return {
        "prompt_tokens": sizes.tokens + 32,
        "prompts": found,
        "goal": "match, and look-up of a recent prompt, < 1 ms",
        "met": all(parts["met"] for parts in found.values()),
    }


def _look_up(store: PrefixStore, ids: TokenIds, expected: int, new: bool = False) -> None:
    """Look `ids` up; with `new`, forget the hashes of recent prompts first."""
    if new:
        store.inner.finder.forget_prompts()
    stored = store.inner.lookup(MODEL, ids, CHUNK)
    tokens = stored.tokens if stored else 0
    if tokens != expected:
        raise AssertionError(f"{tokens} tokens are found, {expected} are stored")


_OPEN_IN_PROCESS = """
import sys, time
from hf_contiguouskv import PrefixStore
start = time.perf_counter()
store = PrefixStore(sys.argv[1])
print(time.perf_counter() - start)
"""


def opening(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """`PrefixStore(path)`, including clean-up after crashes, in new processes and repeatedly in this one."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _OPEN_IN_PROCESS, str(folder)]
    fresh = [
        float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        for _ in range(min(3, sizes.rounds))
    ]
    here = []
    for _ in range(sizes.rounds):
        start = time.perf_counter()
        with PrefixStore(folder):
            here.append(time.perf_counter() - start)
    median = median_spread(fresh).median
    return {
        "new_process_ms": spread_ms(fresh),
        "this_process_ms": spread_ms(here),
        "goal": "opening < 100 ms",
        "met": median < 0.1,
    }


# ---- reading and writing ----


def checksums(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Cold reads of a prefix as in requests: with checksum verification, without it, and with a key, interleaved."""
    ids = some_ids(sizes.tokens, 1)
    g = KVGeometry(sizes.layers, kv_heads=3, head_dim=64, dtype=torch.bfloat16, chunk_size=CHUNK)
    keyed_folder = folder.with_name(f"{folder.name}-keyed")
    with PrefixStore(folder) as store, PrefixStore(keyed_folder, key=b"of this benchmark") as keyed:
        prefixes = []
        for one in (store, keyed):
            store_kv(one, ids, g)
            stored = one.inner.lookup(MODEL, ids, CHUNK)
            assert stored is not None
            prefixes.append(AttachedPrefix.of(stored, sizes.tokens))
        prefix, keyed_prefix = prefixes
        (path,), (keyed_path,) = folder.glob("segments/*/*"), keyed_folder.glob("segments/*/*")
        ways = {
            "verified": partial(_read, store, prefix, path=path, verify=True),
            "unverified": partial(_read, store, prefix, path=path, verify=False),
            "keyed": partial(_read, keyed, keyed_prefix, path=keyed_path, verify=True),
        }
        tenth = sorted(np.random.default_rng(0).permutation(prefix.chunks)[: -(-prefix.chunks // 10)].tolist())
        result: dict[str, Any] = {"direct": store.stats.direct_reads}
        for name, chunks in {"all chunks": list(range(prefix.chunks)), "10% of the chunks": tenth}.items():
            taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for number, way in interleave(list(ways), 2 * sizes.rounds + 1):
                wall_and_cpu = ways[way](chunks)
                if number:
                    taken[way].append(wall_and_cpu)
            (on, cpu_on), (off, cpu_off), (key, cpu_key) = (list(zip(*taken[way], strict=True)) for way in ways)
            # Also report processor time: on a busy machine with slow storage, only that stands out from noise.
            result[name] = {
                "bytes": g.num_layers * len(chunks) * g.extent_bytes,
                "verified_ms": spread_ms(on),
                "unverified_ms": spread_ms(off),
                "verified_cpu_ms": spread_ms(cpu_on),
                "unverified_cpu_ms": spread_ms(cpu_off),
                "keyed_ms": spread_ms(key),
                "keyed_cpu_ms": spread_ms(cpu_key),
                "slower_with_a_key": median_spread(a / b - 1 for a, b in zip(key, on, strict=True)).as_dict(),
                "share": 1 - median_spread(off).median / median_spread(on).median,
                "slower_in_pairs": median_spread(a / b - 1 for a, b in zip(on, off, strict=True)).as_dict(),
            }
        result["verify"] = verifying(store, sizes)
    return result


def _read(
    store: PrefixStore, prefix: AttachedPrefix, selected: list[int], path: Path, verify: bool
) -> tuple[float, float]:
    """Wall and processor seconds to read the `selected` chunks of all layers, queued at once."""
    g = prefix.geometry
    chunks = np.array(selected, dtype=np.int64)
    size, slots = len(chunks) * g.extent_bytes, np.arange(len(chunks))
    buffers = [aligned_buffer(size) for _ in range(g.num_layers)]
    for buffer in buffers:
        buffer.zero_()  # Touch the pages, because a request's buffers are already in use.
    drop_page_cache([path])
    if resident_pages(path):
        raise AssertionError(f"{path} is in the page cache")
    start, cpu = time.perf_counter(), time.process_time()
    tickets = [
        store.inner.reader.submit(prefix.reads(layer, chunks, slots, _places(buffer, g.extent_bytes), verify))
        for layer, buffer in enumerate(buffers)
    ]
    for ticket in tickets:
        ticket.wait()
    taken = time.perf_counter() - start, time.process_time() - cpu
    for layer, buffer in enumerate(buffers):
        for read in prefix.reads(layer, chunks, slots, _places(buffer, g.extent_bytes), True):
            for begin, length, checksum in read.checks:
                if read.segment.checksum(read.into[begin : begin + length]) != checksum:
                    raise AssertionError(f"other bytes were read than were stored, layer {layer}")
    return taken


def _places(buffer: torch.Tensor, size: int) -> Callable[[int, int], memoryview]:
    octets = as_memoryview(buffer)
    return lambda first, count: octets[first * size : (first + count) * size]


def verifying(store: PrefixStore, sizes: Sizes) -> dict[str, Any]:
    """`store.verify()` of one large segment."""
    if store.verify():
        raise AssertionError("a sound store has problems")
    seconds = timed(max(1, sizes.rounds // 3), store.verify)
    nbytes = store.stats.segment_bytes
    return {"bytes": nbytes, "ms": spread_ms(seconds), "gb_per_s": nbytes / median_spread(seconds).median / 1e9}


def publishing(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Publishing a segment of four chunks, from `begin_segment` to the return of `commit`, with and without fsync."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with PrefixStore(folder) as store:
        for number, (_, durable) in enumerate(interleave([True, False], 2 * sizes.rounds)):
            with contextlib.nullcontext() if durable else no_fsync():
                seconds[durable] += timed(1, partial(store_kv, store, some_ids(4 * CHUNK, 10**7 + number), TINY))
    on, off = median_spread(seconds[True]).median, median_spread(seconds[False]).median
    return {
        "durable_ms": spread_ms(seconds[True]),
        "without_fsync_ms": spread_ms(seconds[False]),
        "fsync_share": round(1 - off / on, 4),
    }


# ---- fingerprints, accounting ----


def fingerprints(sizes: Sizes) -> dict[str, Any]:
    """The first fingerprint of a model in a process, and later ones."""
    model = large_model(sizes.parameters)
    first = []
    names = set()
    for _ in range(min(5, sizes.rounds)):
        fingerprint._known.clear()
        first += timed(1, lambda: names.add(fingerprint.model_fingerprint(model)))
    second = timed(2 * sizes.rounds, lambda: names.add(fingerprint.model_fingerprint(model)))
    if len(names) != 1:
        raise AssertionError("the fingerprint of one model changes")
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "parameter_bytes": nbytes,
        "tensors": sum(1 for _ in model.parameters()),
        "first_ms": spread_ms(first),
        "again_ms": spread_ms(second),
        "goal": "first < 1 s",
        "met": median_spread(first).median < 1.0,
    }


def accounting(folders: dict[str, Path]) -> dict[str, Any]:
    """`stats.disk_bytes` compared with `du`, while the store is open."""
    rows = {}
    for name, folder in folders.items():
        with PrefixStore(folder) as store:
            said = store.stats.disk_bytes
            output = subprocess.run(["du", "-s", "--block-size=1", str(folder)], capture_output=True, check=True).stdout
            used = int(output.split()[0])
            rows[name] = {
                "segments": store.stats.segments,
                "stats_bytes": said,
                "du_bytes": used,
                "difference": (said - used) / used,
            }
    worst = max(abs(row["difference"]) for row in rows.values())
    return {"stores": rows, "worst": worst, "goal": "within 1%", "met": worst < 0.01}


# ---- all of it ----


@contextlib.contextmanager
def _temporary(folder: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="contiguouskv-store-bench-", dir=folder) as name:
        yield Path(name)


def run(sizes: Sizes | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Measure everything in a temporary folder inside `folder` (`None`: the system's temporary folder)."""
    sizes = sizes or Sizes()
    with _temporary(folder) as place:
        results: dict[str, Any] = {"machine": machine(), "large_store": fill(place / "large", sizes)}
        results["look_up"] = lookups(place / "large", sizes)
        results["opening"] = opening(place / "large", sizes)
        results["checksums"] = checksums(place / "one", sizes)
        results["publishing"] = {
            "new store": publishing(place / "new", sizes),
            "large store": publishing(place / "large", sizes),
        }
        results["fingerprint"] = fingerprints(sizes)
        with PrefixStore(place / "empty"):
            pass
        results["accounting"] = accounting(
            {"empty": place / "empty", "small": place / "new", "one large": place / "one", "many": place / "large"}
        )
    return results


def report(results: dict[str, Any], console: Console) -> None:
    """Print the results of `run`."""
    table = Table(title="what the store costs (median, quartiles)")
    for column in ("what", "figure", "quartiles", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def add(what: str, spread: dict[str, float], part: dict[str, Any] | None = None) -> None:
        verdict = f"{part['goal']}: {'yes' if part['met'] else 'NO'}" if part else ""
        table.add_row(what, f"{spread['median']:.3f} ms", f"{spread['low']:.3f} - {spread['high']:.3f}", verdict)

    for prompt, parts in results["look_up"]["prompts"].items():
        for part in ("hashing_ms", "index_query_ms", "look_up_of_a_new_prompt_ms"):
            add(f"{part.removesuffix('_ms').replace('_', ' ')}: {prompt}", parts[part])
        for part, label in (("match_ms", "the same without hashing"), ("look_up_ms", "look up of a recent prompt")):
            add(f"{label}: {prompt}", parts[part], {"goal": "< 1 ms", "met": parts[part]["median"] < 1.0})
    add("opening, new process", results["opening"]["new_process_ms"], results["opening"])
    add("opening, same process", results["opening"]["this_process_ms"])
    for kind in ("all chunks", "10% of the chunks"):
        for verified in ("verified", "unverified", "keyed"):
            add(f"cold read of {kind}, {verified}", results["checksums"][kind][f"{verified}_ms"])
            add(f"processor time of it, {verified}", results["checksums"][kind][f"{verified}_cpu_ms"])
        table.add_row(f"share of checksums in it, {kind}", f"{results['checksums'][kind]['share']:.1%}")
    table.add_row("verify", f"{results['checksums']['verify']['gb_per_s']:.2f} GB/s")
    for store, part in results["publishing"].items():
        add(f"publish 4 chunks, {store}", part["durable_ms"])
        table.add_row(f"share of fsync in it, {store}", f"{part['fsync_share']:.1%}")
    add("fingerprint, first", results["fingerprint"]["first_ms"], results["fingerprint"])
    add("fingerprint, again", results["fingerprint"]["again_ms"])
    account = results["accounting"]
    for name, row in account["stores"].items():
        table.add_row(f"disk_bytes against du: {name}", f"{row['difference']:+.3%}", "", account["goal"])
    console.print(table)
    console.print(f"{results['large_store']}\non {results['machine']}")


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder for the temporary stores, on a real disk.")] = None,
    segments: Annotated[int, typer.Option(help="Segments of the large store.")] = Sizes.segments,
    chunks: Annotated[int, typer.Option(help="Chunks of the large store.")] = Sizes.chunks,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = Sizes.tokens,
    layers: Annotated[int, typer.Option(help="Layers of the prefix that is read.")] = Sizes.layers,
    parameters: Annotated[int, typer.Option(help="Parameters of the fingerprinted model.")] = Sizes.parameters,
    rounds: Annotated[int, typer.Option(help="Repetitions.")] = Sizes.rounds,
) -> None:
    """Measure the cost of the store."""
    results = run(Sizes(segments, chunks, tokens, layers, parameters, rounds), folder)
    report(results, Console(width=None if sys.stdout.isatty() else 120))
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
