"""Whether a backend keeps the promises of `backend.py`: checks to run against your own.

    from hf_contiguouskv.store.conformance import check_backend

    check_backend(lambda: MyBackend("bucket/some-unused-prefix"))

Each check takes a callable that makes a backend, raises `AssertionError` with what was promised and what was seen, and
returns nothing. Under pytest: `@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)`.

The place need not be empty, but nobody else may use it meanwhile. Blobs have random keys; what a check has published
or put aside it deletes, if it passes. Blobs are at most 1 MiB.

What cannot be checked from outside: that `seal` and `publish` are durable, that a crash inside `publish` leaves all or
nothing, and that `collect` finds what writers of dead processes left.
"""

from __future__ import annotations

from .blobs import (
    deletes_under_open_readers,
    describes_itself,
    lets_several_write_one_key,
    publishes_whole_and_lists,
    reads_back_what_is_being_written,
    refuses_bad_keys,
    replaces_under_the_same_key,
    says_what_is_missing,
    shows_nothing_before_publish,
    writes_in_any_order,
)
from .reading import (
    closes_blobs,
    ends_where_it_ends,
    knows_what_is_backed,
    reads_many_extents,
    reads_nothing,
    reads_unaligned,
    serves_many_threads,
)
from .tools import Check, Make
from .upkeep import (
    closes_twice,
    collects_no_living_writer,
    collects_no_writer_of_another,
    counts_its_overhead,
    discards_writers,
    drops_its_quarantine,
    quarantines_what_it_is_asked_to,
    shares_its_quarantine,
    shares_what_is_published,
)

__all__ = ["CHECKS", "SHARED_CHECKS", "Check", "Make", "check_backend"]

CHECKS: tuple[Check, ...] = (
    describes_itself,
    writes_in_any_order,
    reads_back_what_is_being_written,
    shows_nothing_before_publish,
    publishes_whole_and_lists,
    replaces_under_the_same_key,
    lets_several_write_one_key,
    deletes_under_open_readers,
    says_what_is_missing,
    refuses_bad_keys,
    ends_where_it_ends,
    knows_what_is_backed,
    reads_nothing,
    reads_unaligned,
    reads_many_extents,
    serves_many_threads,
    closes_blobs,
    quarantines_what_it_is_asked_to,
    drops_its_quarantine,
    counts_its_overhead,
    collects_no_living_writer,
    discards_writers,
    closes_twice,
)
"""What every backend must do: one promise each, in the order in which they build upon each other."""


SHARED_CHECKS: tuple[Check, ...] = (shares_what_is_published, shares_its_quarantine, collects_no_writer_of_another)
"""What two objects that `make` gives owe each other where they lie in one place."""


def check_backend(make: Make, *, shared: bool = True) -> None:
    """Run all checks.

    Args:
        make: gives a backend; called at least once for each check.
        shared: whether the backends that `make` gives all lie in one place and see each other's blobs, as `LocalDisk`
            objects on one folder do; then `SHARED_CHECKS` run as well. A backend of which each object is a place of
            its own, such as `MemoryBackend`, passes false.

    Raises:
        AssertionError: a promise is broken; the first one that is.
    """
    for check in CHECKS + SHARED_CHECKS if shared else CHECKS:
        check(make)
