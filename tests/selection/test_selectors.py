"""Selectors choose what their functions choose, and `attend` attends to what any of them returns."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import qkv

import sparse_attn
from sparse_attn.selection import (
    Blocks,
    Exact,
    FromIndexer,
    LowRank,
    Refined,
    Rounded,
    Rule,
    Selection,
    Selector,
    attend,
    select_and_attend,
)

QUERY, KEY, VALUE = qkv(2, 4, 2, 300, 300, 16, 16)
CAUSAL = Rule(is_causal=True)
KEPT = Rule(is_causal=True, window=4, sinks=2, share="kv")


def scorer():
    return sparse_attn.nn.LowRankScorer(2, 16, 8).calibrate(QUERY, KEY).fit()


def index():
    query, key, _ = qkv(2, 6, 2, 300, 300, 8, 8)
    return query, key, query[..., 0].abs()


class Mine:
    def select(self, query, key, top_k, rule):
        return Selection(sparse_attn.topk_select(query, key, top_k, **rule.arguments()))


def test_each_is_its_function():
    assert torch.equal(
        Exact().select(QUERY, KEY, 16, KEPT).indices,
        sparse_attn.topk_select(QUERY, KEY, 16, **KEPT.arguments()),
    )
    assert torch.equal(
        Rounded().select(QUERY, KEY, 16, KEPT).indices,
        sparse_attn.quantized_select(QUERY, KEY, 16, **KEPT.arguments()),
    )
    low_rank = scorer()
    assert torch.equal(
        LowRank(low_rank).select(QUERY, KEY, 16, KEPT).indices,
        low_rank.select(QUERY, KEY, 16, **KEPT.arguments()),
    )
    query, key, weights = index()
    assert torch.equal(
        FromIndexer(query, key, weights).select(QUERY, KEY, 16, KEPT).indices,
        sparse_attn.indexer_select(query, key, weights, 16, is_causal=True, window=4, sinks=2),
    )
    blocks = Blocks().select(QUERY, KEY, 192, CAUSAL)
    assert (blocks.block_size, blocks.query_tile) == (64, 64)
    assert torch.equal(blocks.indices, sparse_attn.block_select(QUERY, KEY, 3, is_causal=True))
    many = sparse_attn.block_select(QUERY, KEY, 4, is_causal=True)
    assert torch.equal(
        Refined(factor=4).select(QUERY, KEY, 64, CAUSAL).indices,
        sparse_attn.refine_blocks(QUERY, KEY, many, 64, is_causal=True),
    )


@pytest.mark.parametrize(
    "selector",
    [Exact(), Rounded(), LowRank(scorer()), FromIndexer(*index()), Blocks(), Refined(), Mine()],
    ids=lambda s: type(s).__name__,
)
def test_attention_to_a_selection(selector):
    """The two stages apart and together, with gradients."""
    assert isinstance(selector, Selector)
    top_k = 192 if isinstance(selector, (Blocks, Refined)) else 16
    leaves = [t.clone().requires_grad_() for t in (QUERY, KEY, VALUE)]
    selection = selector.select(QUERY, KEY, top_k, CAUSAL)
    out, lse = attend(*leaves, selection, rule=CAUSAL, return_lse=True)
    assert out.shape == QUERY.shape
    assert lse.shape == QUERY.shape[:3]
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    together = select_and_attend(QUERY, KEY, VALUE, top_k, selector, CAUSAL)
    torch.testing.assert_close(together, out.detach())


def test_the_fused_path_is_topk_attention():
    together = select_and_attend(QUERY, KEY, VALUE, 16, Exact(), KEPT)
    assert torch.equal(together, sparse_attn.topk_attention(QUERY, KEY, VALUE, 16, **KEPT.arguments()))


def test_the_tail_is_that_of_the_function():
    want = sparse_attn.topk_attention_with_residual(QUERY, KEY, VALUE, 16, is_causal=True, sinks=2)
    rule = Rule(is_causal=True, sinks=2)
    assert torch.equal(select_and_attend(QUERY, KEY, VALUE, 16, Exact(), rule, tail="mean"), want)


def test_the_modules_take_selectors():
    torch.manual_seed(0)
    hidden = torch.randn(2, 40, 32)
    exact = sparse_attn.nn.TopKAttention(32, 4, 8, num_kv_heads=2)
    indexer = sparse_attn.nn.Indexer(32, 2, 8)
    for selector in (Mine(), Rounded(), indexer):
        other = sparse_attn.nn.TopKAttention(32, 4, 8, num_kv_heads=2, selector=selector)
        other.load_state_dict(exact.state_dict(), strict=False)
        out = other(hidden)
        out.sum().backward()
        assert torch.equal(out, exact(hidden)) == isinstance(selector, Mine)
    query, key, value = exact.split_heads(exact.qkv(hidden))
    indices = indexer.select(hidden, 8)
    want = sparse_attn.gathered_attention(query, key, value, indices).transpose(1, 2).flatten(2)
    torch.testing.assert_close(other(hidden), exact.out(want))
    assert any(name.startswith("token_selector.") for name in other.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Selection([1]), TypeError, "indices must be an int32 tensor"),
        (lambda: Selection(torch.zeros(1, 1, 1, 1), 0), ValueError, "block_size must be at least 1"),
        (lambda: Selection(torch.zeros(1, 1, 1, 1), query_tile=2), ValueError, "query_tile needs a block_size"),
        (lambda: Rounded(bits=4), ValueError, "bits must be 8"),
        (lambda: Blocks(block_size=0), ValueError, "block_size must be at least 1"),
        (lambda: Blocks(query_tile="a"), TypeError, "query_tile must be an int"),
        (lambda: Refined(factor=0), ValueError, "factor must be at least 1"),
        (lambda: Refined(blocks=3), TypeError, "blocks must be a Blocks selector, got 3"),
        (lambda: LowRank(3), TypeError, "scorer must be a sparse_attn.nn.LowRankScorer, got 3"),
        *(
            (lambda s=s: s.select(QUERY, KEY, 192, None), TypeError, "rule must be a sparse_attn.selection.Rule")
            for s in (Exact(), Rounded(), LowRank(scorer()), FromIndexer(*index()), Blocks(), Refined())
        ),
        (
            lambda: select_and_attend(QUERY, KEY, VALUE, 8, Exact(), {"is_causal": True}),
            TypeError,
            "rule must be a sparse_attn.selection.Rule",
        ),
        (lambda: Blocks().select(QUERY, KEY, 100, CAUSAL), ValueError, "a multiple of block_size=64"),
        (lambda: Blocks().select(QUERY, KEY, 192, KEPT), ValueError, "know of a rule only"),
        (lambda: attend(QUERY, KEY, VALUE, 3), TypeError, "selection must be"),
        (
            lambda: attend(QUERY, KEY, VALUE, Blocks().select(QUERY, KEY, 192, CAUSAL)),
            ValueError,
            "a selection of blocks needs the rule",
        ),
        (
            lambda: attend(QUERY, KEY, VALUE, Exact().select(QUERY, KEY, 8, CAUSAL), tail="mean"),
            ValueError,
            "tail='mean' needs the rule",
        ),
        (
            lambda: attend(QUERY, KEY, VALUE, Exact().select(QUERY, KEY, 8, CAUSAL), tail="sum"),
            ValueError,
            "tail must be one of",
        ),
        (
            lambda: select_and_attend(QUERY, KEY, VALUE, 8, object(), CAUSAL),
            TypeError,
            "selector must have a method select",
        ),
        (lambda: sparse_attn.nn.TopKAttention(32, 4, None, selector=Exact()), ValueError, "needs a top_k"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_compile_is_one_graph():
    torch._dynamo.reset()

    def eager(query, key, value):
        return select_and_attend(query, key, value, 16, Rounded(), KEPT)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(QUERY, KEY, VALUE), eager(QUERY, KEY, VALUE))
