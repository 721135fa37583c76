"""Run the contract tests on other releases of transformers than the installed one.

    python scripts/compat.py 5.20.0 5.23.0            # all contract tests on each
    python scripts/compat.py --short 5.20.0           # the short form that CI runs
    python scripts/compat.py --check                  # is there a newer release than the newest tested one?

Each release is installed into its own folder (`.cache/compat`), together with requirements that the environment lacks.
While the tests run, this folder comes before the environment on the path.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "compat"
# The tests that depend on transformers most: internals, both modes, other caches, and every way to reuse a cache.
SHORT = (
    "test_internals.py",
    "test_used_caches.py",
    "test_plain.py",
    "test_other_caches.py",
    "test_adapters.py",
    "test_threads.py",
    "test_placed_text.py",
    "test_passed_over.py",
    "test_voters.py",
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def tested() -> Version:
    """The newest release on which all tests run: the pinned one."""
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None, "constraints.txt pins no transformers"
    return Version(pinned[1])


def installed_beside(release: str) -> Path:
    """The folder with this release of transformers, and with the requirements that the environment lacks."""
    folder = FOLDER / f"transformers-{release}"
    if not (folder / "complete").exists():
        subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", folder, f"transformers=={release}"], check=True)
        lacking = [str(need) for need in _needs(folder) if not _is_there(need)]
        if lacking:
            print(f"transformers {release} also needs {', '.join(lacking)}", flush=True)
            subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", folder, *lacking], check=True)
        (folder / "complete").touch()
    return folder


def _needs(folder: Path) -> list[Requirement]:
    (metadata,) = importlib.metadata.distributions(name="transformers", path=[str(folder)])
    needs = [Requirement(text) for text in metadata.requires or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _is_there(need: Requirement) -> bool:
    try:
        return need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def newest_release() -> Version | None:
    """The newest release in the package registry; `None` if the registry does not answer."""
    asked = subprocess.run([*PIP, "index", "versions", "transformers"], check=False, capture_output=True, text=True)
    found = re.search(r"\(([0-9][^)]*)\)", asked.stdout)
    return Version(found[1]) if found else None


def main(
    releases: Annotated[list[str] | None, typer.Argument(help="Releases of transformers.")] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Run only the tests that depend on transformers most.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Report whether a release is newer than the tested one.")
    ] = False,
    workers: Annotated[str, typer.Option(help="pytest -n.")] = "auto",
) -> None:
    """Run the contract tests on other releases of transformers."""
    if check:
        newest = newest_release()
        if newest is None:
            print(f"transformers: the registry does not answer; the newest tested release is {tested()}")
        elif newest > tested():
            print(f"NOTE: transformers {newest} is out, and {tested()} is the newest that was tested: run\n")
            print(f"    make compat COMPAT={newest}\n\nand raise the pin in constraints.txt once it passes.")
        else:
            print(f"transformers {tested()} is tested, and nothing newer is out.")
    tests = ROOT / "tests" / "contract"
    chosen = [str(tests / name) for name in SHORT] if short else [str(tests)]
    failed = []
    for release in releases or []:
        folder = installed_beside(release)
        print(f"\n=== contract tests{' (short)' if short else ''} on transformers {release}", flush=True)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pytest", "-n", workers, "--dist", "loadgroup", *chosen]
        environment = os.environ | {"PYTHONPATH": path, "EXPECTED_TRANSFORMERS": release}
        if subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode:
            failed.append(release)
    if failed:
        print(f"failed on transformers {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
