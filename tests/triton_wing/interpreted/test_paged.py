"""Caches in pages in Triton, interpreted, against the reference; decoding with a key head's query heads in one tile."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_close, assert_identical
from helpers.inputs import integers, mask, normal
from ops.test_paged import FLAGS, cache

import sparse_attn
from sparse_attn.triton_kernels import paged_attention, topk_select

CAP = {"softcap": 0.8, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.1])}
CASES = {
    "a step": ([1, 1, 1, 1], [30, 17, 0, 40], 16, "none", {"is_causal": True}, "as_given"),
    "a step, all": ([1, 1, 1], [30, 0, 40], 64, "all", {"is_causal": True, **CAP}, "in_one"),
    "drafts": (
        [4, 1, 0, 3],
        [40, 1, 9, 33],
        1,
        "none",
        {"is_causal": True, "window": 2, "sinks": 3},
        "as_given",
    ),
    "drafts, kv": ([3, 1], [40, 9], 16, "kv", {"is_causal": True, "window": 2, "sinks": 3}, "heads_first"),
    "every key": ([2, 1], [20, 33], 48, "none", CAP, "dims_apart"),
    "a suffix": ([20, 1], [29, 33], 16, "none", {"is_causal": True, "scale": -0.7}, "as_given"),
}


def both(own, wing, **options):
    found = own.attention(**options, **FLAGS, backend=wing.name)
    return found, own.attention(**options, **FLAGS, backend="reference")


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(wing, name):
    queries, used, size, share, options, layout = CASES[name]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[list(CASES).index(name) % 3]
    own = cache(queries, used, size, dtype=dtype, layout=layout, make=integers if share == "none" else normal)
    (out, lse, indices), (want, want_lse, want_indices) = both(own, wing, share=share, **options)
    assert out.is_contiguous()
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out", units=4)
    assert_close(lse, want_lse, "lse", units=8)
    chosen = own.over_pages(
        "varlen_topk_select", own.pages[0], physical_indices=True, share=share, backend=wing.name, **options
    )
    assert torch.equal(chosen, own.physical(indices))


def test_each_sequence_against_float64(wing):
    own = cache([2, 1, 0], [19, 30, 16], 16)
    options = {"is_causal": True, "window": 1, "sinks": 1}
    out, lse, indices = own.attention(**options, **FLAGS, backend=wing.name)
    at_q = at_k = 0
    for count, used in zip(own.queries, own.used, strict=True):
        q = own.query[at_q : at_q + count].transpose(0, 1)[None]
        k, v = (t[at_k : at_k + used].transpose(0, 1)[None] for t in own.packed)
        mine = slice(at_q, at_q + count)
        at_q, at_k = at_q + count, at_k + used
        if count:
            want, want_lse, _ = oracle.topk_attention(q, k, v, 6, causal_offset=used - count, **options)
            assert_close(out[mine].transpose(0, 1)[None], want, "out", units=4)
            assert_close(lse[mine].T[None], want_lse, "lse", units=8)


@pytest.mark.parametrize("share", ["none", "kv"])
def test_keys_split_over_programs(wing, monkeypatch, share):
    """Each sequence in parts of its own length, for the ranks and for what they are shares of; tiles of few rows."""
    config = topk_select.Config(4, 8, 16, 0, 256, 1, 1, 32)
    monkeypatch.setattr(topk_select, "configs", lambda *_: [config])
    monkeypatch.setattr(topk_select, "_processors", lambda _: 4)
    splits, split = [], topk_select._splits
    monkeypatch.setattr(topk_select, "_splits", lambda *given: splits.append(split(*given)) or splits[-1])
    own = cache([1, 1, 3], [300, 0, 90], 16, make=integers if share == "none" else normal)
    (out, lse, indices), (want, want_lse, want_indices) = both(
        own, wing, is_causal=True, window=1, share=share
    )
    assert splits[0][0] > 1
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out", units=4)
    assert_close(lse, want_lse, "lse", units=8)


def test_nan_stays_within_a_sequence(wing):
    own = cache([1, 2], [20, 33], 16)
    own.query[0, 1, 2] = float("nan")
    own.pages[0][own.table[1, 1], 3, 0, 1] = float("nan")
    own.pages[1][own.table[1, 0], 5, 1] = float("nan")
    (out, lse, indices), (want, _, want_indices) = both(own, wing, is_causal=True)
    assert torch.equal(indices, want_indices)
    assert torch.equal(out.isnan(), want.isnan())
    assert not bool(lse[0, 0].isnan())


def test_a_page_that_is_none_has_no_keys(wing):
    """Where nobody looks at the table beforehand, as on a GPU: its keys are absent."""
    own = cache([1, 1], [40, 40], 16, make=integers)
    table = own.table.clone()
    table[0, 1], table[1, 0] = -1, 10**6
    rule = sparse_attn.selection.Rule(
        True,
        torch.tensor([[39, 39 + 16 * table.shape[1] - 1]]),
        key_starts=torch.tensor([[0, 16 * table.shape[1]]]),
    )
    q, (k, v) = own.query.transpose(0, 1)[None], (t.transpose(1, 2) for t in own.pages)
    parts = rule.packed(q, k.new_empty(1, 2, table.numel() * 16, 9), 6)
    out, _, indices = paged_attention.paged_attention(q, k, v, table, 6, parts)
    from sparse_attn.wings.reference import paged_attention as definition

    want, _, want_indices = definition.paged_attention(q, k, v, table, 6, parts)
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out", units=4)
    nothing = torch.full_like(table, -1)
    out, lse, indices = paged_attention.paged_attention(q, k, v, nothing, 6, parts)
    assert not out.any()
    assert bool(lse.isneginf().all())
    assert bool((indices == -1).all())


def test_no_pages_at_all(wing):
    own = cache([1], [0], 16)
    out, lse, indices = own.attention(**FLAGS, backend=wing.name)
    assert not out.any()
    assert bool(lse.isneginf().all())
    assert bool((indices == -1).all())


HEADS = {"6 of 2": (6, 2, 3), "one key head": (8, 1, 1), "two of each": (4, 2, 5)}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["plain", "window", "mask", "rounded", "blocks"])
def test_heads_of_a_key_head_in_one_tile(wing, heads, name):
    """Few queries of a dense cache; three heads do not fill a tile."""
    count, kv_heads, queries = HEADS[heads]
    query = integers(2, count, queries, 8, seed=1)
    key = integers(2, kv_heads, 70, 8, seed=2)
    options = {"is_causal": True, "causal_offset": 60, "key_lengths": torch.tensor([70, 33])}
    options |= {"window": {"window": 2, "sinks": 1}, "mask": {"attn_mask": mask(2, count, queries, 70)}}.get(
        name, {}
    )
    if name == "rounded":
        found = wing.quantized_select(query, key, 5, **options)
        assert torch.equal(found, sparse_attn.quantized_select(query, key, 5, backend="reference", **options))
    elif name == "blocks":
        blocks = (
            torch.arange(3, dtype=torch.int32).expand(2, count, 1, 3)
            + torch.arange(count).view(1, -1, 1, 1) % 4
        )
        sizes = {"block_size": 8, "query_tile": 8, **options}
        found = wing.refine_blocks(query, key, blocks, 5, **sizes)
        assert torch.equal(
            found, sparse_attn.refine_blocks(query, key, blocks, 5, backend="reference", **sizes)
        )
    else:
        assert_identical(wing.topk_select(query, key, 5, **options), query, key, 5, **options)


def test_more_heads_than_a_tile_has_rows(wing, monkeypatch):
    config = topk_select.Config(4, 16, 64, 0, 256, 1, 1, 1)
    monkeypatch.setattr(topk_select, "configs", lambda *_: [config])
    query, key = integers(1, 12, 2, 8, seed=1), integers(1, 1, 40, 8, seed=2)
    options = {"is_causal": True, "causal_offset": 38}
    assert_identical(wing.topk_select(query, key, 5, **options), query, key, 5, **options)
    found = wing.topk_select(query, key, 5, share="all", **options)
    assert_best(found, query, key, 5, share="all", **options)
