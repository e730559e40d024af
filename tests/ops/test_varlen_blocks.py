"""Packed sequences in whole blocks and by an indexer: each is what it is alone, to the last bit."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import integers, normal
from helpers.pairwise import rows
from helpers.wings import DTYPES

import sparse_attn

from .test_varlen import LENGTHS, bounds, pack

# Each sequence is called alone here, several times: fewer of the short ones.
LENGTHS = LENGTHS | {"many short ones and a long one": ([1, 2] * 9 + [110],) * 2}


@pytest.fixture(autouse=True)
def _known(request):
    """A wing without offsets of queries refuses packed calls, in one clause; it has no other test here."""
    wing = request.node.callspec.params.get("wing") if hasattr(request.node, "callspec") else None
    if wing is None or (wing.refuses_offsets() is None and wing.device == "cpu"):
        return
    if wing.refuses_offsets() is None:
        pytest.skip("tensors of the CPU alone: tests/triton_wing has the kernels")
    where = torch.tensor([0, 2]), None, 2, 2
    query, key = normal(2, 1, 4), normal(2, 1, 4)
    blocks = torch.zeros(4, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"backend='{wing.name}' cannot run varlen_block_attention"):
        wing.varlen_block_attention(query, key, key, blocks, *where, query_tile=1, is_causal=True)
    with pytest.raises(ValueError, match=f"backend='{wing.name}' cannot run varlen_indexer_select"):
        wing.varlen_indexer_select(query, key, normal(2, 1), *where, 1, is_causal=True)
    pytest.skip(f"the {wing.name} wing takes no packed sequences, and says so")


def slices(lengths_q, lengths_k):
    at_q = at_k = 0
    for q, k in zip(lengths_q, lengths_k, strict=True):
        yield slice(at_q, at_q + q), slice(at_k, at_k + k)
        at_q, at_k = at_q + q, at_k + k


def alone(tensor, where):
    """[T, H, …] → [1, H, t, …] of one sequence."""
    return tensor[where].transpose(0, 1)[None]


SELF = {name: (q, q) for name, (q, k) in LENGTHS.items()}
PAIRS = rows(
    lengths=list(LENGTHS),
    sizes=[(4, 4), (8, 4), (3, 8), (16, 16), (64, 64)],
    share=["none", "kv", "all"],
    causal=[False, True],
    pool=["mean", "bound"],
    make=["normal", "integers"],
    behind=[0, 2],
)


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_each_sequence_in_blocks_is_what_it_is_alone(wing, dtype, row):
    name, (size, tile), share, causal, pool, make, behind = row
    lengths = (SELF if causal else LENGTHS)[name]
    make = {"normal": normal, "integers": integers}[make]
    query, key, value, *where = pack(*lengths, dtype=dtype, make=make, behind=behind)
    sizes = {"block_size": size, "query_tile": tile, "is_causal": causal, "backend": wing.name}
    budget = 5
    chosen = sparse_attn.varlen_block_select(query, key, *where, budget, pool=pool, share=share, **sizes)
    assert chosen.dtype == torch.int32
    assert chosen.shape[2] == min(budget, -(-where[3] // size))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, lse = sparse_attn.varlen_block_attention(*leaves, chosen, *where, return_lse=True, **sizes)
    weight = normal(*out.shape, dtype=dtype, seed=9)
    grads = torch.autograd.grad((out * weight).sum() + lse.where(lse.isfinite(), 0.0).sum(), leaves)
    tiles = 0
    for of_queries, of_keys in slices(*lengths):
        count = of_queries.stop - of_queries.start
        here = slice(tiles, tiles + -(-count // min(tile, query.shape[0])))
        tiles = here.stop
        if not count:
            continue
        parts = [
            alone(t.detach(), w).requires_grad_()
            for t, w in zip(leaves, (of_queries, of_keys, of_keys), strict=True)
        ]
        own = sparse_attn.block_select(*parts[:2], budget, pool=pool, share=share, **sizes)
        found = chosen[here].transpose(0, 1)[None]
        assert torch.equal(found[..., : own.shape[-1]], own)
        assert bool((found[..., own.shape[-1] :] == -1).all())
        expected = sparse_attn.block_attention(*parts, own, return_lse=True, **sizes)
        got = alone(out, of_queries), alone(lse, of_queries)
        mine = torch.autograd.grad(
            (expected[0] * alone(weight, of_queries)).sum()
            + expected[1].where(expected[1].isfinite(), 0.0).sum(),
            parts,
        )
        for one, other in zip(expected, got, strict=True):
            if wing.name == "cpu":
                assert torch.equal(one, other)
            else:  # its products may sum in another order
                torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
        for one, other, w in zip(mine, grads, (of_queries, of_keys, of_keys), strict=True):
            torch.testing.assert_close(one, alone(other, w), atol=2e-2, rtol=2e-2)
            if dtype in (torch.float32, torch.float64):
                torch.testing.assert_close(one, alone(other, w), atol=1e-4, rtol=1e-4)
    assert bool((chosen[tiles:] == -1).all())
    total = sum(lengths[0])
    assert bool((out[total:] == 0).all())
    assert bool(lse[total:].isneginf().all())


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "tile"), [(16, 8), (4, 7), (100, 16)])
def test_special_values_change_no_bit_of_what_lies_beside_them(wing, dtype, special, causal, size, tile):
    """The last block of a sequence is full in a pack, and not alone; so is its last tile."""
    lengths = [7, 31, 30]
    query, key, value, *where = pack(lengths, lengths, dtype=dtype, value_dim=37)
    for token, head, column in ((3, 0, 0), (20, 1, 5), (66, 0, 36)):
        value[token, head, column] = special
    weight = normal(*query.shape[:2], 37, dtype=dtype, seed=9)
    sizes = {"block_size": size, "query_tile": tile, "is_causal": causal, "backend": wing.name}
    chosen = sparse_attn.varlen_block_select(query, key, *where, 5, **sizes)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = sparse_attn.varlen_block_attention(*leaves, chosen, *where, **sizes)
    grads = torch.autograd.grad(out, leaves, weight)
    tiles = 0
    for here, _ in slices(lengths, lengths):
        parts = [alone(t.detach(), here).requires_grad_() for t in leaves]
        count = -(-(here.stop - here.start) // tile)
        own, tiles = chosen[tiles : tiles + count].transpose(0, 1)[None], tiles + count
        expected = sparse_attn.block_attention(*parts, own, **sizes)
        mine = torch.autograd.grad(expected, parts, alone(weight, here))
        assert bool(expected.isfinite().any())
        assert not bool(expected.isfinite().all())
        exact = {"atol": 0, "rtol": 0} if wing.name == "cpu" else {"atol": 2e-2, "rtol": 2e-2}
        for one, other in zip((expected, *mine), (out, *grads), strict=True):
            torch.testing.assert_close(one, alone(other, here), equal_nan=True, **exact)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "causal", [{}, {"is_causal": True}, {"is_causal": True, "window": 3, "sinks": 2}], ids=str
)
@pytest.mark.parametrize("name", list(LENGTHS))
def test_each_sequence_by_an_indexer_is_what_it_is_alone(wing, dtype, int8, causal, name):
    lengths = LENGTHS[name]
    query, key, _, *where = pack(*lengths, dtype=dtype, behind=2)
    weights = normal(*query.shape[:2], seed=5)
    options = {"int8": int8, "backend": wing.name}
    found = sparse_attn.varlen_indexer_select(query, key, weights, *where, 6, **options, **causal)
    for of_queries, of_keys in slices(*lengths):
        q, k = alone(query, of_queries), alone(key, of_keys)
        if not q.shape[2]:
            continue
        more = {**causal, **({"causal_offset": k.shape[2] - q.shape[2]} if causal else {})}
        own = sparse_attn.indexer_select(q, k, weights[of_queries].T[None], 6, **options, **more)
        mine = found[of_queries].transpose(0, 1)[None]
        if wing.name == "cpu":
            assert torch.equal(mine[..., : own.shape[-1]], own)
        assert bool((mine[..., own.shape[-1] :] == -1).all())
        assert torch.equal((mine >= 0).sum(-1), (own >= 0).sum(-1))
    assert bool((found[sum(lengths[0]) :] == -1).all())


def test_it_compiles_to_one_graph():
    """Of all packs of these sizes."""
    query, key, value, *_ = pack([30], [30])

    def both(query, key, value, cu_seq):
        sizes = {"block_size": 4, "query_tile": 4, "is_causal": True}
        blocks = sparse_attn.varlen_block_select(query, key, cu_seq, None, 20, 20, 3, **sizes)
        return sparse_attn.varlen_block_attention(query, key, value, blocks, cu_seq, None, 20, 20, **sizes)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for lengths in ([11, 0, 19], [1, 20, 9]):
        where = bounds(lengths)
        torch.testing.assert_close(compiled(query, key, value, where), both(query, key, value, where))


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_offsets_of_queries_in_block_attention(wing, dtype):
    """`causal_offset` as a tensor is a call for each offset."""
    query, key, value = (normal(2, 2, 13, 5, dtype=dtype, seed=s) for s in range(3))
    blocks = sparse_attn.block_select(query, key, 4, block_size=4, query_tile=4)
    sizes = {"block_size": 4, "query_tile": 4, "is_causal": True, "backend": wing.name}
    each = torch.tensor([2, -3])
    found = sparse_attn.block_attention(query, key, value, blocks, causal_offset=each, **sizes)
    for b in range(2):
        parts = [t[b : b + 1] for t in (query, key, value, blocks)]
        own = sparse_attn.block_attention(*parts, causal_offset=int(each[b]), **sizes)
        torch.testing.assert_close(found[b : b + 1], own, atol=0, rtol=0)


REFUSED = {
    "need cu_seq_k to be cu_seq_q": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, torch.tensor([0, 9, 20]), 20, 20, 3, is_causal=True
    ),
    "top_blocks must be at least 2": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 1, is_causal=True
    ),
    "pool must be one of": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 3, pool="max"
    ),
    "scale must not be negative": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 3, scale=-1.0
    ),
    "blocks must have shape": lambda q, k, cu: sparse_attn.varlen_block_attention(
        q, k, k, torch.zeros(2, 1, 1, dtype=torch.int32), cu, None, 20, 20
    ),
    "blocks must be an int32": lambda q, k, cu: sparse_attn.varlen_block_attention(
        q, k, k, torch.zeros(4, 1, 1), cu, None, 20, 20
    ),
    "blocks must be on the query's device": lambda q, k, cu: sparse_attn.varlen_block_attention(
        q, k, k, torch.zeros(4, 1, 1, dtype=torch.int32, device="meta"), cu, None, 20, 20
    ),
    "query must have 3 dimensions": lambda q, k, cu: sparse_attn.varlen_block_select(
        q[None], k, cu, None, 20, 20, 3
    ),
    "value must be .* with the key's tokens": lambda q, k, cu: sparse_attn.varlen_block_attention(
        q, k, k[:9], torch.zeros(4, 1, 1, dtype=torch.int32), cu, None, 20, 20
    ),
    "cu_seq_q must be an int32 or int64 tensor": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, [0, 20], None, 20, 20, 3
    ),
    "cu_seq_q must rise from 0 to at most 20": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, torch.tensor([0, 12, 21]), None, 20, 20, 3
    ),
    "one entry more than there are sequences": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, torch.tensor([0, 20]), 20, 20, 3
    ),
    "block_size must be an int": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 3, block_size=4.0
    ),
    "query_tile must be at least 1": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 3, query_tile=0
    ),
    "sink_logits must have shape": lambda q, k, cu: sparse_attn.varlen_block_select(
        q, k, cu, None, 20, 20, 3, sink_logits=torch.zeros(3)
    ),
    "int8 must be True or False": lambda q, k, cu: sparse_attn.varlen_indexer_select(
        q, k, q[..., 0], cu, None, 20, 20, 3, int8="yes"
    ),
    "weights must be a tensor": lambda q, k, cu: sparse_attn.varlen_indexer_select(
        q, k, None, cu, None, 20, 20, 3
    ),
    "seqused_k must lie between": lambda q, k, cu: sparse_attn.varlen_indexer_select(
        q, k, q[..., 0], cu, None, 20, 20, 3, seqused_k=torch.tensor([13, 8])
    ),
    "weights must have": lambda q, k, cu: sparse_attn.varlen_indexer_select(
        q, k, q[..., 0].T, cu, None, 20, 20, 3
    ),
    "max_k must be at least": lambda q, k, cu: sparse_attn.varlen_block_select(q, k, cu, None, 20, 3, 3),
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_refusals(words):
    query, key, _, cu_seq, *_ = pack([12, 8], [12, 8])
    with pytest.raises((ValueError, TypeError), match=words):
        REFUSED[words](query, key, cu_seq)


def test_an_empty_pack_has_a_gradient():
    """Of nothing: a training step without a document is no error."""
    leaves = [torch.zeros(0, h, 5, requires_grad=True) for h in (4, 2, 2)]
    where = torch.zeros(1, dtype=torch.int64), None, 0, 0
    blocks = sparse_attn.varlen_block_select(*leaves[:2], *where, 3, is_causal=True)
    out, lse = sparse_attn.varlen_block_attention(*leaves, blocks, *where, is_causal=True, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
