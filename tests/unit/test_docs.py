"""What the docs name exists, and what exists is named: errors, commands, options, paths, targets of make."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hf_contiguouskv import errors
from hf_contiguouskv.cli import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_contiguouskv"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "report.md"),
]
# Programs of others that are run by `python -m`.
FOREIGN_MODULES = {"build", "pip"}
# Commands of the evaluation package: they have their own --help.
OF_THE_EVALUATION = {"bench", "eval"}

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def public_errors() -> list[str]:
    return [
        name
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, Exception) and not name.startswith("_")
    ]


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    missing = [name for name in public_errors() if f"| `{name}` |" not in text]
    assert not missing, "docs/troubleshooting.md says what each error means and what to do"


def test_every_command_and_option_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert re.search(rf"^\| `{name}\b", text, re.MULTILINE), name
        for parameter in () if name in OF_THE_EVALUATION else command.params:
            for option in (option for option in parameter.opts if option.startswith("--") and option != "--help"):
                assert option in text, f"{name} {option}"
    for parameter in group.params:
        assert any(option in text for option in parameter.opts), parameter.name


@page_of
def test_paths_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for token in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        first = token.split("/")[0]
        if not (
            "/" in token and (token.endswith("/") or Path(token).suffix in {".py", ".md", ".json", ".sh", ".ipynb"})
        ):
            continue
        if not ((ROOT / first).is_dir() or (PACKAGE / first).is_dir()):
            continue  # (A path in a store or a run.)
        if not any((place / token).exists() for place in (ROOT, PACKAGE, page.parent, ROOT / "tests")):
            missing.append(token)
    assert not missing


@page_of
def test_targets_of_make_that_a_page_names_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@page_of
def test_modules_that_a_page_runs_exist(page: Path) -> None:
    named = set(re.findall(r"python3? -m ([\w.]+\w)", page.read_text(encoding="utf-8"))) - FOREIGN_MODULES
    # (An installed `eval` is called `contiguouskv_eval`.)
    sources = {re.sub(r"^contiguouskv_eval\b", "eval", name) for name in named}
    assert not [name for name in sources if importlib.util.find_spec(name) is None]


def test_files_for_services_are_valid_yaml() -> None:
    files = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 5
    for file in files:
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file


def test_the_citation_has_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@page_of
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target}
    missing = {target for target in targets if target and not (page.parent / target).exists()}
    assert missing == set()
