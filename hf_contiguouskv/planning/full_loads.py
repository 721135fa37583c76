"""Requests of systems that use the whole prefix: computed again, in memory, saved as one file, loaded by layers."""

from __future__ import annotations

import math
from dataclasses import replace

from .costs import Case, HostWork
from .pipeline import LayerStep, RequestSteps
from .volumes import Volume

_FLOOR = HostWork(4_507, 179, 81, 50)
_RELOAD = HostWork(5_635, 192, 79, 50)
_IN_MEMORY = HostWork(9_432, 187, 87, 50)
_BY_LAYERS = HostWork(9_950, 503, 151, 50)
_OVERLAPPED = HostWork(17_681, 290, 95, 50)
# AttentionStore reads a layer in ranges of so many bytes.
_RANGE_BYTES = 4 * 2**20
# The kernel reads a file so far ahead of a program that reads it from its beginning, one such piece at a time.
_READ_AHEAD_BYTES = 128 * 2**10


def floor(case: Case) -> RequestSteps:
    """The suffix alone: no method can be faster."""
    return RequestSteps([LayerStep(*case.layer_s(_FLOOR, 0))] * case.model.layers, _before(case, _FLOOR))


def recompute(case: Case) -> RequestSteps:
    """Nothing is stored: prefix and suffix are computed in one forward."""
    steps = [LayerStep(*case.prefill_layer_s(_FLOOR, layer)) for layer in range(case.model.layers)]
    return RequestSteps(steps, _before(case, _FLOOR))


def in_memory(case: Case) -> RequestSteps:
    """The whole cache lies where the model computes."""
    steps = [LayerStep(*case.layer_s(_IN_MEMORY, case.seen(layer))) for layer in range(case.model.layers)]
    return RequestSteps(steps, _before(case, _IN_MEMORY), used_bytes=_kv_bytes(case))


def reload(case: Case) -> RequestSteps:
    """The whole cache, saved as one file, is read through the page cache before the model starts; it crosses from
    ordinary memory."""
    nbytes = _kv_bytes(case)
    steps = [LayerStep(*case.layer_s(_RELOAD, case.seen(layer))) for layer in range(case.model.layers)]
    # Out of the page cache, bytes are read once and written once.
    copied = 2 * nbytes / case.machine.memory_s if not case.machine.has_accelerator else 0.0
    steps[0] = replace(steps[0], first=Volume(nbytes, nbytes / _READ_AHEAD_BYTES), host_s=steps[0].host_s + copied)
    before = _before(case, _RELOAD)
    return RequestSteps(steps, before, in_flight=1, pinned=False, asking_s=0.0, used_bytes=nbytes)


def by_layers(case: Case, overlap: bool) -> RequestSteps:
    """AttentionStore: a layer is read whole, where attention uses it.

    Args:
        case: the request.
        overlap: all layers are asked for at once; else a layer is asked for when it is its turn.
    """
    work = _OVERLAPPED if overlap else _BY_LAYERS
    steps = []
    for layer in range(case.model.layers):
        seen = case.seen(layer)
        nbytes = seen * case.token_bytes
        volume = Volume(nbytes, math.ceil(nbytes / _RANGE_BYTES))
        steps.append(LayerStep(*case.layer_s(work, seen), first=volume))
    return RequestSteps(steps, _before(case, work), ahead=None if overlap else 0, used_bytes=_kv_bytes(case))


def _before(case: Case, work: HostWork) -> float:
    return work.before_s(case.machine) + case.output_s()


def _kv_bytes(case: Case) -> float:
    return float(sum(case.seen(layer) for layer in range(case.model.layers)) * case.token_bytes)
