"""Packed sequences: each is what it is alone, to the last bit, and nothing of one reaches another."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import integers, normal
from helpers.pairwise import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import sparse_attn
from sparse_attn import checks
from sparse_attn.ops import varlen

FLAGS = {"return_lse": True, "return_indices": True}


@pytest.fixture(autouse=True)
def _known(request):
    """A wing without offsets of queries refuses packed calls, in one clause; it has no other test here."""
    wing = request.node.callspec.params.get("wing") if hasattr(request.node, "callspec") else None
    if wing is None or wing.refuses_offsets() is None:
        return
    with pytest.raises(ValueError, match=r"it has no .*causal_offsets"):
        wing.varlen_topk_select(
            normal(2, 1, 4), normal(2, 1, 4), torch.tensor([0, 2]), None, 2, 2, 1, is_causal=True
        )
    pytest.skip(f"the {wing.name} wing takes no packed sequences, and says so")


def bounds(lengths, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


def pack(
    lengths_q,
    lengths_k,
    *,
    dtype=torch.float32,
    make=normal,
    behind=0,
    heads=4,
    kv_heads=2,
    dim=9,
    value_dim=5,
):
    """(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k) with some tokens behind the last sequence."""
    total_q, total_k = sum(lengths_q) + behind, sum(lengths_k) + behind
    tensors = (
        make(total_q, heads, dim, dtype=dtype, seed=1),
        make(total_k, kv_heads, dim, dtype=dtype, seed=2),
        make(total_k, kv_heads, value_dim, dtype=dtype, seed=3),
    )
    sizes = max(lengths_q, default=0), max(lengths_k, default=0)
    return *tensors, bounds(lengths_q), bounds(lengths_k, torch.int32).to(torch.int64), *sizes


def alone(tensors, lengths_q, lengths_k, top_k, used=None, *, is_causal=False, **options):
    """For each sequence with queries: its slice of them, and (out, lse, indices) in the packed layout."""
    at_q = at_k = 0
    for s, (count_q, count_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        seen = count_k if used is None else used[s]
        query = tensors[0][at_q : at_q + count_q]
        key, value = (t[at_k : at_k + seen] for t in tensors[1:3])
        if count_q:
            offset = {"is_causal": True, "causal_offset": seen - count_q} if is_causal else {}
            parts = (t.transpose(0, 1)[None] for t in (query, key, value))
            found = sparse_attn.topk_attention(*parts, top_k, **offset, **options, **FLAGS)
            yield slice(at_q, at_q + count_q), [t[0].transpose(0, 1) for t in found]
        at_q, at_k = at_q + count_q, at_k + count_k


def assert_equal_alone(found, expected, rows_: slice) -> None:
    (out, lse, indices), (own_out, own_lse, own_indices) = found, expected
    width = own_indices.shape[-1]
    assert torch.equal(indices[rows_][..., :width], own_indices)
    assert bool((indices[rows_][..., width:] == -1).all())
    assert torch.equal(lse[rows_], own_lse)
    assert torch.equal(out[rows_], own_out)


LENGTHS = {
    "one": ([19], [19]),
    "several, some empty": ([5, 0, 17, 1, 70, 3, 0], [9, 4, 17, 1, 150, 0, 0]),
    "fewer keys than queries": ([12, 33], [3, 20]),
    "many short ones and a long one": ([1, 2] * 40 + [200], [1, 2] * 40 + [200]),
}
PAIRS = rows(
    lengths=list(LENGTHS),
    share=["none", "kv", "all"],
    causal=[{}, {"is_causal": True}, {"is_causal": True, "window": 3}],
    sinks=[0, 2],
    make=["normal", "integers"],
    behind=[0, 2],
)


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_each_sequence_is_what_it_is_alone(wing, dtype, row):
    lengths, share, options, sinks, make, behind = row
    lengths = LENGTHS[lengths]
    make = {"normal": normal, "integers": integers}[make]
    inputs = pack(*lengths, dtype=dtype, make=make, behind=behind)
    options = {**options, "share": share, "sinks": sinks}
    found = wing.call("varlen_topk_attention", *inputs, 6, **options, **FLAGS)
    assert torch.equal(found[2], wing.call("varlen_topk_select", *inputs[:2], *inputs[3:], 6, **options))
    itself = {"backend": wing.name if wing.device == "cpu" else None}
    for where, expected in alone(inputs[:3], *lengths, 6, **options, **itself):
        if wing.name == "cpu":
            assert_equal_alone(found, expected, where)
        else:  # its products may sum in another order
            torch.testing.assert_close(found[1][where], expected[1], atol=2e-2, rtol=2e-2)
    replayed = wing.call("varlen_gathered_attention", *inputs[:3], found[2], *inputs[3:], return_lse=True)
    if wing.name == "triton":  # its one kernel for both does not sum as the other one does
        torch.testing.assert_close(replayed, found[:2], atol=2e-2, rtol=2e-2)
    else:
        assert torch.equal(replayed[0], found[0])
        assert torch.equal(replayed[1], found[1])
    total = sum(lengths[0])
    assert bool((found[0][total:] == 0).all())
    assert bool(found[1][total:].isneginf().all())


def test_used_keys():
    lengths, used = ([4, 1, 30], [10, 40, 64]), [7, 0, 33]
    inputs = pack(*lengths)
    options = {"is_causal": True, "sinks": 1}
    found = sparse_attn.varlen_topk_attention(
        *inputs, 6, seqused_k=torch.tensor(used, dtype=torch.int32), **options, **FLAGS
    )
    for where, expected in alone(inputs[:3], *lengths, 6, used, **options):
        assert_equal_alone(found, expected, where)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_stay_within_a_sequence(causal):
    lengths = ([5, 0, 17, 3], [9, 4, 17, 0])
    query, key, value, *where = pack(*lengths)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = sparse_attn.varlen_topk_attention(*leaves, *where, 6, is_causal=causal, return_lse=True)
    (out.sin().sum() + lse[lse > -torch.inf].cos().sum()).backward()
    at_q = at_k = 0
    for count_q, count_k in zip(*lengths, strict=True):
        a, b = slice(at_q, at_q + count_q), slice(at_k, at_k + count_k)
        own = [
            t[s].transpose(0, 1)[None].clone().requires_grad_()
            for t, s in zip((query, key, value), (a, b, b), strict=True)
        ]
        offset = {"is_causal": True, "causal_offset": count_k - count_q} if causal else {}
        out, lse = sparse_attn.topk_attention(*own, 6, return_lse=True, **offset)
        (out.sin().sum() + lse[lse > -torch.inf].cos().sum()).backward()
        for leaf, s, single in zip(leaves, (a, b, b), own, strict=True):
            if s.stop > s.start:
                assert torch.equal(leaf.grad[s], single.grad[0].transpose(0, 1))
        at_q, at_k = at_q + count_q, at_k + count_k


def test_gradcheck():
    query, key, value, *where = pack(
        [3, 4], [5, 4], dtype=torch.float64, heads=2, kv_heads=1, dim=3, value_dim=2
    )
    inputs = tuple(t.requires_grad_() for t in (query, key, value))
    assert torch.autograd.gradcheck(
        lambda q, k, v: sparse_attn.varlen_topk_attention(q, k, v, *where, 3, is_causal=True), inputs
    )


def test_it_compiles_to_one_graph():
    inputs = pack([5, 12], [5, 12])

    def call(query, key, value, cu_seq_q, cu_seq_k):
        return sparse_attn.varlen_topk_attention(
            query, key, value, cu_seq_q, cu_seq_k, 12, 12, 4, is_causal=True, window=2, sinks=1, **FLAGS
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(*inputs[:5]), call(*inputs[:5]), strict=True):
        assert torch.equal(mine, eager)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=5),
    top_k=st.integers(1, 12),
    causal=st.booleans(),
)
def test_any_lengths(lengths, top_k, causal):
    lengths = [n for n, _ in lengths], [n for _, n in lengths]
    inputs = pack(*lengths)
    found = sparse_attn.varlen_topk_attention(*inputs, top_k, is_causal=causal, **FLAGS)
    assert found[2].shape == (sum(lengths[0]), 4, min(top_k, inputs[6]))
    for where, expected in alone(inputs[:3], *lengths, top_k, is_causal=causal):
        assert_equal_alone(found, expected, where)


def bad(**changes):
    given = dict(
        zip(
            ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
            pack([3, 4], [5, 4]),
            strict=True,
        )
    )
    return {**given, "top_k": 4, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": normal(1, 7, 4, 9)}, "query must have 3 dimensions"),
        ({"value": None}, "value must be a tensor of shape"),
        ({"value": normal(8, 2, 5)}, r"key's tokens and heads, got key \[9, 2, 9\] and value \[8, 2, 5\]"),
        ({"cu_seq_q": [0, 3, 7]}, "cu_seq_q must be an int32 or int64 tensor"),
        ({"cu_seq_q": torch.tensor([0.0, 7.0])}, "cu_seq_q must be int32 or int64"),
        ({"cu_seq_q": torch.tensor([[0, 7]])}, r"cu_seq_q must have shape \[S \+ 1\]"),
        ({"cu_seq_q": torch.tensor([1, 3, 7])}, "cu_seq_q must rise from 0 to at most 7"),
        ({"cu_seq_k": torch.tensor([0, 5, 10])}, "cu_seq_k must rise from 0 to at most 9"),
        ({"cu_seq_k": torch.tensor([0, 6, 5])}, "that fall in between"),
        ({"cu_seq_k": torch.tensor([0, 5])}, "one entry more than there are sequences"),
        ({"cu_seq_q": torch.tensor([], dtype=torch.int64)}, "at least one entry"),
        ({"max_k": 4}, "max_k must be at least the longest sequence of cu_seq_k, 5, got 4"),
        ({"max_q": 2.5}, "max_q must be an int"),
        ({"seqused_k": torch.tensor([6, 1])}, "got 6 for sequence 0 of 5 keys"),
        ({"seqused_k": torch.tensor([1])}, "seqused_k must have one entry per sequence, 2"),
        ({"window": 2}, "window needs is_causal=True"),
        ({"window": 3, "sinks": 2, "is_causal": True}, "top_k is the whole budget"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sparse_attn.varlen_topk_attention(**bad(**changes))


def test_indices_of_other_sequences_are_empty_slots():
    """Past the end of its own sequence, an index is not followed into the next."""
    query, key, value, *where = pack([2, 2], [3, 3])
    indices = torch.tensor([0, 3, -1, 2**31 - 1]).expand(4, 1, 4)
    out = sparse_attn.varlen_gathered_attention(query, key, value, indices, *where)
    first = torch.tensor([0, 0, 3, 3])
    assert torch.equal(out, value[first].repeat_interleave(2, dim=1))
    with pytest.raises(ValueError, match=r"indices must have shape \[T, G, K\] with T = 4"):
        sparse_attn.varlen_gathered_attention(query, key, value, indices[:3], *where)
    with pytest.raises(ValueError, match="G one of 1, Hkv, Hq; here Hkv=2, Hq=4"):
        sparse_attn.varlen_gathered_attention(query, key, value, indices.expand(4, 3, 4), *where)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_few_queries_lie_where_many_do(is_causal, paged, monkeypatch):
    """Of few, Python counts the places; of many, torch does."""
    query, key, _, cu_seq_q, cu_seq_k, *_ = pack([3, 0, 1, 4], [5, 2, 0, 9])
    used = torch.tensor([4, 2, 0, 9], dtype=torch.int32)
    given = (query, key, cu_seq_q, cu_seq_k, 4, 9, is_causal, 0, used)
    if paged:
        pages = normal(3, 16, 2, 9)
        table = torch.tensor([[1, -1], [0, 7], [-9, -1], [2, 0]], dtype=torch.int32)
        given = (query, pages, cu_seq_q, None, 4, 32, is_causal, 0, used, table)
    few = varlen.sequences(*given)
    monkeypatch.setattr(checks.packed, "few_numbers", lambda _: None)
    many = varlen.sequences(*given)
    for name, a, b in zip(few._fields, few, many, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
        assert not isinstance(a, torch.Tensor) or a.dtype == b.dtype
    starts, ends = ([0, 32, 64, 96], [3, 3, 4, 8]) if paged else ([0, 5, 7, 7], [3, 3, 4, 8])
    for i in range(query.shape[0]):
        s = next((s for s in range(4) if i < ends[s]), None)
        if s is None:  # behind the last sequence
            assert few.first[i] == (128 if paged else key.shape[0])
            assert few.keys[i] == 0
            continue
        last = starts[s] + int(used[s]) - 1
        assert few.first[i] == starts[s]
        assert few.keys[i] == used[s]
        assert i + few.offset[i] == (last - (ends[s] - 1 - i) if is_causal else last)


def test_recorded_calls_have_no_numbers_in_them():
    offsets = torch.tensor([0, 3, 5])
    assert checks.packed.few_numbers(offsets) == [0, 3, 5]
    assert checks.packed.few_numbers(torch.arange(257)) is None
    assert checks.packed.few_numbers(offsets.to("meta")) is None
    with FlopCounterMode(display=False):
        assert checks.packed.few_numbers(offsets) is None
    seen = []
    torch.func.vmap(lambda t: seen.append(checks.packed.few_numbers(t)) or t)(offsets[None])
    assert seen == [None]


def test_vmap_over_where_sequences_lie():
    query, key, value = (normal(16, h, 6, seed=h) for h in (4, 2, 2))
    packs = torch.tensor([[0, 5, 5, 14], [0, 3, 7, 16]])

    def call(cu_seq):
        return sparse_attn.varlen_topk_attention(query, key, value, cu_seq, None, 9, 9, 4, is_causal=True)

    for found, cu_seq in zip(torch.func.vmap(call)(packs), packs, strict=True):
        assert torch.equal(found, call(cu_seq))
    with pytest.raises(ValueError, match="cu_seq_q must rise from 0"):
        torch.func.vmap(call)(packs + torch.tensor([[0], [1]]))
