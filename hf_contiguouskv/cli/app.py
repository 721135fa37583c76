"""What all commands share: the application, its options, keys that may be abbreviated.

Modules add their commands with `@app.command()` and wrap them in `messages_instead_of_tracebacks`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from ..errors import InputError, StoreError
from ..store import PrefixInfo, PrefixStore
from ..store.fleet.engines import address_for_key, default_folder, is_address
from ..store.fleet.upkeep import SharedEntry, SharedUpkeep
from ..store.key import StoreKey
from ..wording import MESSAGE_LIMIT, quoted, shown
from .extensions import extension, extension_names
from .messages import described
from .output import print_json

# A prefix on this machine, or of a shared store.
Entry = TypeVar("Entry", PrefixInfo, SharedEntry)

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_WANTS_JSON = "hf_contiguouskv.json"
_MAX_SALT_BYTES = 64 * 1024
# What ends a command in order: what it made for a while is taken away again.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How this command opens stores: arguments of `PrefixStore`.
_access: ContextVar[dict[str, Any]] = ContextVar("access")


class _Commands(TyperGroup):
    """The group of all commands, those of other packages included.

    What is wrong with a command line is said in JSON as well, if it asks for that.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        own: list[str] = super().list_commands(ctx)
        return [*own, *(name for name in extension_names() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return extension(cmd_name) if own is None else own

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_WANTS_JSON] = "--json" in args
        with self._mistakes_in_json(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with self._mistakes_in_json(ctx), _ended_by_signals():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _mistakes_in_json(self, ctx: Any) -> Iterator[None]:
        try:
            yield
        except _UsageError as error:
            if isinstance(words := getattr(error, "message", None), str):
                error.message = shown(words, MESSAGE_LIMIT)  # type: ignore[attr-defined]  # (It quotes the line.)
            if ctx.meta[_WANTS_JSON]:
                print_json({"error": described(error)})
            raise  # typer says it on stderr, and ends with status 2.


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it, signals that end a command do so by `SystemExit`, with status 128 and the signal's number."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for later in _ENDING:  # Nothing interrupts what is taken away now; a second Ctrl-C does, at once.
            signal.signal(later, signal.SIG_DFL if later == signal.SIGINT else signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread can have handlers.
        return
    # (A signal that is ignored, as under nohup, stays so.)
    before = {number: signal.getsignal(number) for number in _ENDING}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


app = typer.Typer(
    name="contiguouskv", cls=_Commands, help="Prefix KV caches on disk.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _options(
    salt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Act as the tenant whose salt is in this file.", show_default=False),
    ] = None,
    salt_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The same, in this environment variable.", show_default=False),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="file:PATH|env:NAME", help="Where the key of the store is.", show_default=False),
    ] = None,
    trust_owner: Annotated[
        bool, typer.Option("--trust-owner", help="Use a store although other users own it or may write it.")
    ] = False,
) -> None:
    """Prefix KV caches on disk."""
    # (The secrets themselves are no arguments: everybody on the machine can see those.)
    access: dict[str, Any] = {}
    if salt_file is not None and salt_env is not None:
        raise typer.BadParameter("give --salt-file or --salt-env, not both")
    if salt_file is not None:
        try:
            with open(salt_file, "rb") as file:
                access["salt"] = file.read(_MAX_SALT_BYTES).strip()
        except OSError as error:
            raise typer.BadParameter(f"the salt cannot be read: {error}") from None
    if salt_env is not None:
        salt = os.environb.get(os.fsencode(salt_env))
        if salt is None:
            raise typer.BadParameter(f"there is no environment variable {quoted(salt_env)}")
        access["salt"] = salt.strip()
    if access.get("salt") == b"":
        raise typer.BadParameter("the salt is empty")
    if key is not None:
        access["key"] = key
    if trust_owner:
        access["trust_owner"] = True
    _access.set(access)


@contextlib.contextmanager
def open_store(
    place: Path, cache: Path | None = None, *, create: bool = True, keeps: bool = True, **more: Any
) -> Iterator[PrefixStore]:
    """The store at `place`, opened as the options before the command say, and closed at the end.

    Args:
        place: its folder, or the address of a shared store (as `place_of` returns it).
        cache: of a shared store: the folder for what this machine keeps of it; `None`: the usual one.
        create: as `PrefixStore`.
        keeps: whether the command keeps something in that folder. One that does not, and one that may not create a
            store, makes no such folder: where there is none, it uses a folder in its place that goes with it.
        more: further arguments of `PrefixStore`.

    Raises:
        InputError: there is a `cache` and `place` is a folder.
    """
    with contextlib.ExitStack() as stack:
        if not isinstance(place, Address):
            if cache is not None:
                raise InputError(f"--cache is for the address of a shared store, and {place} is a path")
            yield stack.enter_context(PrefixStore(place, create=create, **_access.get({}), **more))
            return
        folder = folder_of(place, cache)
        if not (create and keeps) and not folder.exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contiguouskv-")))
        yield stack.enter_context(PrefixStore(place.url, cache=folder, create=create, **_access.get({}), **more))


def folder_of(place: Address, cache: Path | None) -> Path:
    """The folder for what this machine keeps of a shared store: `cache`, or the usual one; there may be none yet."""
    if cache is not None:
        return cache
    key = StoreKey.of(_access.get({}).get("key"))
    return default_folder(address_for_key(place.url, None if key is None else key.public_name))


class Address(type(Path())):  # type: ignore[misc]  # (A path, since every command takes one.)
    """The address of a shared store, where a folder could stand. As a path, it is this machine's folder for it.

    Attributes:
        url: the address.
    """

    url: str


def place_of(text: str) -> Path:
    """A folder, or the address of a shared store."""
    if not is_address(text):
        return Path(text)
    found = Address(default_folder(text))
    found.url = text
    return found


StorePath = Annotated[
    Path,
    typer.Argument(
        metavar="STORE", help="Folder of the store, or address of a shared one.", show_default=False, parser=place_of
    ),
]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or their beginnings.", show_default=False)]
OptionalKeys = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY...]", help="Keys, or their beginnings.", show_default=False)
]
OptionalKey = Annotated[
    str | None,
    typer.Argument(metavar="KEY", help="Key, or its beginning; all of them if left out.", show_default=False),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="FOLDER", help="Of a shared store: what this machine keeps of it.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def find_entries(store: PrefixStore, beginnings: list[str]) -> list[PrefixInfo]:
    """The stored prefixes whose keys begin so, each of them once.

    Raises:
        StoreError: for one of them there is none, or more than one.
    """
    found = [find_entry(store, beginning) for beginning in beginnings]
    return list({entry.key: entry for entry in found}.values())


def find_shared(upkeep: SharedUpkeep, beginnings: list[str], *, all_of_them: bool = False) -> list[SharedEntry]:
    """The prefixes of a shared store whose keys begin so, each of them once.

    Args:
        upkeep: of the shared store.
        beginnings: of keys.
        all_of_them: every prefix, whatever its key.

    Raises:
        StoreError: for one beginning there is none, or more than one.
    """
    entries = upkeep.entries()
    if all_of_them:
        return entries
    found = {}
    for beginning in beginnings:
        some = [entry for entry in entries if beginning and entry.key.startswith(beginning.lower())]
        entry = _only(some, beginning)
        found[entry.key] = entry
    return list(found.values())


def find_entry(store: PrefixStore, beginning: str) -> PrefixInfo:
    """The one stored prefix whose key begins with `beginning`.

    Raises:
        StoreError: none, or more than one.
    """
    return _only(store.entries(beginning.lower()) if beginning else [], beginning)


def _only(found: list[Entry], beginning: str) -> Entry:
    """The one that was found.

    Raises:
        StoreError: none was, or more than one.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise StoreError(
            f"no stored prefix has a key that begins with {quoted(beginning)}; `contiguouskv ls` lists them"
        )
    names = ", ".join(entry.key for entry in found[:5]) + (", ..." if len(found) > 5 else "")
    raise StoreError(f"{len(found)} keys begin with {quoted(beginning)} ({names}); give more digits")
