"""Which settings, states and requests a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import app
from eval.running.config import RunConfig
from eval.systems import DEFAULT_SYSTEMS, SYSTEMS, Setting


def test_a_system_may_have_a_budget_and_options_of_its_own() -> None:
    config = RunConfig(
        tasks=("sst2",),
        systems=("in_memory", "impress+overlap", "contiguouskv@0.3", "contiguouskv@0.4+exact", "contiguouskv@0.3"),
        budgets=(0.05, 0.1),
    )
    assert config.settings(8192) == [
        Setting("in_memory", 1.0),
        Setting("impress", 0.05, ("overlap",)),
        Setting("impress", 0.1, ("overlap",)),
        Setting("contiguouskv", 0.3),
        Setting("contiguouskv", 0.4, ("exact",)),
    ]


@pytest.mark.parametrize("asked", ["contiguouskv@", "contiguouskv@x", "contiguouskv@0", "contiguouskv@1.5"])
def test_a_budget_that_is_none_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        RunConfig(tasks=("sst2",), systems=(asked,))


def test_unknown_systems_and_options_and_budgets_of_exact_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="system must be one of"):
        RunConfig(tasks=("sst2",), systems=("nothing@0.1",))
    with pytest.raises(ValueError, match="of systems that choose"):
        RunConfig(tasks=("sst2",), systems=("in_memory@0.1",))
    with pytest.raises(
        ValueError,
        match=r"contiguouskv has no option 'overlap': its options are \['exact', 'compact', 'reselect', 'singles'\]",
    ):
        RunConfig(tasks=("sst2",), systems=("contiguouskv+overlap",))


def test_ours_may_choose_again_in_mid_answer() -> None:
    (setting,) = Setting.parse("contiguouskv@0.1+reselect=16", ())
    assert setting.values == {"reselect": "16"}
    assert setting.answers_as() == setting
    for wrong in ("contiguouskv+reselect", "contiguouskv+reselect=0", "contiguouskv+reselect=often"):
        with pytest.raises(ValueError, match="a whole number from 1 must follow reselect="):
            Setting.parse(wrong, (0.1,))


def test_all_rivals_can_be_asked_for_at_once() -> None:
    config = RunConfig(tasks=("sst2",), systems=DEFAULT_SYSTEMS, budgets=(0.25,))
    assert [setting.label for setting in config.settings(8192)] == list(DEFAULT_SYSTEMS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"states": ("tepid",)}, r"state must be one of .*'cold', 'open'.*, got \['tepid'\]"),
        ({"states": ()}, "a run needs a task or a stream, a system and a state"),
        ({"streams": ("rivers",)}, "stream must be one of"),
        ({"budgets": (0.0,)}, "budgets are shares"),
        ({"prefixes": 0}, "prefixes must be 1 at least, got 0"),
        ({"first": -1}, "first must be 0 at least, got -1"),
        ({"judged_share": 1.5}, "judged_share must be from 0 to 1, got 1.5"),
        ({"read_gbps": 0.0}, "read_gbps must be positive, got 0.0"),
        ({"tasks": ("file:nothing.jsonl",)}, r"nothing\.jsonl cannot be read"),
    ],
)
def test_invalid_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"tasks": ("sst2",), "systems": ("in_memory",)} | changes)


def test_two_files_of_one_name_would_be_one_task(tmp_path: Path) -> None:
    tasks = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "my.jsonl"
        path.write_text('{"prefix": "a", "question": "b", "answers": ["c"]}\n')
        tasks.append(f"file:{path}")
    with pytest.raises(ValueError, match=r"two tasks are called 'file:my\.jsonl'"):
        RunConfig(tasks=tuple(tasks), systems=("in_memory",))


@pytest.mark.parametrize(
    ("share", "judged"), [(0.0, []), (0.25, [0, 4]), (0.3, [0, 3, 6]), (0.5, [0, 2, 4, 6]), (1.0, list(range(8)))]
)
def test_a_share_of_a_stream_is_judged(share: float, judged: list[int]) -> None:
    config = RunConfig(streams=("conversations",), systems=("in_memory",), judged_share=share)
    assert [number for number in range(8) if config.is_judged(number)] == judged


def without_frame(output: str) -> str:
    """What an error message says, without the frame around it, wherever its lines were broken."""
    return "".join(output.replace("│", "").split())


def test_mistakes_are_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from eval import models

    monkeypatch.setattr(models, "load_model", lambda *arguments, **options: pytest.fail("a model was loaded"))
    for arguments, message in (
        (["--task", "sst3"], "task must be"),
        (["--system", "impres"], "system must be"),
        (["--stream", "rivers"], "stream must be"),
        (["--state", "tepid"], "state must be one of"),
        (["--system", "impress+fast"], "impress has no option 'fast'"),
        (["--task", "file:nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["--judged-share", "2"], "judged_share must be from 0 to 1"),
        (["--read-gbps", "0"], "read_gbps must be positive"),
        (["--first", "-1"], "first must be 0 at least"),
        (["--prefixes", "0"], "prefixes must be 1 at least"),
        (["--budget", "0"], "budgets are shares"),
        (["--requests", "0"], "requests must be 1"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ):
        result = CliRunner().invoke(app, ["run", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 2
        assert message.replace(" ", "") in without_frame(result.output)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert f"{tmp_path.name}/nothing" in without_frame(result.output)
    listed = CliRunner().invoke(app, ["list"]).output
    assert all(name in listed for name in (*SYSTEMS, "longbench_qasper", "ruler_vt", "conversations", "rouge_l"))


@pytest.mark.parametrize("other", ["exact", "compact", "reselect=8"])
def test_single_tokens_and_what_chooses_chunks_alone_are_refused(other: str) -> None:
    with pytest.raises(ValueError, match=f"singles and {other.partition('=')[0]} do not go together"):
        Setting.parse(f"contiguouskv@0.25+singles=0.75+{other}", ())
    Setting.parse("contiguouskv@0.25+singles=0.75", ())
    Setting.parse(f"contiguouskv@0.25+{other}", ())
