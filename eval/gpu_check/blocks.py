"""All requests on prefixes of one length: the prefix is stored once, then every case runs once per round, as time
allows."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from ..systems import System
from ..systems.states import State
from ..timing import interleave, median_spread
from .cases import FLOOR, FOLDER_SIZES, Case, Measured, cases_of, make_system, measured_at
from .device import free_memory, memory_in_use
from .prefixes import kv_bytes, random_states, request
from .requests import Answers, LastLogits, prefix_effect, timed_floor, timed_request
from .results import Clock, Record
from .settings import Settings

# A step counts as hung if it takes longer than this, than ten times its earlier time, and than a very slow disk needs.
HUNG_S = 25.0
SLOWEST_BYTES_PER_S = 5e7
# The largest share of the disk's free room that one length may take.
DISK_SHARE = 0.9


class Block:
    """Prefixes of one length.

    Args:
        settings, model: settings and model of the run.
        tokens: tokens of the prefix.
        folder: folder for its stores.
        record: record of the stage; `record.found["prefixes"][tokens]` belongs to this block.
        clock: clock of this block.
        last: keeps the model's last logits.
        write_speed: bytes per second of earlier stores, if known.

    Attributes:
        own: the results.
        systems: open systems, by case.
        write_speed: as given, or as measured here.
    """

    def __init__(
        self,
        settings: Settings,
        model: Any,
        tokens: int,
        folder: Path,
        record: Record,
        clock: Clock,
        last: LastLogits,
        write_speed: float | None = None,
    ) -> None:
        self._settings = settings
        self._model = model
        self._tokens = tokens
        self._folder = folder
        self._record = record
        self._clock = clock
        self._last = last
        self._stack = ExitStack()
        self._request = request(settings, tokens)
        self._patience = HUNG_S + 2 * kv_bytes(settings, tokens) / SLOWEST_BYTES_PER_S
        self._answers = Answers()
        self.write_speed = write_speed
        self.systems: dict[Case, System] = {}
        self.own: dict[str, Any] = record.found.setdefault("prefixes", {}).setdefault(str(tokens), {})
        self.own |= {"tokens": tokens, "kv_bytes": kv_bytes(settings, tokens), "status": "running"}
        for name in ("stored", "requests", "floors", "skipped"):
            self.own.setdefault(name, {} if name == "stored" else [])

    def run(self) -> None:
        """Store the prefix, and time requests on it."""
        began = time.time()
        self._store()
        self.own["seconds_to_store"] = time.time() - began
        self._first_round()
        self.own["seconds_to_first_rounds"] = time.time() - began
        self.own["memory"] = memory_in_use(self._settings)
        # An earlier process may have made some rounds before it died.
        done = max((one["round"] for one in self.own["requests"]), default=0)
        cases, rounds = self._planned(self._settings.rounds - done)
        for number in range(done + 1, done + 1 + rounds):
            if not self._round(number, cases):
                break
        self.own |= {"status": "complete", "seconds": time.time() - began}
        self._record.results.flush()

    def predicted(self, tokens: int) -> float:
        """Estimated seconds to store a prefix of another length and make two rounds of requests, scaled from this
        one."""
        others = measured_at(self._settings, tokens)
        labels, folders = {one.label for one in others}, {one.folder for one in others}
        complete = tokens in self._settings.complete_lengths
        stored = sum(one["seconds"] for name, one in self.own["stored"].items() if name in folders)
        rounds: tuple[dict[Any, float], dict[Any, float]] = {}, {}
        for one in self.own["requests"]:
            if one["label"] in labels and (complete or one["state"] != State.WARM_HOST):
                rounds[one["round"] > 0][one["label"], one["state"]] = one["wall_s"]
        first, later = rounds
        seconds: float = stored + sum(first.values()) + sum((first | later).values())
        return seconds * tokens / self._tokens

    def close(self, keep: tuple[str, ...] = ()) -> None:
        """Close all systems, and delete their stores.

        Args:
            keep: names of folders to keep.
        """
        self._stack.close()
        self.systems.clear()
        for folder in [one for one in self._folder.glob("*") if one.name not in keep]:
            shutil.rmtree(folder, ignore_errors=True)
        free_memory(self._settings)

    # -- storing ------------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        states = random_states(self._model, self._tokens)
        for measured in measured_at(self._settings, self._tokens):
            why = self._no_room(measured)
            if why is None:
                name = f"{self._tokens} store {measured.label}"
                self._record.attempt(name, partial(self._put, measured, states), self._patience)
            else:
                self._skip(measured.label, why)
        del states
        free_memory(self._settings)

    def _no_room(self, measured: Measured) -> str | None:
        """Why a system cannot be stored: the disk is too small, or too slow."""
        folder = measured.folder
        if folder is None or folder in self.own["stored"]:
            return None
        size = FOLDER_SIZES[folder] * self.own["kv_bytes"]
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if size > free * DISK_SHARE:
            return f"storing it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        # Its requests also need time.
        if self.write_speed and size / self.write_speed > self._clock.left / 2:
            return (
                f"storing it would take {size / self.write_speed:.0f} s at {self.write_speed / 1e9:.2f} GB/s, and "
                f"{self._clock.left:.0f} s are left"
            )
        return None

    def _put(self, measured: Measured, states: DynamicCache) -> None:
        first = None
        for case in self._cases_of(measured):
            system = make_system(self._settings, self._model, case, self._folder, self._tokens)
            self._stack.enter_context(system)
            began = time.time()
            system.store(self._request.prefix_ids, states)
            self.systems[case] = system
            first = time.time() - began if first is None else first
        folder = measured.folder
        if folder is not None and folder not in self.own["stored"]:
            assert first is not None
            size = sum(file.stat().st_size for file in (self._folder / folder).rglob("*") if file.is_file())
            self.own["stored"][folder] = {"bytes": size, "seconds": first}
            self.write_speed = size / max(first, 1e-6)

    def _cases_of(self, measured: Measured) -> list[Case]:
        probe = Case(measured, None)
        system = make_system(self._settings, self._model, probe, self._folder, self._tokens)
        return cases_of(self._settings, self._tokens, measured, system)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _first_round(self) -> None:
        """Run every case once, so that one-time work is done. Answers are compared from here on."""
        self._floor(0)
        for case in self.systems:
            if self._clock.left <= 0:
                self._skip(case.name, "no time was left for its first request")
            else:
                self._timed(0, case)
        self._floor(0)

    def _planned(self, wanted: int) -> tuple[list[Case], int]:
        """The cases of the counted rounds, and the number of these rounds: `wanted`, or fewer."""
        settings = self._settings
        walls = {case: self._wall(case) for case in self.systems}
        cases = [case for case, wall in walls.items() if wall is not None]
        left = self._clock.left
        fewest = min(wanted, settings.fewest_rounds if self._tokens in settings.complete_lengths else 1)
        # Drop the slowest cases first.
        for case in sorted(cases, key=lambda one: -(walls[one] or 0.0)):
            if fewest * sum(walls[one] or 0.0 for one in cases) <= left:
                break
            cases.remove(case)
            self._skip(case.name, f"a request takes {walls[case]:.1f} s with its preparation, too long for the rest")
        each = sum(walls[one] or 0.0 for one in cases)
        rounds = min(wanted, int(max(0.0, left) / each)) if each else 0
        self.own["rounds"] = settings.rounds - wanted + rounds
        if rounds < wanted:
            self._skip("rounds", f"{rounds} of {wanted}: one takes {each:.1f} s, and {left:.0f} s were left")
        return cases, rounds

    def _round(self, number: int, cases: list[Case]) -> bool:
        """Run every case once, in random order; whether there was time for all."""
        self._floor(number)
        order = [case for _, case in interleave(cases, 1, seed=1000 * self._tokens + number)]
        for place, case in enumerate(order):
            if place == len(order) // 2:
                self._floor(number)
            if self._clock.left < (self._wall(case) or 0.0):
                self._skip("rounds", f"time ran out in round {number}")
                return False
            self._timed(number, case)
        self._floor(number)
        return True

    def _timed(self, number: int, case: Case) -> None:
        limit = max(self._patience, 10 * (self._wall(case) or 0.0))
        found = self._record.attempt(
            f"{self._tokens} {case.name}",
            lambda: timed_request(self._model, self.systems[case], case, self._request, self._last, self._answers),
            limit,
        )
        if found is not None:
            state = None if case.state is None else str(case.state)
            key = {"round": number, "label": case.measured.label, "state": state}
            self.own["requests"].append(key | found)
            self._record.results.flush()
        else:
            free_memory(self._settings)  # Memory may have run out.

    def _floor(self, number: int) -> None:
        found = self._record.attempt(
            f"{self._tokens} {FLOOR}", lambda: timed_floor(self._model, self._request, self._last)
        )
        if found is not None:
            seconds, logits = found
            self.own["floors"].append({"round": number, "seconds": seconds})
            if "prefix_effect" not in self.own or self.own["prefix_effect"] is None:
                self.own["prefix_effect"] = prefix_effect(self._answers, logits)

    def _wall(self, case: Case) -> float | None:
        """Seconds of a request with its preparation; `None` if there was none, or it failed."""
        if f"{self._tokens} {case.name}" in self._record.failed:
            return None
        state = None if case.state is None else str(case.state)
        walls = [
            (one["round"] > 0, one["wall_s"])
            for one in self.own["requests"]
            if (one["label"], one["state"]) == (case.measured.label, state)
        ]
        later = [wall for counted, wall in walls if counted] or [wall for _, wall in walls]
        return median_spread(later).median if later else None

    def _skip(self, what: str, why: str) -> None:
        if not any(one["what"] == what for one in self.own["skipped"]):
            self.own["skipped"].append({"what": what, "why": why})
            self._record.results.flush()
