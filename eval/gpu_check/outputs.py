"""Limits on the output: few files, none too large, with plain names."""

from __future__ import annotations

import re
from pathlib import Path

MOST_FILES = 8
# Sixteen million bytes, less room for a header or a note.
LARGEST_FILE = 15_500_000
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")


def tidy(out: Path) -> list[str]:
    """Bring a folder of results within the limits.

    Unfinished files are deleted. Too long text loses its middle; other files that are too large are deleted.

    Returns:
        The changes and remaining violations, in words.
    """
    done = []
    for path in sorted(out.iterdir()):
        if path.suffix == ".part":
            path.unlink()
        elif path.is_file() and path.stat().st_size > LARGEST_FILE:
            if path.suffix == ".txt":
                _shorten(path)
                done.append(f"{path.name}: the middle was left out")
            else:
                done.append(f"{path.name}: removed, {path.stat().st_size} bytes")
                path.unlink()
    names = [path.name for path in out.iterdir()]
    if len(names) > MOST_FILES:
        done.append(f"there are {len(names)} files, more than {MOST_FILES}: {', '.join(sorted(names))}")
    done += [f"{name!r} is no plain name" for name in names if not _PLAIN.fullmatch(name)]
    return done


def _shorten(path: Path) -> None:
    content = path.read_bytes()
    half = LARGEST_FILE // 2 - 100
    note = f"\n... {len(content) - 2 * half} bytes are left out here ...\n".encode()
    path.write_bytes(content[:half] + note + content[-half:])
