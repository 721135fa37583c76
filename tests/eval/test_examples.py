"""The example programs answer as plain `generate` does, say what they read, and say clearly what is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model

from eval.models import load_model
from hf_contiguouskv import PrefixStore
from hf_contiguouskv.model.transformers_internals import cache_argument

pytestmark = pytest.mark.skipif(
    cache_argument() != "cache", reason="examples call the cache as transformers 5.24 and later do"
)
ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = "Read this document, then answer the question below with a sentence from it.\n\n"
DOCUMENT = "The door code is 7341. " * 20 + "The cat is called Pickle."
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, and a document that is longer than a chunk by far."""
    folder = tmp_path_factory.mktemp("examples")
    save_tiny_model(folder / "model")
    (folder / "document.txt").write_text(DOCUMENT)
    return folder


def run(folder: Path, program: str, *arguments: str, questions: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run an example with the tiny model, exactly."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "examples" / program), *arguments]
    done = subprocess.run(
        command, input=questions.encode(), capture_output=True, cwd=folder, env=environment, timeout=120, check=False
    )
    assert b"past_key_values" not in done.stderr, "an example uses a name that transformers has deprecated"
    return done


def options(folder: Path, store: str) -> list[str]:
    exact = ["--dtype", "float32", "--budget", "1.0", "--max-new-tokens", str(NEW_TOKENS)]
    return ["document.txt", "--model", str(folder / "model"), "--store", store, *exact]


class Plain:
    """What `generate` answers without any prefix."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_model(str(folder / "model"), dtype=torch.float32)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def first_prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": f"{INSTRUCTION}{DOCUMENT}\n\nQuestion: {question}"}]
        return self.ids(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def answer(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        output = self.model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        return [int(token) for token in output[0, len(prompt) :]]

    def text(self, ids: list[int]) -> Any:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_chat_answers_exactly_and_stores_every_turn(folder: Path) -> None:
    plain = Plain(folder)
    prompt = plain.first_prompt("Which code?")
    first = plain.answer(prompt)
    said = first[:-1] if first[-1] == plain.tokenizer.eos_token_id else first
    follows = "<|im_end|>\n<|im_start|>user\nWhich cat?<|im_end|>\n<|im_start|>assistant\n"
    second = plain.answer(prompt + said + plain.ids(follows))
    done = run(folder, "chat.py", *options(folder, "chat"), questions="Which code?\n\nWhich cat?\n")
    printed = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert f"> Which code?\n{plain.text(first)}\n" in printed
    assert f"> Which cat?\n{plain.text(second)}\n" in printed
    turns = [line for line in printed.splitlines() if line.startswith("[first token after ")]
    assert len(turns) == 2
    assert all("MiB, used" in line and " stored in " in line for line in turns)
    with PrefixStore(folder / "chat") as store:
        for conversation in (prompt + said, prompt + said + plain.ids(follows) + second[:-1]):
            assert store.match(plain.model, torch.tensor(conversation)) == len(conversation)


def test_a_batch_answers_exactly_and_so_do_single_questions(folder: Path) -> None:
    plain = Plain(folder)
    questions = ["Which code?", "What is the cat of this document called?", "Why?"]
    expected = [plain.text(plain.answer(plain.first_prompt(question))).strip() for question in questions]
    (folder / "questions.txt").write_text(f"{questions[1]}\n\n{questions[2]}\n")
    asked = ["--question", questions[0], "--file", "questions.txt", "--rounds", "1", "--json", "numbers.json"]
    done = run(folder, "batch_questions.py", *options(folder, "batch"), *asked)
    assert done.returncode == 0, done.stderr.decode()
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["questions"] == questions
    assert set(numbers["runs"]) == {"one batch", "one after the other"}
    for runs in numbers["runs"].values():
        assert [run["answers"] for run in runs] == [expected]
        assert all(0 < run["first_token_s"] <= run["last_first_token_s"] <= run["seconds"] for run in runs)
        assert all(run["bytes_read"] > 0 for run in runs)
    printed = done.stdout.decode()
    assert "one after the other" in printed
    assert printed.count("the same") == len(questions)


def test_what_one_machine_stores_another_one_finds(folder: Path) -> None:
    pytest.importorskip("obstore")
    options = ["--doc", "document.txt", "--tokens", "400", "--model", str(folder / "model"), "--dtype", "float32"]
    done = run(folder, "two_machines.py", *options)
    assert done.returncode == 0, done.stderr.decode()
    one, two = done.stdout.decode().splitlines()
    assert "400 tokens computed and stored" in one
    assert "1 segments sent, 0 were there" in one
    assert "400 tokens found, 0 computed" in two


def test_the_demo_recomputes_once_and_estimates_what_takes_long(folder: Path) -> None:
    plain = Plain(folder)
    questions = ["Which code?", "Which cat?"]
    expected = {question: plain.text(plain.answer(plain.first_prompt(question), 20)) for question in questions}
    asked = [part for question in questions for part in ("--question", question)]
    model = ["--model", str(folder / "model"), "--store", "demo", "--dtype", "float32"]
    done = run(folder, "demo.py", "--doc", "document.txt", *model, *asked, "--json", "numbers.json")
    printed, bar = " ".join(done.stdout.decode().split()), done.stderr.decode()
    assert done.returncode == 0, bar
    assert "runs in float32 on cpu (as asked)" in printed
    assert re.search(r"compute [0-9,]+ tokens, about ", printed)
    assert re.search(r"10 requests, about .*: about .* to recompute the document for one question", printed)
    assert "median of 2 questions; recompute: timed on one question" in printed
    assert "of about " in bar
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["dtype"] == "float32"
    counts = {name: row["ttft_s"]["count"] for name, row in numbers["systems"].items()}
    assert counts == {name: 1 if name == "recompute" else 2 for name in counts}
    assert len(counts) == 4
    exact = [answer for answer in numbers["answers"] if answer["system"] in ("recompute", "exact re-prefill")]
    assert len(exact) == 3
    for answer in exact:
        assert answer["text"] == " ".join(expected[answer["question"]].split())
    again = run(folder, "demo.py", "--doc", "document.txt", *model, *asked[:2])
    assert "nothing to compute" in again.stdout.decode()
    assert "(one question)" in again.stdout.decode()


def test_what_is_missing_is_named(folder: Path) -> None:
    """All at once: such a call takes no longer than its imports."""
    calls = (
        ("chat.py", ["nowhere.txt"]),
        ("batch_questions.py", ["nowhere.txt"]),
        ("batch_questions.py", options(folder, "batch")),
        ("chat.py", ["document.txt", "--budget", "0"]),
    )
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda call: run(folder, call[0], *call[1]), calls))
    assert [one.returncode for one in done] == [2, 2, 2, 2]
    assert [one.stdout for one in done] == [b"", b"", b"", b""]
    said = [" ".join(one.stderr.decode().split()) for one in done]
    for message in said[:2]:
        assert "nowhere.txt" in message
        assert "does not exist" in message
    assert "--question" in said[2]
    assert "budget is the share of chunks" in said[3]
