"""Rows that lie more than 2^31 elements apart: the same bits as of the same rows side by side.

The memory between them is never touched, so that it is asked for and not used.
"""

from __future__ import annotations

import pytest
import torch

import sparse_attn
from sparse_attn.bench.machine import available_bytes
from sparse_attn.selection import Blocks, Exact, Hierarchical, Refined, Rounded, Rule, attend

ROWS, WIDTH, TOP_K = 192, 16, 8
STRIDE = 2**31 // (ROWS - 4)
NEEDED = 2 * STRIDE * ROWS * 2

pytestmark = [
    pytest.mark.torch_defaults,  # memory that is filled is memory that is used
    pytest.mark.skipif(available_bytes() < 2 * NEEDED, reason="needs 9 GB of addresses"),
]


def far_apart(dtype: torch.dtype = torch.bfloat16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows side by side, the same rows far apart) of query [1, 4, T, D], key and value [1, 2, T, D]."""
    storage = torch.empty(STRIDE * ROWS, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    found, place = [], 0
    for heads in (4, 2, 2):
        near = torch.randn(1, heads, ROWS, WIDTH, generator=generator).to(dtype)
        far = storage.as_strided(near.shape, (0, WIDTH, STRIDE, 1), place)
        far.copy_(near)
        place += heads * WIDTH
        found.append((near, far))
        assert far.storage_offset() + (ROWS - 1) * STRIDE > 2**31
    return found


@torch.no_grad()
def test_selections_and_attention():
    (q, far_q), (k, far_k), (v, far_v) = far_apart()
    rule = Rule(is_causal=True, share="kv")
    for selector, top_k in (
        (Exact(), TOP_K),
        (Rounded(), TOP_K),
        (Blocks(16, 16), 48),
        (Refined(2, Blocks(16, 16)), 48),
        (Hierarchical(16, 2, 1), TOP_K),
    ):
        near, far = selector.select(q, k, top_k, rule), selector.select(far_q, far_k, top_k, rule)
        assert torch.equal(near.indices, far.indices), selector
        out = attend(far_q, far_k, far_v, far, rule=rule)
        assert torch.equal(out, attend(q, k, v, near, rule=rule)), selector


@torch.no_grad()
def test_the_fused_op_and_the_tail():
    (q, far_q), (k, far_k), (v, far_v) = far_apart()
    for function in (sparse_attn.topk_attention, sparse_attn.topk_attention_with_residual):
        out = function(far_q, far_k, far_v, TOP_K, is_causal=True)
        assert torch.equal(out, function(q, k, v, TOP_K, is_causal=True)), function


def test_gradients():
    near, far = zip(*far_apart(), strict=True)
    grads = []
    for tensors in (near, far):
        leaves = [t.detach().requires_grad_() for t in tensors]
        sparse_attn.topk_attention(*leaves, TOP_K, is_causal=True).float().square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_indexer():
    (q, far_q), (k, far_k), _ = far_apart()
    weights = torch.rand(1, 4, ROWS).to(q.dtype)
    near = sparse_attn.indexer_select(q, k, weights, TOP_K, is_causal=True)
    assert torch.equal(near, sparse_attn.indexer_select(far_q, far_k, weights, TOP_K, is_causal=True))
