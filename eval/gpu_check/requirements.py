"""`python -m eval.gpu_check.requirements`: checks the versions of installed packages without importing them."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def unmet(requirements: Iterable[str]) -> list[str]:
    """The `requirements` (as in a project's metadata) that are missing or have another version, in words."""
    found = []
    for text in requirements:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{need.name} is not installed, {need.specifier or 'any version'} is needed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            found.append(f"{need.name} {version} is installed, {need.specifier} is needed")
    return found


def main() -> int:
    """Print what is installed and what is missing; returns 1 if something is missing."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    print(f"Python {sys.version.split()[0]}, {project['requires-python']} is needed")
    missing = [f"for this project: {one}" for one in unmet(project["dependencies"])]
    try:
        needs = importlib.metadata.requires("transformers") or []
        missing += [f"for transformers {importlib.metadata.version('transformers')}: {one}" for one in unmet(needs)]
    except importlib.metadata.PackageNotFoundError:
        pass  # Already reported.
    for text in project["dependencies"]:
        name = Requirement(text).name
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is missing")
    for line in missing:
        print(line)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
