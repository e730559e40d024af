"""`sparse-attn study attention`: from the command line to the results in miniature, and its indexed attention."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks.studies import attention
from sparse_attn.cli.console import UsageError
from sparse_attn.nn import TopKAttention
from tests.helpers.studies import in_miniature, refuses_other_settings, words

for package in ("matplotlib", "rich", "scipy", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

TINY = attention.Settings(
    vocabulary=400,
    lengths=(32,),
    budgets=(4, 8),
    tokens=64,
    steps=6,
    rates=(1e-3, 1e-2),
    seeds=2,
    held_out=128,
)


@pytest.mark.slow
@pytest.mark.torch_defaults
def test_in_miniature(tmp_path, capsys):
    result, arguments = in_miniature(attention, TINY, tmp_path, "--text", *words(tmp_path))
    printed = capsys.readouterr().out
    for arm in ("top-k 4", "top-k 8", "indexer 8", "top-k 4 + mean", "top-k 4 + blocks", "annealed 4"):
        assert arm in printed
    # Two rates of the dense arm; two seeds of equal steps, and for all but dense equal time.
    assert len(result["rows"]) == 2 + 2 * (7 + 6)
    assert {r["steps"] for r in result["rows"] if r["rule"] == "equal steps"} == {6}
    refuses_other_settings(attention, TINY, arguments)


@pytest.mark.slow
@pytest.mark.torch_defaults
def test_one_piece_and_then_another(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    attention.configure(parser)
    common = ["--quick", "--threads", "1", "--out", str(tmp_path), "--text", *words(tmp_path), "--seeds", "1"]

    def run(*options: str) -> dict:
        assert attention.execute(parser.parse_args([*common, *options]), TINY) == 0
        return json.loads((tmp_path / "study_attention_quick.json").read_text())

    first = run("--arms", "annealed 4", "--rules", "equal time")
    assert {r["arm"] for r in first["rows"]} == {"dense", "annealed 4"}
    assert list(first["about"]["step_ms"]["32"]) == ["dense", "annealed 4"]
    assert len(first["tables"]) == 1  # nothing to hold against plain top-k yet
    second = run("--arms", "top-k 4", "--rules", "equal time", "--lengths", "32")
    assert second["rows"][: len(first["rows"])] == first["rows"]
    times = second["about"]["step_ms"]["32"]
    assert {k: times[k] for k in ("dense", "annealed 4")} == first["about"]["step_ms"]["32"]
    over = {r["arm"]: r["loss"] for r in second["rows"]}
    (row,) = second["tables"][1]["rows"]
    assert row == ["annealed 4", "32", "", f"{over['annealed 4'] - over['top-k 4']:.4f} (one run)"]
    for wrong in (["--arms", "top-k 5"], ["--lengths", "33"]):
        with pytest.raises(UsageError, match="must be among"):
            attention.execute(parser.parse_args([*common, *wrong]), TINY)


def test_a_budget_that_falls():
    assert [attention.annealed(16, 2048, p) for p in (0.0, 0.25, 0.5, 1.0)] == [256, 64, 16, 16]
    assert attention.annealed(64, 256, 0.0) == 64  # an eighth of the window is less


@pytest.mark.parametrize("tail", attention.TAILS)
def test_tailed_attention(tail):
    dense, tailed = TopKAttention(32, 4, None), attention.TailedAttention(32, 4, 200, tail)
    tailed.load_state_dict(dense.state_dict())
    hidden = torch.randn(2, 200, 32)  # of more than a block of the tail
    torch.testing.assert_close(tailed(hidden), dense(hidden))
    tailed.top_k = dense.top_k = 4  # now the tail counts
    assert (tailed(hidden) - dense(hidden)).abs().max() > 1e-3


def test_indexed_attention():
    dense, indexed = TopKAttention(32, 4, None), attention.IndexedAttention(32, 4)
    indexed.load_state_dict(dense.state_dict(), strict=False)
    hidden = torch.randn(2, 20, 32, requires_grad=True)
    want = dense(hidden)
    torch.testing.assert_close(indexed(hidden), want)
    for budget in (None, 6):  # the indexers learn, and nothing else does from their loss
        indexed.top_k = budget
        indexed.zero_grad()
        indexed(hidden)
        indexed.indexer_loss.backward()
        assert hidden.grad is None
        assert indexed.qkv.weight.grad is None
        assert indexed.indexer.key.weight.grad.abs().sum() > 0
    assert (indexed(hidden) - want).abs().max() > 1e-4
    indexed.top_k = 20
    torch.testing.assert_close(indexed(hidden), want)
