"""Keys for selection that stay in a tier, by name: their users, and the order in which they are evicted."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

from .entries import Buffer, KeptKeys
from .history import Floats, SegmentTable, Uses


class KeyRoom(dict[str, KeptKeys]):
    """The keys of one tier, by name. Callers hold the tier's lock.

    Attributes:
        held_bytes: bytes of all keys here, and of forgotten keys that still have users.
        busy_bytes: bytes of keys with users, forgotten or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.busy_bytes = 0
        self._in_order: list[KeptKeys] | None = None

    @property
    def idle_bytes(self) -> int:
        """Bytes of keys that can be evicted."""
        return self.held_bytes - self.busy_bytes

    @property
    def in_order(self) -> Sequence[KeptKeys]:
        """Keys by worth, lowest first; forgotten keys may be among them."""
        if self._in_order is None:
            self._in_order = sorted(self.values(), key=_worth)
        return self._in_order

    def of(self, table: SegmentTable) -> list[KeptKeys]:
        """Keys of one segment."""
        return [keys for keys in self.values() if keys.table is table]

    def add(self, name: str, which: int, buffer: Buffer, table: SegmentTable, worth: float) -> KeptKeys:
        """Keep a buffer under an unused name, with one user."""
        keys = self[name] = KeptKeys(name, which, buffer, table, worth, users=1)
        self.held_bytes += buffer.counted
        self.busy_bytes += buffer.counted
        if self._in_order is not None:
            insort(self._in_order, keys, key=_worth)
        table.resident += 1
        return keys

    def hold(self, name: str) -> KeptKeys | None:
        """Add a user to the keys of this name; `None` if there are none."""
        keys = self.get(name)
        if keys is not None:
            self.busy_bytes += 0 if keys.users else keys.buffer.counted
            keys.users += 1
        return keys

    def let_go(self, keys: KeptKeys) -> None:
        """Remove a user."""
        keys.users -= 1
        if not keys.users:
            self.busy_bytes -= keys.buffer.counted
            if keys.gone:
                self.held_bytes -= keys.buffer.counted

    def forget(self, keys: KeptKeys) -> None:
        """Remove keys by name; their memory counts until they have no users."""
        if self.pop(keys.name, None) is not None:
            keys.gone = True
            keys.table.resident -= 1
            if not keys.users:
                self.held_bytes -= keys.buffer.counted

    def judge(self, table: SegmentTable, worth: Callable[[Uses], Floats]) -> None:
        """Update the worth of a table's keys after its history has changed."""
        keys = self.of(table)
        if keys:
            judged = worth(table.uses_of_keys([one.which for one in keys]))
            for one, value in zip(keys, judged.tolist(), strict=True):
                one.worth = value
            self._in_order = None

    def clear(self) -> None:
        """Forget all keys and count no bytes."""
        super().clear()
        self._in_order = None
        self.held_bytes = self.busy_bytes = 0


def _worth(keys: KeptKeys) -> float:
    return keys.worth
