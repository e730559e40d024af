"""`sparse-attn study combined`: from the command line to the results in miniature, and its arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.studies import combined, results
from tests.helpers.studies import in_miniature, refuses_other_settings, words

for package in ("matplotlib", "rich", "scipy", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

TINY = combined.Settings(
    vocabulary=400, budget=4, lengths=(32, 64), rounds=3, length=32, tokens=64, steps=4, seeds=2, held_out=128
)


@pytest.mark.torch_defaults
def test_in_miniature(tmp_path, capsys):
    result, arguments = in_miniature(combined, TINY, tmp_path, "--text", *words(tmp_path))
    printed = capsys.readouterr().out
    for arm in combined.ARMS:
        assert arm in printed
    steps = [r for r in result["rows"] if r["test"] == "step"]
    assert len(steps) == 2 * 4
    assert len(result["rows"]) == len(steps) + 2 * 4
    table = {r["arm"]: r["table"] for r in steps}
    assert table["neither"] == table["top-k"] > 3 * table["both"]
    assert table["both"] == table["planned widths"]
    losses = {(r["arm"], r["seed"]): r["loss"] for r in result["rows"] if r["test"] == "loss"}
    assert len(set(losses.values())) == 8  # every arm is another model
    assert result["machine"]["command"].endswith("--text 0.txt")
    refuses_other_settings(combined, TINY, arguments)


def test_arithmetic(tmp_path):
    found = results.Results(tmp_path / "x.json", "command", 1)
    times = {"neither": [8.0, 16.0], "top-k": [4.0, 8.0], "planned widths": [4.0, 8.0], "both": [1.0, 4.0]}
    nats = {"neither": [5.0, 6.0], "top-k": [5.1, 6.1], "planned widths": [5.2, 6.2], "both": [5.3, 6.5]}
    for arm in combined.ARMS:
        found.rows.append({"test": "step", "arm": arm, "length": 32, "step_ms": times[arm]})
        found.rows += [{"test": "loss", "arm": arm, "seed": i, "loss": x} for i, x in enumerate(nats[arm])]
    assert combined.speed_ups(found, "both", 32) == [8.0, 4.0]
    assert combined.over_product(found, 32).mean == pytest.approx((2 + 1) / 2)
    settings = combined.Settings(seeds=2)
    assert combined.gaps(found, "both", settings) == pytest.approx([0.3, 0.5])
    assert combined.over_sum(found, settings).mean == pytest.approx((0.0 + 0.2) / 2)
