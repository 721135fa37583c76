"""What one request used of memory, told to the tiers once."""

from __future__ import annotations

import weakref

from ..memory import MemoryTiers, Usage
from ..store.extents import Form


class RequestUsage:
    """What one request used: noted as it goes, counted by the memory tiers once its first token is out.

    If the request is dropped before that, the tiers count it all the same.
    """

    def __init__(self, memory: MemoryTiers) -> None:
        self._memory = memory
        self._by_form: dict[Form, Usage] = {"exact": Usage(), "packed": Usage()}
        self._tell = weakref.finalize(self, memory.finished, *self._by_form.values())
        self._tell.atexit = False

    def of(self, form: Form) -> Usage:
        """What was used of chunks in this form."""
        return self._by_form[form]

    @property
    def told(self) -> bool:
        """Whether the tiers know already."""
        return not self._tell.alive

    def tell(self) -> None:
        """Tell the tiers, once, and do the work that they have put off."""
        self._tell()
        self._memory.catch_up()
