"""`sparse-attn study cost`: from the command line to the results, and what it concludes from times."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.studies import cost
from sparse_attn.cli import main

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("rich", reason="rich is not installed")


def test_quick(tmp_path, capsys):
    command = ["study", "cost", "--quick", "--threads", "1", "--lengths", "64", "128", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "15.24" in out
    assert "Against dense attention" in out
    file = tmp_path / "study_cost_quick.json"
    result = json.loads(file.read_text())
    assert {(r["method"], r["length"]) for r in result["rows"]} == {
        (m, n) for m in cost.COUNTS for n in (64, 128)
    }
    assert all(r["seconds"] > 0 for r in result["rows"])
    assert result["machine"]["command"] == "sparse-attn study cost --quick --threads 1"
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert main(command) == 0  # all rows are there: nothing is measured again
    assert json.loads(file.read_text())["rows"] == result["rows"]


@pytest.mark.parametrize(("length", "top_k"), [(7, 3), (64, 64), (100, 16), (5, 9)])
def test_random_keys_keep_the_contract(length, top_k):
    indices = cost.random_keys(length, top_k)
    assert indices.shape == (1, cost.HEADS, length, min(top_k, length))
    assert indices.dtype == torch.int32
    for i in range(length):
        row = indices[0, 0, i].tolist()
        kept = [j for j in row if j >= 0]
        assert kept == sorted(set(kept))
        assert max(kept) <= i
        assert len(kept) == min(i + 1, top_k)
        assert row == kept + [-1] * (len(row) - len(kept))


def test_crossover_lies_between_two_lengths():
    assert cost.measured_crossover([(64, 0.5), (256, 2.0)]) == 128
    assert cost.measured_crossover([(64, 2.0), (256, 3.0)]) == 0
    assert cost.measured_crossover([(64, 2.0), (256, 0.9)]) is None


def test_a_measured_line_continued():
    assert cost.continued([(100, 1.0), (200, 2.0), (400, 4.0)], 500.0) == 50_000
    assert cost.continued([(100, 2.0), (200, 2.1), (400, 2.1)], 500.0) is None
    assert cost.continued([(100, 2.0), (200, 4.0)], 500.0) is None
