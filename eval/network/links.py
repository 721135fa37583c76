"""The links that are imitated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What lies between a machine and the object server.

    Attributes:
        gbps: gigabits per second of answers; 0: as fast as loopback and the proxy are.
        delay_ms: that each answer waits, milliseconds.
    """

    gbps: float
    delay_ms: float


LINKS = {
    "10Gb": Link(10.0, 0.2),
    "1Gb": Link(1.0, 5.0),
    "100Mb": Link(0.1, 20.0),
}
