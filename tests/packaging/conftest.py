"""The project as a user installs it: a wheel in an environment of its own, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


@dataclass(frozen=True)
class Environment:
    """A virtual environment that shares this one's dependencies, and a folder to run commands in.

    Attributes:
        folder: of the environment.
        work: the current directory of every command.
    """

    folder: Path
    work: Path

    def run(self, command: str, *arguments: str | Path, status: int = 0) -> str:
        """Run a program of the environment; its stdout, or stdout and stderr where it is to fail.

        Args:
            command: name of the program in the environment's `bin`.
            arguments: of the program.
            status: that it must end with.
        """
        # (Nothing of the checkout may be on the path.)
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        done = subprocess.run(
            [self.folder / "bin" / command, *map(str, arguments)],
            cwd=self.work,
            env=inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(self.work)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == status, f"{command} {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if status == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of the checkout, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Makes an environment with one thing installed: `make_environment("--editable", path)`."""

    def make(*what: str | Path) -> Environment:
        folder = tmp_path_factory.mktemp("installed")
        work = folder / "work"
        work.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=LIMIT_S)
        python = folder / "venv" / "bin" / "python"
        # The dependencies come from the environment of this test, and torch is not downloaded again. A path in a .pth
        # file does not have its own .pth files read: an editable install of the checkout there stays out.
        shared = sysconfig.get_path("purelib")
        own = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(own.strip()) / "dependencies.pth").write_text(f"{shared}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
        pip += ["--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*pip, *what], capture_output=True, text=True, timeout=LIMIT_S, cwd=work)
        assert done.returncode == 0, done.stdout + done.stderr
        return Environment(folder / "venv", work)

    return make


@pytest.fixture(scope="session")
def installed(built: Path, make_environment: Callable[..., Environment]) -> Environment:
    """The wheel, installed, with a tiny model in `model` and a text in `notes.txt`."""
    found = make_environment(*built.glob("*.whl"))
    save_tiny_model(found.work / "model")
    (found.work / "notes.txt").write_text("The ship leaves at noon, and the captain is Ada. " * 20)
    return found
