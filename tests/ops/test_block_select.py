"""block_select against loops over blocks and tiles in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.inputs import normal

import sparse_attn
from sparse_attn.ops.block_select import piece_means

CASES = {  # Tq, Tk, block, tile, options
    "plain": (40, 70, 8, 4, {}),
    "causal": (64, 64, 8, 8, {"is_causal": True}),
    "small tiles": (50, 50, 16, 4, {"is_causal": True}),
    "one query": (20, 50, 8, 1, {"is_causal": True, "causal_offset": 30}),
    "large tiles": (64, 90, 8, 16, {"is_causal": True, "causal_offset": 26}),
    "odd": (23, 61, 7, 5, {"is_causal": True, "causal_offset": 38}),
    "lengths": (16, 64, 8, 8, {"key_lengths": torch.tensor([64, 21])}),
    "starts": (16, 64, 8, 8, {"key_starts": torch.tensor([0, 21], dtype=torch.int32)}),
    "starts of queries": (
        50,
        50,
        8,
        4,
        {"is_causal": True, "key_starts": torch.tensor([3] * 20 + [20] * 14 + [34] * 16).expand(2, 50)},
    ),
    "negative offset": (32, 32, 8, 8, {"is_causal": True, "causal_offset": -11}),
}


def pooled(rows, size, length, how, begin=0):
    """One row per piece, float64, of rows [T, D] from `begin` to `length`."""
    pieces = []
    for start in range(0, len(rows), size):
        piece = rows[max(start, begin) : max(0, min(start + size, length))].double()
        if len(piece) == 0:
            piece = torch.zeros(1, rows.shape[1], dtype=torch.float64)
        pieces.append(getattr(piece, how)(0))
    return torch.stack(pieces)


def ranks(query, key, block, tile, pool, lengths, begins):
    """[B, Hq, N, blocks], float64."""
    share, every = query.shape[1] // key.shape[1], []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q = pooled(query[b, h], tile, query.shape[2], "mean").unsqueeze(1)
            rows = key[b, h // share]
            if pool == "mean":
                k = pooled(rows, block, lengths[b], "mean", begins[b])
                every.append((q * k).sum(-1))
            else:
                low, high = (pooled(rows, block, lengths[b], how, begins[b]) for how in ("amin", "amax"))
                every.append(torch.maximum(q * low, q * high).sum(-1))
    return torch.stack(every).view(*query.shape[:2], -1, every[0].shape[-1])


@pytest.mark.parametrize("pool", ["mean", "bound"])
@pytest.mark.parametrize("name", CASES)
def test_choices(name, pool):
    """Every chosen block is seen, first and own ones are in, and no better block was left out."""
    queries, keys, block, tile, options = CASES[name]
    query, key = (
        normal(2, 4, queries, 6, dtype=torch.float64),
        normal(2, 2, keys, 6, dtype=torch.float64, seed=1),
    )
    top = 6
    chosen = sparse_attn.block_select(
        query, key, top, block_size=block, query_tile=tile, pool=pool, **options
    )
    lengths = options.get("key_lengths", torch.tensor([keys, keys])).tolist()
    starts = oracle.first_keys(query, options.get("key_starts"))[:, 0, :, 0]
    rank = ranks(query, key, block, tile, pool, lengths, starts.amin(1).tolist())
    seen = oracle.visible(query, key, **options)
    assert chosen.shape == (2, 4, -(-queries // tile), min(top, -(-keys // block)))
    for b, h, n in torch.cartesian_prod(
        torch.arange(2), torch.arange(4), torch.arange(chosen.shape[2])
    ).tolist():
        numbers = chosen[b, h, n][chosen[b, h, n] >= 0].tolist()
        assert numbers == sorted(set(numbers))
        assert bool((chosen[b, h, n, len(numbers) :] == -1).all())
        of_tile = seen[b, h, n * tile : (n + 1) * tile].any(0)
        visible = {j // block for j in of_tile.nonzero().flatten().tolist()}
        assert set(numbers) <= visible
        first = {int(starts[b, n * tile : (n + 1) * tile].min()) // block} & visible
        own = set()
        if options.get("is_causal"):
            offset = options.get("causal_offset", 0)
            at = range(n * tile + offset, min((n + 1) * tile, queries) + offset)
            own = {i // block for i in at} & visible
        assert first | own <= set(numbers)
        free = [m for m in numbers if m not in first | own]
        left = [m for m in visible if m not in numbers]
        if free and left:
            assert rank[b, h, n, free].min() >= rank[b, h, n, left].max() - 1e-9
        if left:
            assert len(numbers) >= top - 2, "the budget is used"


@pytest.mark.parametrize("share", ["kv", "all"])
def test_shared_choices(share):
    query, key = normal(1, 4, 64, 8), normal(1, 2, 64, 8, seed=1)
    chosen = sparse_attn.block_select(query, key, 4, block_size=8, query_tile=8, is_causal=True, share=share)
    assert chosen.shape == (1, {"kv": 2, "all": 1}[share], 8, 4)
    alone = sparse_attn.block_select(
        query[:, :1].expand(1, 4, 64, 8), key[:, :1].expand(1, 2, 64, 8), 4,
        block_size=8, query_tile=8, is_causal=True, share=share,
    )  # fmt: skip
    want = sparse_attn.block_select(query[:, :1], key[:, :1], 4, block_size=8, query_tile=8, is_causal=True)
    assert torch.equal(alone, want.expand_as(alone))


def test_finds_a_planted_block():
    """Queries of a tile that ask for what one far block holds."""
    query, key = 0.1 * normal(1, 1, 512, 16), 0.1 * normal(1, 1, 512, 16, seed=1)
    query[:, :, 448:, 3], key[:, :, 128:192, 3] = 3, 3
    for pool in ("mean", "bound"):
        chosen = sparse_attn.block_select(query, key, 3, is_causal=True, pool=pool)
        assert chosen[0, 0, -1].tolist() == [0, 2, 7]


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_nothing(sizes):
    batch, queries, keys = sizes
    query, key = normal(batch, 2, queries, 4), normal(batch, 1, keys, 4)
    options = {"is_causal": True, "causal_offset": 0, "block_size": 4, "query_tile": 2}
    chosen = sparse_attn.block_select(query, key, 3, **options)
    assert chosen.shape == (batch, 2, -(-queries // 2), min(3, -(-keys // 4)))


STARTS = {"key_starts": torch.tensor([2, 8])}


@pytest.mark.parametrize("pool", ["mean", "bound"])
def test_sizes_beyond_the_sequences(pool):
    """One block holds all keys, one tile all queries: memory is that of the tensors, whatever the sizes say."""
    query, key = normal(2, 2, 5, 4), normal(2, 1, 9, 4, seed=1)
    far = 2**40
    for options in (
        {},
        {"is_causal": True, "causal_offset": 4},
        {"key_lengths": torch.tensor([9, 3])},
        STARTS,
    ):
        chosen = sparse_attn.block_select(
            query, key, far, block_size=far, query_tile=far, pool=pool, **options
        )
        assert torch.equal(chosen, torch.zeros(2, 2, 1, 1, dtype=torch.int32))
    # A tile of more blocks than there are: all that its queries see.
    tiles = {"block_size": 2, "query_tile": far, "is_causal": True, "causal_offset": 2}
    chosen = sparse_attn.block_select(query, key, far, pool=pool, **tiles)
    assert torch.equal(chosen, torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32).expand(2, 2, 1, 5))
    before = sparse_attn.block_select(query, key, far, pool=pool, **tiles | {"causal_offset": -3})
    assert torch.equal(before, torch.tensor([0, -1, -1, -1, -1], dtype=torch.int32).expand(2, 2, 1, 5))


def test_errors():
    query, key = normal(1, 4, 64, 8), normal(1, 2, 64, 8)
    for says, wrong in (
        ("pool must be one of 'mean', 'bound'", {"pool": "max"}),
        ("top_blocks must be at least 2, got 1", {"top_blocks": 1}),
        ("top_blocks must be at least 3, got 2", {"top_blocks": 2, "query_tile": 128}),
        ("scale must not be negative", {"scale": -1.0}),
        ("share must be one of", {"share": "some"}),
    ):
        with pytest.raises(ValueError, match=says):
            sparse_attn.block_select(query, key, **{"top_blocks": 4, "is_causal": True} | wrong)


@pytest.mark.parametrize("length", [32, 30])  # of whole pieces, and with a part of one
def test_means_are_the_same_whatever_the_strides(length):
    """Equal keys tie, and a sum in another order would choose other blocks."""
    rows = normal(1, 3, length, 6)
    for view in (rows.mT.contiguous().mT, rows.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(piece_means(view, 8), piece_means(rows, 8))
