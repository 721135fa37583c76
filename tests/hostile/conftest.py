"""The tally of the hostile suite, and a second user."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tally import Figures

# An ordinary account that is neither root nor ours; nothing on the machine needs to know it.
STRANGER = 54321

_FIGURES = pytest.StashKey[Figures]()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as a second user")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def attacks(pytestconfig: pytest.Config) -> Figures:
    """The tally of this run: `attacks.add("a stranger's folder refused")` after each attack that was warded off."""
    return pytestconfig.stash[_FIGURES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash.get(_FIGURES, Figures()).print("hostile suite: attacks warded off", terminalreporter)


def in_child(work: Callable[[], object], *, user: int | None = None, memory: int | None = None) -> None:
    """Run `work` in a forked process; fail with its traceback if it raises.

    Args:
        work: what to run; the parent must have no store open that it uses.
        user: run it as this user (needs root), who has no other groups.
        memory: bytes of address space that it may add to what this process has now.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            if memory is not None:
                limit = _address_space() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            work()
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60_000:])
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}:\n{said}"


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """This process cannot take more than 2 GiB of addresses besides what it has (threads reserve much of that).

    For tests that try many things, where a child for each would take too long.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def as_stranger(work: Callable[[], object]) -> None:
    """Run `work` as a second user of this machine. Mark the test with `needs_root`."""
    in_child(work, user=STRANGER)


def open_to_all(folder: Path) -> None:
    """Let everybody reach `folder` (pytest's folders are private)."""
    for place in (folder, *folder.parents):
        if place.stat().st_uid == os.geteuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o755)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
