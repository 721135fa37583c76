"""Reads ahead start in order, within their limit, and when a layer needs them."""

from __future__ import annotations

from collections.abc import Callable

from hf_contiguouskv.loading.payload_reads import Lookahead


class Started(list[tuple[str, bool]]):
    """What was started, and whether it had to be."""

    def read(self, name: str) -> Callable[[bool], bool]:
        def start(must: bool) -> bool:
            self.append((name, must))
            return True

        return start


def test_reads_of_several_layers_start_when_one_of_them_is_needed() -> None:
    started = Started()
    ahead = Lookahead(100)
    ahead.add([0, 1, 2], 90, started.read("0 to 2"))
    ahead.add([3, 4, 5], 90, started.read("3 to 5"))
    ahead.pump()
    assert started == [("0 to 2", False)]
    ahead.need(1)
    assert started == [("0 to 2", False)], "they are on their way"
    ahead.need(5)
    assert started == [("0 to 2", False), ("3 to 5", True)]
    ahead.need(3)
    assert len(started) == 2


def test_bytes_of_several_layers_count_until_the_last_is_used() -> None:
    started = Started()
    ahead = Lookahead(100)
    ahead.add([0, 1], 90, started.read("0 and 1"))
    ahead.add([2], 90, started.read("2"))
    ahead.pump()
    ahead.used(0)
    assert started == [("0 and 1", False)]
    ahead.used(1)
    assert started == [("0 and 1", False), ("2", False)]
