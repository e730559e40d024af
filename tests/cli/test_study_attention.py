"""`sparse-attn study attention`: from the command line to the results in miniature, and its indexed attention."""

from __future__ import annotations

import pytest
import torch

from benchmarks.studies import attention
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
