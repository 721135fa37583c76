"""What is installed from the wheel works away from the checkout, and no more is installed than the two packages."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, Environment

from eval.__main__ import EXTRA

# What prints the top-level modules that importing the library brings.
IMPORTED = """
import sys, importlib.util, hf_contiguouskv, hf_contiguouskv.cli, hf_contiguouskv.metrics
print(hf_contiguouskv.__file__)
print(*(name for name in ("eval", "tests", "examples", "contiguouskv_eval") if name in sys.modules))
print(*(name for name in ("eval", "examples") if importlib.util.find_spec(name)))
"""
# Makes every import of what the extra brings fail, except in torch, which asks for some of it.
BLOCKED = """
import sys
from hf_contiguouskv.cli import app
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
for name in [name for name in sys.modules if name.partition(".")[0] in {names}]:
    del sys.modules[name]
sys.argv = ["contiguouskv", *{arguments}]
app()
"""


def test_the_wheel_holds_the_library_and_the_evaluation_package_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "hf_contiguouskv",
        "contiguouskv_eval",
        "hf_contiguouskv-0.1.0.dist-info",
    }
    assert "contiguouskv_eval/time_model/counts.json" in names
    assert "contiguouskv_eval/metrics/modules/kl.py" in names


def test_the_source_distribution_holds_what_its_tests_need(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"eval/__main__.py", "tests/conftest.py", "examples/demo.py", "Makefile", "constraints.txt"} <= names
    assert not any(name.endswith((".pyc", ".safetensors")) for name in names)


def test_importing_the_library_imports_no_evaluation_and_no_tests(installed: Environment) -> None:
    file, imported, top_level = installed.run("python", "-c", IMPORTED).splitlines()
    assert Path(file).is_relative_to(installed.folder)
    assert (imported, top_level) == ("", "")


def test_the_example_of_the_readme_runs(installed: Environment) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "ContiguousKVCache(" in block)
    example, replaced = re.subn(r'"[\w-]+/SmolLM2[\w.-]+"', '"model"', example)
    assert replaced
    (installed.work / "example.py").write_text(example)
    shutil.copy(ROOT / "LICENSE", installed.work)
    first, second = map(int, re.findall(r"from disk: (\d+)", installed.run("python", "example.py")))
    assert first == 0
    assert second > 0


def test_the_command_looks_after_a_store(installed: Environment) -> None:
    said = installed.run("contiguouskv", "--help")
    assert all(name in said for name in ("ls", "info", "warm", "verify", "export", "bench", "calibrate", "eval"))
    store = installed.work / "warmed"
    warm = json.loads(installed.run("contiguouskv", "warm", store, "notes.txt", "--model", "model", "--json"))
    assert warm["files"][0]["tokens_computed"] > 0
    (entry,) = json.loads(installed.run("python", "-m", "hf_contiguouskv", "ls", store, "--json"))
    assert entry["key"] in installed.run("contiguouskv", "info", store, entry["key"])


def test_a_short_evaluation_runs_and_is_reported(installed: Environment) -> None:
    assert "needle" in installed.run("contiguouskv", "eval", "list")
    size = ["--requests", "1", "--timed-requests", "1", "--budget", "0.25", "--model", "model"]
    systems = ["--system", "in_memory", "--system", "contiguouskv"]
    installed.run("contiguouskv", "eval", "run", "run", "--task", "needle_multikey", *size, *systems)
    assert json.loads((installed.work / "run" / "config.json").read_text())["command"].startswith(
        "contiguouskv eval run"
    )
    installed.run("contiguouskv", "eval", "report", "run", "--out", "report")
    assert (installed.work / "report" / "report.md").stat().st_size > 0


def test_metrics_are_loaded_by_path(installed: Environment) -> None:
    program = """
import evaluate
from contiguouskv_eval.metrics import metric_path
print(evaluate.load(metric_path("exact_match")).compute(predictions=["a", "b"], references=[["a"], ["c"]]))
"""
    assert "0.5" in installed.run("python", "-c", program)


def test_bench_measures(installed: Environment) -> None:
    size = ["--prefix-tokens", "256", "--suffix-tokens", "16", "--requests", "1"]
    said = installed.run("contiguouskv", "bench", "--model", "model", *size, "--out", "bench")
    assert "speed-up over reload" in said
    assert (installed.work / "bench" / "report.md").stat().st_size > 0


def test_calibrate_names_a_share(installed: Environment) -> None:
    line = {"prefix": "A town with a river. " * 40, "question": " Is there a river?", "answers": ["yes"]}
    (installed.work / "my.jsonl").write_text(json.dumps(line) + "\n")
    said = installed.run("contiguouskv", "calibrate", "--questions", "my.jsonl", "--model", "model", "--budget", "0.5")
    assert "KL at the answer" in said
    assert "budget=" in said


def test_a_missing_extra_is_one_line(installed: Environment) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.split(r"[><=~]", one)[0].replace("-", "_") for one in extras["eval"]}
    assert wanted == {name.replace("markdown_it", "markdown_it_py") for name in EXTRA}
    program = BLOCKED.format(names=EXTRA, arguments=["eval", "report", "run"])
    said = installed.run("python", "-c", program, status=2)
    assert "Traceback" not in said
    # (Packages that are imported may say something before.)
    assert said.splitlines()[-1].startswith(
        "contiguouskv eval needs the extra 'eval' (pip install 'hf-contiguouskv[eval]')"
    )


def test_an_editable_install_has_the_same_commands(make_environment: Callable[..., Environment]) -> None:
    editable = make_environment("--editable", ROOT)
    assert "needle" in editable.run("contiguouskv", "eval", "list")
    assert "first token" in editable.run("contiguouskv", "--help")
    program = "import eval, hf_contiguouskv; print(eval.__file__, hf_contiguouskv.__file__)"
    assert editable.run("python", "-c", program).count(str(ROOT)) == 2
