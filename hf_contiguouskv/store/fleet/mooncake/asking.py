"""What an engine asks the master of a Mooncake Store, with a time-out and circuit breakers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..breaker import CircuitBreaker
from ..deadline import TELLING, TIME_IS_OVER, seconds_left
from ..engine import DeadlineError, EngineUnavailableError
from .calls import Call
from .client import MooncakeClient
from .native import checked

Result = TypeVar("Result")

# More objects in one call can fill the package's queues, which then refuses some or blocks.
AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object of Mooncake Store lies.

    Attributes:
        owner: host and port of the machine whose memory it is.
        nbytes: its length.
    """

    owner: str
    nbytes: int


class Patience(NamedTuple):
    """How long a call may be waited for.

    Attributes:
        seconds: until it is given up.
        tells_nothing: whether the look-up's deadline ends it so early that it says nothing of the engine.
    """

    seconds: float
    tells_nothing: bool


class Asking:
    """Asks for one engine.

    Args:
        client: makes the calls.
        name: of the store, for messages.
        timeout_s: seconds after which an answer is not waited for any more.

    Attributes:
        client, name, timeout_s: as passed.
        breaker: refuses calls while the master does not answer.
        writing: the same for calls that write: a slow write must not keep anyone from reading.
    """

    def __init__(self, client: MooncakeClient, name: str, timeout_s: float) -> None:
        self.client, self.name, self.timeout_s = client, name, timeout_s
        self.breaker = CircuitBreaker(name, timeout_s)
        self.writing = CircuitBreaker(f"{name} (writing)", timeout_s)
        self._closed = False

    def close(self) -> None:
        """Begin no more calls. (The client may go on for other engines.)"""
        self._closed = True

    def start(self, function: Callable[[Any], Result], release: Callable[[], object] = lambda: None) -> Call[Result]:
        """As `MooncakeClient.start`, as long as this engine is open."""
        if self._closed:
            release()
            raise EngineUnavailableError("the store was closed")
        return self.client.start(function, release)

    def patience(self, seconds: float | None = None) -> Patience:
        """How long a call may be waited for.

        Args:
            seconds: without a look-up's deadline; by default, the time-out.

        Raises:
            DeadlineError: the deadline has passed.
        """
        own, left = self.timeout_s if seconds is None else seconds, seconds_left()
        if left <= 0:
            raise DeadlineError(f"{self.name}: {TIME_IS_OVER}")
        return Patience(min(own, left), left < own and left < TELLING * self.timeout_s)

    def ask(
        self,
        function: Callable[[Any], Result],
        *,
        breaker: CircuitBreaker | None = None,
        seconds: float | None = None,
        release: Callable[[], object] = lambda: None,
    ) -> Result:
        """Make one call and wait for it.

        Args:
            function: is given the package's store. It raises `EngineUnavailableError` for an answer that says so.
            breaker: may refuse it, and is told its end; by default, that of the master.
            seconds: how long to wait; by default, the time-out.
            release: called once the call is over, if this method raises.

        Raises:
            EngineUnavailableError: there was no answer in time, or the breaker refused.
            DeadlineError: the deadline of the look-up has passed.
        """
        breaker = self.breaker if breaker is None else breaker
        try:
            patience = self.patience(seconds)
            breaker.enter(patience.seconds)
        except EngineUnavailableError:
            release()
            raise
        try:
            result = self.start(function, release).wait(patience.seconds)
        except TimeoutError:
            if patience.tells_nothing:
                breaker.gave_up()
                raise DeadlineError(f"{self.name}: {TIME_IS_OVER}") from None
            breaker.failed("no answer in time")
            raise EngineUnavailableError(f"no answer within {patience.seconds:g} s") from None
        except EngineUnavailableError as error:
            breaker.failed(error.strerror)
            raise
        except Exception:
            breaker.succeeded()
            raise
        except BaseException:
            breaker.gave_up()  # Ctrl-C says nothing of the engine.
            raise
        breaker.succeeded()
        return result

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which keys can be read now. (One that is still being written cannot.)"""
        found: dict[str, bool] = {}
        for some in batches(keys):
            codes = self.ask(partial(_exist, keys=some))
            found |= {key: code == 1 for key, code in zip(some, codes, strict=True)}
        return [found[key] for key in keys]

    def places(self, keys: Sequence[str]) -> dict[str, Place]:
        """Where objects lie; those that are not there are left out."""
        found: dict[str, Place] = {}
        for some in batches(keys):
            found |= self.ask(partial(_places, keys=some))
        return found

    def remove(self, keys: Sequence[str], *, force: bool) -> None:
        """Remove objects; those that are not there are left out.

        Args:
            keys: of the objects.
            force: whether others may read them just now. Who does may get bytes of something else, so this is for what
                is checked with a checksum of its own. Otherwise those that were asked for lately stay.
        """
        for some in batches(keys):
            self.ask(partial(_remove, keys=some, force=force), breaker=self.writing)


def _exist(store: Any, keys: list[str]) -> list[int]:
    return checked(store.batch_is_exist(keys))


def _remove(store: Any, keys: list[str], force: bool) -> None:
    checked(store.batch_remove(keys, force))


def _places(store: Any, keys: list[str]) -> dict[str, Place]:
    # (First, which are there: each one that is not would be a line in this process's output.)
    codes = _exist(store, keys)
    there = [key for key, code in zip(keys, codes, strict=True) if code == 1]
    found = {}
    for key, replicas in store.batch_get_replica_desc(there).items() if there else ():
        for replica in replicas:
            place = _place(replica)
            if place is not None:
                found[key] = place
                break
    if len(found) < len(there):
        # (An error of the master looks like no object at all.)
        _exist(store, there)
    return found


def _place(replica: Any) -> Place | None:
    try:
        buffer = replica.get_memory_descriptor().buffer_descriptor
        return Place(str(buffer.transport_endpoint), int(buffer.size))
    except (RuntimeError, ValueError, AttributeError):
        return None  # (On a disk: not read by this engine.)


def batches(keys: Sequence[str], most: int = AT_ONCE) -> Iterator[list[str]]:
    """Keys, each once, so many at a time: a key that is twice in one call may be answered wrongly."""
    distinct = list(dict.fromkeys(keys))
    return (distinct[start : start + most] for start in range(0, len(distinct), most))
