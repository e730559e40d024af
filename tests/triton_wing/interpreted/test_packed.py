"""Causal offsets of each query's own in Triton, interpreted, and packed sequences, which are such calls."""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_best, assert_close, assert_identical
from helpers.inputs import integers, mask, normal

import sparse_attn

FLAGS = {"return_lse": True, "return_indices": True}
QUERIES = [5, 0, 9, 1, 3]  # of each sequence
KEYS = [9, 4, 20, 1, 0]


def offsets_of(queries: int, keys: int) -> torch.Tensor:  # int64 [2, queries]
    """Of all kinds: before every key, behind every key, beyond 32 bits, and what lies between."""
    some = torch.randint(-queries, keys + 3, (2, queries), generator=torch.Generator().manual_seed(5))
    some[0, 1], some[1, 2], some[0, 3], some[1, 0] = -(2**62), 2**62, 2**33, -queries - 1
    return some


def pack(dtype=torch.float32, make=integers, heads=4, kv_heads=2, behind=2):
    """(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k), with tokens behind the last sequence."""
    tensors = (
        make(sum(QUERIES) + behind, heads, 8, dtype=dtype, seed=1),
        make(sum(KEYS) + behind, kv_heads, 8, dtype=dtype, seed=2),
        make(sum(KEYS) + behind, kv_heads, 5, dtype=dtype, seed=3),
    )
    return *tensors, *(torch.tensor([0, *n]).cumsum(0) for n in (QUERIES, KEYS)), max(QUERIES), max(KEYS)


OPTIONS = {
    "alone": {},
    "window_sinks": {"window": 2, "sinks": 2},
    "lengths": {"key_lengths": torch.tensor([21, 8]), "window": 3},
    "mask": {"attn_mask": mask(2, 1, 7, 21), "sinks": 1},
    "starts": {"key_starts": torch.tensor([[0, 0, 3, 3, 9, 21, 5], [4] * 7]), "window": 1, "sinks": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("share", ["none", "kv"])
def test_offsets_of_queries(wing, name, share):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[list(OPTIONS).index(name) % 3]
    query = integers(2, 4, 7, 8, dtype=dtype, seed=1)
    key = integers(2, 2, 21, 8, dtype=dtype, seed=2)
    options = {**OPTIONS[name], "is_causal": True, "causal_offset": offsets_of(7, 21), "share": share}
    indices = wing.topk_select(query, key, 5, **options)
    want = sparse_attn.topk_select(query, key, 5, backend="reference", **options)
    if share == "none":
        assert torch.equal(indices, want)
    else:
        masses = {"backend": "reference", "return_lse": True, "scale": 1.0}
        assert torch.equal((indices >= 0).sum(-1), (want >= 0).sum(-1))
        a, b = (
            sparse_attn.gathered_attention(query, key, key, i, **masses)[1].exp().sum()
            for i in (indices, want)
        )
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_offset_for_each_sequence(wing, dtype):
    """[B]: caches of different lengths, the same in every way as one call after the other."""
    query, key = integers(2, 2, 3, 8), integers(2, 1, 30, 8, seed=1)
    options = {"is_causal": True, "window": 2, "sinks": 1}
    both = wing.topk_select(query, key, 6, causal_offset=torch.tensor([27, 4], dtype=dtype), **options)
    for b, offset in enumerate((27, 4)):
        own = query[b : b + 1], key[b : b + 1], 6
        assert_identical(both[b : b + 1], *own, causal_offset=offset, **options)


@pytest.mark.parametrize("share", ["none", "all"])
def test_keys_split_over_programs(wing, monkeypatch, share):
    from sparse_attn.triton_kernels import topk_select

    config = topk_select.Config(4, 16, 32, 0, 256, 1, 1, 8)
    monkeypatch.setattr(topk_select, "configs", lambda *_: [config])
    query, key = integers(2, 1, 3, 8), integers(2, 1, 600, 8, seed=1)
    if share == "all":
        query = query.expand(2, 2, 3, 8)
    options = {"is_causal": True, "window": 1, "sinks": 1, "share": share}
    options |= {"causal_offset": torch.tensor([[590, 40, 2**50], [3, 500, -7]])}
    options |= {"key_starts": torch.tensor([[0, 40, 590], [500, 7, 19]])}
    found = wing.topk_select(query, key, 3, **options)
    want = sparse_attn.topk_select(query, key, 3, backend="reference", **options)
    if share == "none":
        assert torch.equal(found, want)
    else:
        for b in range(2):
            for t in range(3):
                own = query[b : b + 1, :, t : t + 1], key[b : b + 1], 3
                of_query = {
                    "causal_offset": max(-5, min(700, int(options["causal_offset"][b, t]) + t)),
                    "key_starts": options["key_starts"][b : b + 1, t : t + 1],
                }
                assert_best(found[b : b + 1, :, t : t + 1], *own, **{**options, **of_query})


@pytest.mark.parametrize(
    "causal", [{}, {"is_causal": True}, {"is_causal": True, "window": 3, "sinks": 1}], ids=str
)
@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_packed_sequences(wing, causal, share):
    """Each is what it is alone, forward and backward."""
    query, key, value, *where = pack(make=normal)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    options = {**causal, "share": share}
    call = lambda backend: sparse_attn.varlen_topk_attention(  # noqa: E731
        *leaves, *where, 6, **options, **FLAGS, backend=backend
    )
    (out, lse, indices), (want, want_lse, want_indices) = call(wing.name), call("reference")
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)
    assert not out[sum(QUERIES) :].any()
    weight = normal(*out.shape, seed=9)
    for mine, true in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True
    ):
        assert_close(mine, true, "gradient")


@pytest.mark.parametrize("share", ["none", "kv"])
def test_packed_tails_of_blocks(wing, share):
    """A pack of which some queries see whole blocks of 64 and others do not."""
    cu_seq = torch.tensor([0, 66, 3, 130]).cumsum(0)
    leaves = [normal(199, n, 8, seed=n + s).requires_grad_() for s, n in enumerate((2, 1, 1))]
    call = lambda backend: sparse_attn.varlen_topk_attention(  # noqa: E731
        *leaves, cu_seq, None, 130, 130, 5, is_causal=True, share=share, tail="blocks", return_lse=True,
        backend=backend,
    )  # fmt: skip
    (out, lse), (want, want_lse) = call(wing.name), call("reference")
    assert_close(out, want, "out", units=4)
    assert_close(lse, want_lse, "lse", units=8)
    weight = normal(*out.shape, seed=9)
    for mine, true in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True
    ):
        torch.testing.assert_close(mine, true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_blocks(wing, causal):
    query, key, value, *where = pack(make=normal)
    where[1] = where[0] if causal else where[1]
    if causal:
        key, value = normal(20, 2, 8, seed=4), normal(20, 2, 5, seed=5)
        where[3] = where[2]
    sizes = {"block_size": 4, "query_tile": 3, "is_causal": causal}
    chosen = sparse_attn.varlen_block_select(query, key, *where, 3, share="kv", backend=wing.name, **sizes)
    want = sparse_attn.varlen_block_select(query, key, *where, 3, share="kv", backend="reference", **sizes)
    assert torch.equal(chosen, want)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    call = lambda backend: sparse_attn.varlen_block_attention(  # noqa: E731
        *leaves, chosen, *where, return_lse=True, backend=backend, **sizes
    )
    (out, lse), (want, want_lse) = call(wing.name), call("reference")
    assert_close(out, want, "out", units=4)
    assert_close(lse, want_lse, "lse", units=8)
    weight = normal(*out.shape, seed=9)
    for mine, true in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True
    ):
        torch.testing.assert_close(mine, true, atol=1e-5, rtol=1e-4)


def test_packed_indexer(wing):
    query, key, _, *where = pack()
    weights = normal(query.shape[0], 4, seed=8)
    options = {"is_causal": True, "window": 2, "sinks": 1}
    found = sparse_attn.varlen_indexer_select(query, key, weights, *where, 6, backend=wing.name, **options)
    want = sparse_attn.varlen_indexer_select(query, key, weights, *where, 6, backend="reference", **options)
    assert torch.equal(found, want)


def test_nan_stays_within_a_sequence(wing):
    query, key, value, *where = pack(make=normal)
    key[10, 0, 1] = value[15, 1, 2] = query[0, 3, 2] = float("nan")
    call = lambda backend: sparse_attn.varlen_topk_attention(  # noqa: E731
        query, key, value, *where, 30, is_causal=True, backend=backend
    )
    out, want = call(wing.name), call("reference")
    assert torch.equal(out.isnan(), want.isnan())
    assert_close(out.nan_to_num(), want.nan_to_num(), "out")
