"""refine_blocks: topk_select under the mask that the blocks make."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from helpers import oracle
from helpers.compare import assert_best, assert_identical
from helpers.inputs import LAYOUTS, index_rows, integers, normal

import sparse_attn
from ops.test_block_select import CASES
from sparse_attn.rule import PackedRule


def mask_of(blocks, tile, block, queries, keys, **options):
    """bool [B, G, Tq, Tk]: the keys of the blocks, and those that are always kept."""
    i, j = torch.arange(queries).unsqueeze(-1), torch.arange(keys)
    rows = blocks.repeat_interleave(tile, dim=2)[:, :, :queries]
    inside = (rows.unsqueeze(-1) == j // block).any(-2)
    own = i + options.get("causal_offset", 0)
    first = oracle.first_keys(blocks[:, :, :1].expand(-1, -1, queries, -1), options.get("key_starts"))
    kept = (j < first + options.get("sinks", 0)) | ((j > own - options.get("window", 0)) & (j <= own))
    return inside | kept


def run(wing, query, key, blocks, top_k, block, tile, **options):
    return wing.refine_blocks(query, key, blocks, top_k, block_size=block, query_tile=tile, **options)


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_masked_selection(wing, dtype, name, garbage):
    queries, keys, block, tile, options = CASES[name]
    query, key = integers(2, 4, queries, 5, dtype=dtype), integers(2, 2, keys, 5, dtype=dtype, seed=1)
    if options.get("is_causal"):
        options = options | {"window": 3, "sinks": 2}
    for groups in (1, 4):
        blocks = index_rows(
            (2, groups, -(-queries // tile), 3), -(-keys // block), seed=groups, garbage=garbage
        )
        seen = mask_of(blocks, tile, block, queries, keys, **options)
        for top_k in (6, 40):
            indices = run(wing, query, key, blocks, top_k, block, tile, **options)
            assert_identical(indices, query, key, top_k, attn_mask=seen, **options)


@pytest.mark.parametrize("top_k", [5, 70])
def test_normal_scores(wing, dtype, top_k):
    """Tiles larger than a task, blocks that are no multiple of a vector."""
    query, key = normal(1, 2, 150, 32, dtype=dtype), normal(1, 1, 700, 32, dtype=dtype, seed=1)
    options = {"is_causal": True, "causal_offset": 550, "window": 4, "sinks": 1}
    for block, tile in ((64, 64), (50, 128), (16, 100)):
        blocks = index_rows((1, 2, -(-150 // tile), 5), -(-700 // block))
        seen = mask_of(blocks, tile, block, 150, 700, **options)
        indices = run(wing, query, key, blocks, top_k, block, tile, **options)
        assert_best(indices, query, key, top_k, attn_mask=seen, **options)


@pytest.mark.parametrize(("share", "groups"), [("kv", 1), ("kv", 2), ("all", 1)])
@pytest.mark.parametrize("name", CASES)
def test_shared(wing, dtype, name, share, groups):
    """Ranked by the mass among the keys of the blocks and those always kept."""
    queries, keys, block, tile, options = CASES[name]
    query, key = normal(2, 4, queries, 9, dtype=dtype), normal(2, 2, keys, 9, dtype=dtype, seed=1)
    if options.get("is_causal"):
        options = options | {"window": 3, "sinks": 2}
    blocks = index_rows((2, groups, -(-queries // tile), 3), -(-keys // block), seed=groups)
    seen = mask_of(blocks, tile, block, queries, keys, **options).repeat_interleave(4 // groups, dim=1)
    for top_k in (6, 40):
        indices = run(wing, query, key, blocks, top_k, block, tile, share=share, **options)
        assert_best(indices, query, key, top_k, attn_mask=seen, share=share, **options)


@pytest.mark.parametrize("top_k", [5, 70])
def test_shared_in_many_blocks(wing, dtype, top_k):
    query, key = normal(1, 6, 150, 32, dtype=dtype), normal(1, 3, 700, 32, dtype=dtype, seed=1)
    options = {"is_causal": True, "causal_offset": 550, "window": 4, "sinks": 1}
    for share, (block, tile) in zip(("kv", "all", "all"), ((64, 64), (50, 128), (16, 100)), strict=True):
        blocks = index_rows((1, 1, -(-150 // tile), 5), -(-700 // block))
        seen = mask_of(blocks, tile, block, 150, 700, **options)
        indices = run(wing, query, key, blocks, top_k, block, tile, share=share, **options)
        assert_best(indices, query, key, top_k, attn_mask=seen, share=share, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(wing, layout):
    query, key = normal(2, 4, 20, 8), normal(2, 2, 40, 8, seed=1)
    blocks = index_rows((2, 4, 3, 3), 5)
    strided = [LAYOUTS[layout](t) for t in (query, key, blocks)]
    assert torch.equal(run(wing, *strided, 6, 8, 8), run(wing, query, key, blocks, 6, 8, 8))


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_nothing(wing, dtype, sizes):
    batch, queries, keys = sizes
    query, key = normal(batch, 2, queries, 4, dtype=dtype), normal(batch, 1, keys, 4, dtype=dtype)
    for slots in (0, 2):
        blocks = torch.zeros(batch, 1, -(-queries // 2), slots, dtype=torch.int32)
        assert run(wing, query, key, blocks, 3, 4, 2).shape == (batch, 2, queries, min(3, keys))


def test_no_blocks_leaves_what_is_always_kept(wing):
    query, key = normal(1, 2, 30, 4), normal(1, 2, 30, 4, seed=1)
    blocks = torch.zeros(1, 1, 30, 0, dtype=torch.int32)
    indices = run(wing, query, key, blocks, 4, 8, 1, is_causal=True, window=2, sinks=1)
    assert indices[0, 0, 20].tolist() == [0, 19, 20, -1]


def test_opcheck(wing):
    query, key = normal(2, 4, 20, 8), normal(2, 2, 40, 8, seed=1)
    blocks = index_rows((2, 4, 3, 3), 5)
    run(wing, query, key, blocks, 6, 8, 8)  # skips where the wing has none
    query, key, blocks = (t.to(wing.device) for t in (query, key, blocks))
    rule = PackedRule(None, torch.tensor([40, 7], device=wing.device), True, 20, 2, 1, 4, 0.3)
    arguments = [query, key, 6, *rule.parts(), False, blocks, 8, 8]
    torch.library.opcheck(getattr(torch.ops.sparse_attn.topk_select, wing.name), arguments)


def test_compile_is_one_graph(wing):
    torch._dynamo.reset()

    def eager(query, key):
        options = {"block_size": 8, "query_tile": 8, "is_causal": True}
        blocks = sparse_attn.block_select(query, key, 3, **options)
        return sparse_attn.refine_blocks(query, key, blocks, 5, backend=wing.name, **options) + 1

    query, key = (normal(2, h, 40, 8, seed=h).to(wing.device) for h in (4, 2))
    run(wing, query.cpu(), key.cpu(), torch.zeros(2, 1, 5, 1, dtype=torch.int32), 3, 8, 8)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), eager(query, key))


def test_errors():
    query, key = normal(1, 4, 64, 8), normal(1, 2, 64, 8)
    blocks = torch.zeros(1, 4, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="share='all' makes 1 selections, got 4 rows of blocks"):
        sparse_attn.refine_blocks(query, key, blocks, 3, share="all")
