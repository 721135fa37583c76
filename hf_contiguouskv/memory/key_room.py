"""Keys for selection that stay in a tier, by name: who uses them, and in which order they would go."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

from .entries import Buffer, KeptKeys
from .history import Floats, SegmentTable, Uses


class KeyRoom(dict[str, KeptKeys]):
    """The keys of one tier, by name. Whoever calls this holds the tier's lock.

    Attributes:
        held_bytes: of all keys here, and of those that were forgotten while somebody uses them.
        busy_bytes: of keys here that somebody uses, and of those forgotten ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.busy_bytes = 0
        self._in_order: list[KeptKeys] | None = None

    @property
    def idle_bytes(self) -> int:
        """Bytes of keys that could go."""
        return self.held_bytes - self.busy_bytes

    @property
    def in_order(self) -> Sequence[KeptKeys]:
        """Keys with the least worth first; some that are gone may be among them."""
        if self._in_order is None:
            self._in_order = sorted(self.values(), key=_worth)
        return self._in_order

    def of(self, table: SegmentTable) -> list[KeptKeys]:
        """Keys of one segment."""
        return [keys for keys in self.values() if keys.table is table]

    def add(self, name: str, which: int, buffer: Buffer, table: SegmentTable, worth: float) -> KeptKeys:
        """Keep a buffer under a name that is free; it has one user."""
        keys = self[name] = KeptKeys(name, which, buffer, table, worth, users=1)
        self.held_bytes += buffer.counted
        self.busy_bytes += buffer.counted
        if self._in_order is not None:
            insort(self._in_order, keys, key=_worth)
        table.resident += 1
        return keys

    def hold(self, name: str) -> KeptKeys | None:
        """One user more; `None`: there are no keys of that name."""
        keys = self.get(name)
        if keys is not None:
            self.busy_bytes += 0 if keys.users else keys.buffer.counted
            keys.users += 1
        return keys

    def let_go(self, keys: KeptKeys) -> None:
        """One user less."""
        keys.users -= 1
        if not keys.users:
            self.busy_bytes -= keys.buffer.counted
            if keys.gone:
                self.held_bytes -= keys.buffer.counted

    def forget(self, keys: KeptKeys) -> None:
        """They are not found any more; their memory counts until nobody uses it."""
        if self.pop(keys.name, None) is not None:
            keys.gone = True
            keys.table.resident -= 1
            if not keys.users:
                self.held_bytes -= keys.buffer.counted

    def judge(self, table: SegmentTable, worth: Callable[[Uses], Floats]) -> None:
        """The history of a table has changed: judge its keys anew."""
        keys = self.of(table)
        if keys:
            judged = worth(table.uses_of_keys([one.which for one in keys]))
            for one, value in zip(keys, judged.tolist(), strict=True):
                one.worth = value
            self._in_order = None

    def clear(self) -> None:
        """Forget everything at once: nothing is counted from now on."""
        super().clear()
        self._in_order = None
        self.held_bytes = self.busy_bytes = 0


def _worth(keys: KeptKeys) -> float:
    return keys.worth
