"""Other packages add commands by entry points; the library imports none of them by name."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import typer
from test_cli import run

from hf_contiguouskv.cli import extensions, messages_instead_of_tracebacks
from hf_contiguouskv.errors import InputError

app = typer.Typer()


@app.command()
@messages_instead_of_tracebacks
def greet(name: str) -> None:
    """Greet by name."""
    if name == "nobody":
        raise InputError("there is nobody to greet")
    typer.echo(f"hello {name}")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages: one that works, and one that cannot be imported."""
    module = types.ModuleType("greeting")
    module.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greeting", module)
    found = EntryPoints(
        [
            EntryPoint("greet", "greeting:app", extensions.GROUP),
            EntryPoint("away", "not_installed.commands:app", extensions.GROUP),
            EntryPoint("ls", "greeting:app", extensions.GROUP),
        ]
    )
    monkeypatch.setattr(extensions, "entry_points", lambda **chosen: found.select(**chosen))


def test_a_command_of_another_package_runs_as_one_of_ours() -> None:
    assert run("greet", "Ada").stdout == "hello Ada\n"
    result = run("greet", "nobody")
    assert (result.exit_code, result.stderr) == (2, "contiguouskv: there is nobody to greet\n")


def test_help_lists_it_after_our_own() -> None:
    said = run("--help").stdout
    assert said.index("import") < said.index("greet")
    assert "Greet by name." in said


def test_a_command_that_cannot_be_imported_says_so_in_one_line() -> None:
    result = run("away", "with", "--some", "arguments")
    assert result.exit_code == 2
    assert result.stderr.startswith("contiguouskv: the command away needs not_installed.commands")
    assert result.stderr.count("\n") == 1
    assert "Not available" in run("--help").stdout


def test_our_own_commands_come_first() -> None:
    assert "Store" in run("ls", "--help").stdout or "STORE" in run("ls", "--help").stdout


def test_an_unknown_command_is_a_mistake() -> None:
    assert run("nothing").exit_code == 2
