"""Which modules take part between the disk and attention, in one layer of a request.

    python scripts/hops.py                 # of a layer in the middle
    python scripts/hops.py --layer 12

A small random Llama answers requests on a stored prefix: an exact one, one with the default configuration, and one with
the published method (`ContiguousKVConfig.paper()`). Each is run right after the store was opened (nothing is in memory)
and again on the same store (chunks are in memory). A profile function notes the library's code that runs

- in the model's thread, between the call of the layer's `update` or of its attention function, and the return;
- in reader threads, while they work out or serve the reads of the layer's chunks.

Three numbers are printed. *Run*: modules of which at least one function was called. *Hold the byte* (`*`): those in
which a variable or a result of a function is memory that the layer's chunks are in: a slot of the host's tier, a buffer
of a read, or attention's memory. *Pass memory* (`o`): those in which it is such memory, but only before the chunks are
in it. (Where attention's memory is allocated does not count.)
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import hf_contiguouskv
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.model.transformers_internals import cache_argument

LIBRARY = Path(hf_contiguouskv.__file__).parent
KINDS = {
    "exact": ContiguousKVConfig(budget=1.0),
    "default": ContiguousKVConfig(),
    "published": ContiguousKVConfig.paper(),
}
LAYERS, PREFIX_TOKENS, SUFFIX_TOKENS = 17, 2048, 24
Place = tuple[int, int]


def memory_of(value: Any) -> Iterator[Place]:
    """Address and length of the memory that a variable is, if it is a tensor, bytes, or reads into bytes."""
    if isinstance(value, torch.Tensor) and value.numel():
        # Of attention's memory the first head: between the prefix of two heads lies the suffix.
        sizes = list(zip(value.shape, value.stride(), strict=True))[-2:]
        yield value.data_ptr(), (sum((size - 1) * stride for size, stride in sizes) + 1) * value.itemsize
    elif isinstance(value, memoryview) and value.nbytes:
        yield np.frombuffer(value, np.uint8).ctypes.data, value.nbytes
    elif isinstance(value, list | tuple):
        for one in value[:4]:
            yield from memory_of(one)
    elif type(value).__name__ in ("Read", "Part"):
        yield from memory_of(value.into)
    elif type(value).__name__ == "ReadBatch":
        yield from memory_of(value.parts)


class Hops:
    """Notes the library's modules that run for one layer: a profile function for all threads of a process."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._thread = threading.local()
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        self.run: set[str] = set()
        # Modules, memory that they saw, whether reads were being asked for, and whether attention's memory was filled.
        self._seen: set[tuple[str, Place, bool, bool]] = set()
        self._read: set[Place] = set()
        self._attended: set[Place] = set()
        self._tickets: set[int] = set()
        # Tensors live on, so that no address means two of them.
        self._kept: list[Any] = []
        self._placed = False

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(str(LIBRARY)):
            return
        thread, name, local = self._thread, frame.f_code.co_name, frame.f_locals
        if event == "return":
            self._note_reads(name, local, result)
        if getattr(thread, "frame", None) is None:
            if event == "return" or not self._is_for_layer(name, local):
                return
            thread.frame = frame
        if event == "call" and name == "find_or_read" and getattr(thread, "asking", None) is None:
            thread.asking = frame
        module = path[len(str(LIBRARY)) + 1 : -3]
        self.run.add(module)
        if event == "return":
            # (`update` allocates the memory, when no chunk has arrived.)
            if thread.frame.f_code.co_name != "update":
                self._note_memory(module, name, local, result)
            if thread.frame is frame:
                thread.frame = None
            if getattr(thread, "asking", None) is frame:
                thread.asking = None
            self._placed |= name == "load_full"

    def _is_for_layer(self, name: str, local: dict[str, Any]) -> bool:
        """Whether a call that begins now is the layer's."""
        me = local.get("self")
        if threading.current_thread() is threading.main_thread():
            of = me if name == "update" else local.get("module") if name == "attention" else None
            return getattr(of, "layer_idx", None) == self.layer
        return id(me) in self._tickets if name == "serve" else name == "find_or_read" and local["layer"] == self.layer

    def _note_reads(self, name: str, local: dict[str, Any], result: Any) -> None:
        """Remember the memory and the tickets of the layer's reads, in whatever thread they are made."""
        if name == "reads" and "slots" in local:
            self._thread.asked = local["layer"]
            if local["layer"] == self.layer:
                self._read |= set(memory_of(result))
        elif name == "__init__" and type(local["self"]).__name__ == "Ticket":
            if getattr(self._thread, "asked", None) == self.layer:
                self._tickets.add(id(local["self"]))
                self._kept.append(local["self"])
            self._thread.asked = None

    def _note_memory(self, module: str, name: str, local: dict[str, Any], result: Any) -> None:
        if name == "select":
            self._read |= set(memory_of(result))
        elif name == "load_full":
            self._attended |= set(memory_of(local["destination"]))
        asking = getattr(self._thread, "asking", None) is not None
        for value in (*local.values(), result):
            self._seen |= {(module, place, asking, self._placed) for place in memory_of(value)}
            if isinstance(value, torch.Tensor):
                self._kept.append(value)

    @property
    def holding(self) -> set[str]:
        """Modules that hold memory that the layer's chunks are in."""
        return {
            module
            for module, place, asking, placed in self._seen
            if (not asking and _touches(place, self._read)) or (placed and _touches(place, self._attended))
        }

    @property
    def passing(self) -> set[str]:
        """Modules that hold such memory only before the chunks are in it."""
        memory = self._read | self._attended
        return {module for module, place, _, _ in self._seen if _touches(place, memory)} - self.holding


def _touches(place: Place, others: set[Place]) -> bool:
    return any(place[0] < at + nbytes and at < place[0] + place[1] for at, nbytes in others)


def small_model() -> Any:
    """A random Llama with grouped-query attention, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * PREFIX_TOKENS,
        initializer_range=0.15,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def main(layer: Annotated[int, typer.Option(help="whose modules are listed; 8 leads a published period")] = 8) -> None:
    """List and count the modules that run, and those that hold the byte, in one layer of each kind of request."""
    model, hops = small_model(), Hops(layer)
    ids = torch.randint(3, 128, (1, PREFIX_TOKENS + SUFFIX_TOKENS), generator=torch.Generator().manual_seed(1))
    prefix = ids[:, :PREFIX_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        with PrefixStore(folder) as store:
            ContiguousKVCache(model, prefix, store=store).close()
        threading.setprofile(hops)
        for kind, config in KINDS.items():
            with PrefixStore(folder) as store:
                for state in ("store just opened", "chunks in memory"):
                    hops.clear()
                    sys.setprofile(hops)  # The reads of an exact request start when its cache is made.
                    try:
                        with ContiguousKVCache(model, prefix, store=store, config=config) as cache:
                            model.generate(ids, max_new_tokens=1, **{cache_argument(): cache})
                    finally:
                        sys.setprofile(None)
                    run, holding, passing = sorted(hops.run), hops.holding, hops.passing
                    print(
                        f"\n{kind}, {state}: {len(run)} run, {len(holding)} hold the byte, {len(passing)} pass memory"
                    )
                    for module in run:
                        print(f"  {'*' if module in holding else 'o' if module in passing else ' '} {module}")
    threading.setprofile(None)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
