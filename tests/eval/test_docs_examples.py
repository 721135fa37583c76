"""Python code in the README, the quick start and the how-to pages runs: offline, on a tiny random model.

Blocks of a page run in order and share their names. A block after a line `<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model

from hf_contiguouskv import PrefixStore
from hf_contiguouskv.model.transformers_internals import cache_argument

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / page for page in ("README.md", "docs/quickstart.md", "docs/fleet.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
TEXT = "The door code is 7341. Ada wrote this in May. " * 12

_BLOCK = re.compile(r"(?P<not_run><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks of a page that run: number of the first line of each, and its code."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start("code")) + 1, block["code"])
        for block in _BLOCK.finditer(text)
        if not block["not_run"]
    ]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would run the code: with the files that it opens."""
    (tmp_path / "docs").mkdir()
    for name in ("notes.txt", "LICENSE"):
        (tmp_path / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(cache_argument() != "cache", reason="pages call the cache as transformers 5.24 and later do")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, folder: Path, tiny_model: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    found = blocks(page)
    assert found, "no code on this page"
    for line, code in found:
        # (Newlines before the code: a traceback then names the line of the page.)
        exec(compile("\n" * (line - 1) + code.replace(MODEL, repr(str(tiny_model))), str(page), "exec"), names)


def test_the_readme_stores_a_prompt_and_finds_it(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if cache_argument() != "cache":
        pytest.skip("pages call the cache as transformers 5.24 and later do")
    ((_, code),) = blocks(ROOT / "README.md")
    exec(code.replace(MODEL, repr(str(tiny_model))), {})
    tokens = [int(number) for number in re.findall(r"\| from disk: (\d+)", capsys.readouterr().out)]
    assert tokens[0] == 0
    assert tokens[1] > len(TEXT) // 2
    with PrefixStore(folder / "kv-store") as store:
        assert store.entries()


def test_the_output_in_the_readme_repeats_the_text() -> None:
    """The answers stand behind the questions in the document, and the second prompt found what both share."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    output = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert output is not None
    lines = [line.split(" | from disk: ") for line in output[1].splitlines()]
    questions = re.findall(r'"(.*?)"', re.findall(r"^for text in (.*):$", text, re.MULTILINE)[0])
    document = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").lower().split())
    assert len(lines) == len(questions) == 2
    for (answer, _), question in zip(lines, questions, strict=True):
        assert f"{question.lower()} {answer.strip().lower()}" in document
    assert int(lines[0][1]) == 0
    # (Of English a token is four to six characters.)
    assert len(document) / 6 < int(lines[1][1]) < len(document) / 4


def test_sizing_computes_the_bytes_of_its_table(folder: Path, tiny_model: Path) -> None:
    """The function of `sizing.md` gives the figures of the table below it, and what a store really holds."""
    page = ROOT / "docs" / "howto" / "sizing.md"
    names: dict[str, Any] = {}
    exec(blocks(page)[0][1].replace(MODEL, repr(str(tiny_model))), names)

    class Config:
        def __init__(self, layers: int, heads: int, head_dim: int) -> None:
            self.num_hidden_layers, self.num_key_value_heads, self.head_dim = layers, heads, head_dim

        def get_text_config(self) -> Config:
            return self

    rows = re.findall(
        r"\| \S+ \((\d+) layers, (\d+) KV heads of (\d+)\) \| [\d.]+ KiB \| ([\d.]+) KiB \|", page.read_text()
    )
    assert len(rows) == 3
    for layers, heads, head_dim, told in rows:
        computed = names["bytes_per_token"](Config(int(layers), int(heads), int(head_dim))) / 1024
        assert float(told) == pytest.approx(computed, rel=0.01)

    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_contiguouskv import ContiguousKVCache

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with PrefixStore(folder / "sized") as store:
        ids = torch.randint(3, 200, (1, 4096))
        ContiguousKVCache(model, ids, store=store).close()
        (entry,) = store.entries()
    expected = names["bytes_per_token"](AutoConfig.from_pretrained(tiny_model), itemsize=4) * 4096
    # Token ids, checksums and alignment come on top.
    assert expected < entry.bytes < 1.2 * expected
