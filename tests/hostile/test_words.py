"""Words that strangers chose reach no terminal, log or error message raw, and no message is seven megabytes long."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tally import Figures
from typer.testing import CliRunner, Result
from unit.store_helpers import some_tokens, write_prefix

from hf_contiguouskv import errors, metrics
from hf_contiguouskv.cli import app
from hf_contiguouskv.cli import output as cli_output
from hf_contiguouskv.errors import ContiguousKVError, InputError, SegmentCorruptError, StoreError, StoreFullError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.format import parse_header
from hf_contiguouskv.wording import escaped, quoted, shown

# What turns a terminal or a log into something else: a window's name, an erased screen, a forged line, a return to the
# beginning of the line, a backspace, a reversed direction of writing, a line separator, a byte that is no text, an
# escape in 8 bits.
RAW = {
    "window title": "\x1b]0;pwned\x07",
    "erased screen": "\x1b[2J",
    "forged line": "\nWARNING all is well",
    "return": "\rall is well",
    "backspace": "\b\b\b",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "line separator": "\u2028x",
    "no text": "\udcff",
    "8-bit escape": "\x9b2J",
    "nothing": "\x00",
    "invisible": "\u200b\ufeff",
}
HARMLESS = "é ü 漢字 🙂 'quoted' \\x1b"
LONG = 7 * 2**20


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def clean(text: str) -> bool:
    return text.isprintable()


# -- words ----------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=())), st.integers(40, 300))
def test_what_is_shown_is_one_short_printable_line(words: str, limit: int) -> None:
    found = shown(words, limit)
    assert clean(found)
    assert len(found) <= limit
    assert shown(found, limit) == found
    found.encode()
    assert clean(quoted(words, limit))
    assert len(quoted(words, limit)) <= limit
    if clean(words) and len(words) <= limit:
        assert found == words


def test_what_was_cut_says_how_long_it_was() -> None:
    assert shown("x" * 201) == "x" * 182 + "… (201 characters)"
    assert shown("x" * 200) == "x" * 200
    assert quoted("x" * 5000).endswith("… (5,000 characters)")
    assert quoted(b"x" * 5000).endswith("… (5,000 bytes)")
    assert len(quoted([["x" * 5000] * 5000] * 5000)) <= 200
    assert shown(HARMLESS) == escaped(HARMLESS) == HARMLESS


# -- errors ---------------------------------------------------------------------------------------------------------


def error_types() -> Iterator[type[ContiguousKVError]]:
    waiting = [ContiguousKVError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        yield kind


@pytest.mark.parametrize("name", RAW)
def test_no_error_carries_raw_words(name: str, attacks: Figures) -> None:
    kinds = set(error_types())
    assert {errors.StoreError, errors.SegmentCorruptError, errors.SegmentReadError, StoreFullError} <= kinds
    for kind in kinds:
        error = kind(f"a file says {RAW[name]} and {HARMLESS}")
        assert clean(str(error)), kind
        assert HARMLESS in str(error)
        assert clean(str(kind(ValueError(RAW[name])))), kind
    full = StoreFullError(28, f"{RAW[name]}")
    assert full.errno == 28
    assert clean(str(full))
    attacks.add("words in an error escaped")


def test_no_error_is_long(attacks: Figures) -> None:
    error = SegmentCorruptError("x" * LONG, None)
    assert len(str(error)) <= 2000
    assert str(error).endswith(f"… ({LONG:,} characters)")
    again = pickle.loads(pickle.dumps(InputError("\x1b" + "x" * LONG)))
    assert clean(str(again))
    assert len(str(again)) <= 2000
    attacks.add("long message cut")


# -- logs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a handler of the application gets to write."""
    stream, logger = io.StringIO(), logging.getLogger("hf_contiguouskv")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", RAW)
def test_no_record_carries_raw_words(name: str, log: io.StringIO, attacks: Figures) -> None:
    logger, words = logging.getLogger("hf_contiguouskv"), RAW[name]
    logger.warning(f"in the message: {words}")
    logger.warning("in arguments: %s %d %.1f %s", words, 7, 0.5, ValueError(words))
    logger.warning("by name: %(what)s", {"what": Path(f"/{words}".replace("\x00", "0"))})
    lines = log.getvalue().split("\n")
    assert len(lines) == 4
    assert lines[-1] == ""
    assert lines[1].startswith("in arguments: ")
    assert " 7 0.5 " in lines[1]
    assert all(map(clean, lines))
    attacks.add("words in a log escaped")


def test_no_record_is_long(log: io.StringIO) -> None:
    logging.getLogger("hf_contiguouskv").warning("%s", OSError("x" * LONG))
    assert len(log.getvalue()) < 2100


def test_a_traceback_forges_no_line(log: io.StringIO, attacks: Figures) -> None:
    try:
        raise ValueError("\nWARNING:forged\x1b[2J")
    except ValueError:
        logging.getLogger("hf_contiguouskv").exception("it failed")
    first, *rest = log.getvalue().rstrip("\n").split("\n")
    assert first == "it failed"
    assert len(rest) > 2
    assert all(line.startswith("  ") and clean(line) for line in rest)
    attacks.add("log line not forged")


# -- segments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["fingerprint", "root", "parent", "num_tokens", "dtype", "checksum", "leader_layers"])
def test_a_header_that_says_megabytes_is_refused_in_a_sentence(store_path: Path, field: str, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        segment = write_prefix(store, some_tokens(9)).spans[0].segment
        text = segment.header.encoded[8:].rstrip(b" ")
    content = json.loads(text)
    for words in ("\x1b[2J\n" * 10**6, ["x" * 1000] * 1000, {"a": {"b": "x" * LONG}}):
        content["__metadata__"] |= {"checksum": "0" * 16, field: words}
        header = json.dumps(content, separators=(",", ":")).encode()
        digest = f'"checksum":"{xxhash.xxh3_64_hexdigest(header)}"'.encode()
        header = header.replace(b'"checksum":"0000000000000000"', digest)  # As it must be, but for the field itself.
        with pytest.raises(StoreError) as caught:
            parse_header(header, 2**30, "the file")
        assert "checksum" not in str(caught.value) or field == "checksum"
        assert clean(str(caught.value))
        assert len(str(caught.value)) <= 1000
    attacks.add("header of megabytes refused in a sentence")


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RAW if name != "nothing"])
def test_the_command_prints_no_raw_words(name: str, tmp_path: Path, attacks: Figures) -> None:
    words = RAW[name]
    store = tmp_path / f"store {words}"
    with PrefixStore(store) as opened:
        write_prefix(opened, some_tokens(9))
    for command in ("ls", "info", "verify", "gc"):
        result = run(command, store)
        assert result.exit_code == 0
        assert all(map(clean, result.stdout.split("\n")))
        found = json.loads(run(command, store, "--json").stdout)
        json.dumps(found, ensure_ascii=False).encode()  # (No half of a character, which UTF-8 lacks.)
    for arguments in (
        ("info", store, words),
        ("rm", store, words),
        ("ls", tmp_path / words),
        ("import", store, tmp_path / words),
        ("import", store, f"hf://{words}"),
        ("gc", store, "--unused-for", words),
        ("warm", store, tmp_path / words),
        (f"no command {words}",),
        ("ls", store, f"--no-option-{words}"),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2), arguments
        assert all(map(clean, (result.stdout + result.stderr).split("\n"))), arguments
        assert "WARNING all is well" not in result.stderr.split("\n")
    attacks.add("words on a terminal escaped")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_path_that_is_no_text_is_printed(tmp_path: Path, attacks: Figures) -> None:
    store = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    with PrefixStore(store) as opened:
        write_prefix(opened, some_tokens(9))
    assert "\\udcff\\udcfe" in run("info", store).stdout
    found = json.loads(run("info", store, "--json").stdout)
    found["path"].encode()
    attacks.add("path that is no text printed")


def test_cells_of_tables_are_taken_literally(capsys: pytest.CaptureFixture[str]) -> None:
    table = cli_output.columns("name", "words")
    table.add_row("[bold]x[/bold]", "\x1b[2J\nforged")
    cli_output.show(table)
    cli_output.show(cli_output.facts({"name": "[link=http://x]y[/link]\x1b]0;t\x07"}))
    cli_output.say("a\nb\x1b")
    lines = capsys.readouterr().out.split("\n")
    assert all(map(clean, lines))
    assert [line.strip() for line in lines] == [
        "name            words",
        "[bold]x[/bold]  \\x1b[2J\\nforged",
        "name  [link=http://x]y[/link]\\x1b]0;t\\x07",
        "a\\nb\\x1b",
        "",
    ]


@pytest.mark.parametrize("name", RAW)
def test_a_scrape_does_not_fail_for_a_label(name: str, store_path: Path, attacks: Figures) -> None:
    registry = CollectorRegistry(auto_describe=True)
    with PrefixStore(store_path) as store:
        metrics.register(store, registry, {"store": f"kv {RAW[name]}"})
        store.inner.counters.add(f"passed_over.{RAW[name]}")
        text = generate_latest(registry).decode()
    values = [sample.labels for family in text_string_to_metric_families(text) for sample in family.samples]
    assert values
    assert all(labels["store"].startswith("kv ") for labels in values)
    attacks.add("label that does not fail a scrape")
