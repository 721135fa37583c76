"""A folder that is held open: what is in it is reached through its descriptor, and no path can be swapped under us.

A path is looked up again at each use, so anyone who may rename a folder on it, or put a link there, decides what a
later call opens, moves or deletes. A descriptor means one folder for good. No link is followed in it, and no folder
that holds something is ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ..errors import UntrustedOwnerError

# Opening a pipe or a device must not wait for its other end, nor make it the terminal of this process.
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What the system says of a folder where a file was to be deleted (Linux, and POSIX).
_IS_FOLDER = (errno.EISDIR, errno.EPERM)
_HOLDS_SOMETHING = (errno.ENOTEMPTY, errno.EEXIST)


def require_trusted(status: os.stat_result, name: str, trust_owner: bool = False) -> None:
    """Refuse a file or folder that another user of this machine can, or could, write.

    Args:
        status: of the open file or folder.
        name: for the message.
        trust_owner: accept it all the same.

    Raises:
        UntrustedOwnerError: neither this process's effective user nor root owns it, or its group or the world may
            write it.
    """
    if trust_owner:
        return
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise UntrustedOwnerError(
            f"{name} belongs to user {status.st_uid}; this process runs as user {user}. Who owns it can read and "
            "choose what is stored in it. Use a folder of your own; or, if you trust that user, say trust_owner=True "
            "(in a command: --trust-owner)."
        )
    if status.st_mode & 0o022:
        raise UntrustedOwnerError(
            f"{name} may be written by others (mode {stat.S_IMODE(status.st_mode):04o}), who could choose what is "
            "stored in it. Take that right away (chmod -R go-w, with the folder of the whole store); or, if you trust "
            "them all, say trust_owner=True (in a command: --trust-owner)."
        )


class Directory:
    """An open folder. A context manager; it is closed with the last reference at the latest.

    It has many methods because each is one system call relative to the folder's descriptor.

    Args:
        descriptor: of the folder; it belongs to this object from now on.
        name: the path at which it was opened; for messages.
        trust_owner: accept what other users own, or may write (see `require_trusted`), for everything in it as well.

    Attributes:
        fd: the descriptor; -1 once closed.

    Every method raises `OSError`, with the whole path in it, for what the system refuses.
    """

    def __init__(self, descriptor: int, name: str, *, trust_owner: bool = False) -> None:
        self.fd = descriptor
        self.name = name
        self.trust_owner = trust_owner

    @property
    def path(self) -> Path:
        """The path at which it was opened: something else may lie there by now."""
        return Path(self.name)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        follow: bool = False,
        trust_owner: bool = False,
        check: bool = True,
    ) -> Directory:
        """Open the folder `path`.

        Args:
            path: of the folder.
            create: make it where it is missing, for this user only whatever the umask, and what is missing above it.
            follow: accept a link to a folder as the last part of `path`.
            trust_owner: see the class.
            check: compare its owner and mode now; else the caller does, by `require_trusted`.

        Raises:
            UntrustedOwnerError: see `require_trusted`.
            OSError: it is missing, no folder, or a link and not `follow`.
        """
        place = Path(path).absolute()
        flags = _FOLDER if follow else _FOLDER | os.O_NOFOLLOW
        try:
            descriptor = os.open(place, flags)
        except FileNotFoundError:
            if not create:
                raise
            for above in [parent for parent in reversed(place.parents) if not parent.exists()]:
                _make_folder(above, None, 0o755)  # (Those who may write it could rename this folder.)
            made = _make_folder(place, None)
            descriptor = os.open(place, flags)
            if made:
                os.fchmod(descriptor, 0o700)
        folder = cls(descriptor, str(place), trust_owner=trust_owner)
        if check:
            folder.require_trusted()
        return folder

    def require_trusted(self) -> None:
        """Raise `UntrustedOwnerError` if others may write this folder; see the function."""
        if not self.trust_owner:
            require_trusted(os.fstat(self.fd), self.name)

    def is_in_place(self) -> bool:
        """Whether the path at which it was opened still leads here: the folder may have been moved, or replaced."""
        try:
            there, here = os.stat(self.name), os.fstat(self.fd)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def path_of(self, name: str) -> Path:
        """The path of `name` in here, for messages: what lies at it may be something else by now."""
        return Path(self.name, name)

    # -- folders in it ------------------------------------------------------------------------------------------

    def sub(self, name: str, *, create: bool = False) -> Directory:
        """Open the folder `name`.

        Args:
            name: one part of a path.
            create: make it where it is missing, for this user only whatever the umask, and durably.

        Raises:
            UntrustedOwnerError: see `require_trusted`.
            OSError: it is missing, a link, or no folder.
        """
        flags = _FOLDER | os.O_NOFOLLOW
        try:
            made = False
            try:
                descriptor = os.open(_checked(name), flags, dir_fd=self.fd)
            except FileNotFoundError:
                if not create:
                    raise
                made = _make_folder(name, self.fd)
                descriptor = os.open(name, flags, dir_fd=self.fd)
        except OSError as error:
            raise self._located(error, name) from None
        inner = Directory(descriptor, f"{self.name}/{name}", trust_owner=self.trust_owner)
        inner.require_trusted()
        if made:
            os.fchmod(descriptor, 0o700)
            self.sync()
        return inner

    # -- files in it --------------------------------------------------------------------------------------------

    def open_checked(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> tuple[int, os.stat_result]:
        """As `open_file`, and what the system says of the file."""
        try:
            descriptor = os.open(_checked(name), flags | _SAFE, mode, dir_fd=self.fd)
        except OSError as error:
            raise self._located(error, name) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not an ordinary file", str(self.path_of(name)))
            if not self.trust_owner:
                require_trusted(status, f"{self.name}/{name}")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, status

    def open_file(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """Open the ordinary file `name`; never a link, never waiting for anything.

        Args:
            name: one part of a path.
            flags: of `os.open`.
            mode: of a file that is made; the umask may only take rights away.

        Returns:
            a descriptor, the caller's to close.

        Raises:
            UntrustedOwnerError: see `require_trusted`.
            OSError: it is missing, a link, a folder, a pipe or a device; or what the system refuses.
        """
        return self.open_checked(name, flags, mode)[0]

    def create_file(self, name: str) -> int:
        """Make the file `name`, which must not exist, mode 0600 whatever the umask; a descriptor to read and write."""
        try:
            descriptor = os.open(_checked(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o600, dir_fd=self.fd)
        except OSError as error:
            raise self._located(error, name) from None
        try:
            os.fchmod(descriptor, 0o600)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """The whole file `name`.

        Raises:
            UntrustedOwnerError: see `require_trusted`.
            OSError: as `open_file`; `EFBIG`, where it has more than `max_bytes`.
        """
        descriptor = self.open_file(name)
        with open(descriptor, "rb", buffering=0) as file:
            pieces, left = [], max_bytes + 1
            while left and (piece := file.read(min(left, 2**20))):
                pieces.append(piece)
                left -= len(piece)
        if not left:
            text = f"it has more than the {max_bytes} bytes that such a file may have"
            raise OSError(errno.EFBIG, text, str(self.path_of(name)))
        return b"".join(pieces)

    def write_file(self, name: str, octets: bytes) -> None:
        """Make or replace the file `name`, whole or not at all, durably, mode 0600 whatever the umask."""
        fresh = f".{_checked(name)}.{secrets.token_hex(8)}.new"
        with open(self.create_file(fresh), "wb", buffering=0) as file:
            try:
                rest = memoryview(octets)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                self.rename(fresh, self, name)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.remove(fresh)
                raise
        self.sync()

    # -- names in it --------------------------------------------------------------------------------------------

    def stat(self, name: str) -> os.stat_result | None:
        """What lies under `name`, not what a link leads to; `None` where there is nothing."""
        try:
            return os.stat(_checked(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._located(error, name) from None

    @contextlib.contextmanager
    def scan(self) -> Iterator[Iterator[os.DirEntry[str]]]:
        """What is in it, with what the system says of each, as `os.scandir`."""
        # A descriptor of its own: all that share one (threads, forked processes) share one position in the list.
        descriptor = os.open(".", _FOLDER, dir_fd=self.fd)
        try:
            with os.scandir(descriptor) as entries:
                yield entries
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def scan_sub(self, name: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """As `scan` of `sub(name)`, in fewer steps: a store lists hundreds of folders when it is opened."""
        try:
            descriptor = os.open(_checked(name), _FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        except OSError as error:
            raise self._located(error, name) from None
        try:
            if not self.trust_owner:
                require_trusted(os.fstat(descriptor), f"{self.name}/{name}")
            with os.scandir(descriptor) as entries:
                yield entries
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """The names of all that is in it, sorted."""
        with self.scan() as entries:
            return sorted(entry.name for entry in entries)

    def remove(self, name: str) -> bool:
        """Delete a file, a link (not what it leads to), an empty folder, or nothing.

        Returns:
            whether the name is free now; false: it is a folder that holds something, and was left alone.
        """
        try:
            os.unlink(_checked(name), dir_fd=self.fd)
            return True
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in _IS_FOLDER:
                raise self._located(error, name) from None
            refusal = error
        try:
            os.rmdir(name, dir_fd=self.fd)
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            raise self._located(refusal, name) from None
        except OSError as error:
            if error.errno in _HOLDS_SOMETHING:
                return False
            raise self._located(error, name) from None
        return True

    def make_free(self, name: str) -> str | None:
        """As `remove`; but a folder that holds something is moved aside, in here.

        Returns:
            the name that it has now, or `None` where nothing had to be moved.
        """
        if self.remove(name):
            return None
        aside = f"{name}.aside-{secrets.token_hex(8)}"
        self.rename(name, self, aside)
        return aside

    def rename(self, name: str, to: Directory, new_name: str) -> None:
        """Move `name` to `new_name` in the folder `to`; a file there is replaced."""
        try:
            os.replace(_checked(name), _checked(new_name), src_dir_fd=self.fd, dst_dir_fd=to.fd)
        except OSError as error:
            raise self._located(error, name) from None

    def sync(self) -> None:
        """Make the names in it durable."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            error.filename = self.name
            raise

    # -- its end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of it. May be called more than once; every later use raises `OSError`."""
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"Directory({self.name!r}{', closed' if self.fd < 0 else ''})"

    def _located(self, error: OSError, name: str) -> OSError:
        error.filename = f"{self.name}/{name}"
        return error


def _checked(name: str) -> str:
    """`name`, if it is one part of a path: what leads elsewhere would be looked up without this folder."""
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise OSError(errno.EINVAL, "not the name of something in a folder", name)
    return name


def _make_folder(name: str | Path, within: int | None, mode: int = 0o700) -> bool:
    """Make a folder, by default for this user only, who can use it whatever the umask; whether this call did."""
    try:
        os.mkdir(name, mode, dir_fd=within)
    except FileExistsError:
        return False
    made = stat.S_IMODE(os.stat(name, dir_fd=within, follow_symlinks=False).st_mode)
    if made & 0o700 != 0o700:
        # By its name, for it could not be opened. (What it lies in is ours, or sticky: nobody else can exchange it.)
        os.chmod(name, made | 0o700, dir_fd=within)
    return True
