"""Caches in pages: a call is what it is over the same keys end to end, to the last bit, and reads no other page."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers import compare, oracle
from helpers.inputs import integers, normal
from helpers.pairwise import rows
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

import sparse_attn

FLAGS = {"return_lse": True, "return_indices": True}
NAN = float("nan")
NO_INDEX = None, None, None


class Cache(NamedTuple):
    """Sequences in pages, and the same end to end."""

    query: Tensor  # [T, Hq, D]
    pages: tuple[Tensor, Tensor]  # key [P, page size, Hkv, D], value [P, page size, Hkv, Dv]
    packed: tuple[Tensor, Tensor]  # [Tk, Hkv, D], [Tk, Hkv, Dv]
    table: Tensor  # int32 [S, pages]
    queries: list[int]
    used: list[int]

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        device = self.table.device
        cu_seq = [torch.tensor([0, *lengths]).cumsum(0).to(device) for lengths in (self.queries, self.used)]
        return *cu_seq, max(self.queries, default=0), max(self.used, default=0)

    def on(self, device: str) -> Cache:
        tensors = self.query, self.pages, self.packed, self.table
        return Cache(*tree_map(lambda t: t.to(device), tensors), self.queries, self.used)

    def over_pages(self, function: str, *tensors: Tensor, **options):
        cu_seq_q, _, max_q, max_k = self.bounds
        top_k = (6,) if "topk" in function else ()
        used = torch.tensor(self.used, dtype=torch.int64, device=self.table.device)
        given = {"seqused_k": used, "block_table": self.table} | options
        return getattr(sparse_attn, function)(
            self.query, *tensors, cu_seq_q, None, max_q, max_k, *top_k, **given
        )

    def attention(self, **options):
        return self.over_pages("varlen_topk_attention", *self.pages, **options)

    def end_to_end(self, **options):
        return sparse_attn.varlen_topk_attention(self.query, *self.packed, *self.bounds, 6, **options)

    def physical(self, indices: Tensor) -> Tensor:
        """[T, G, K], by the definition: page · page size + place."""
        size = self.pages[0].shape[1]
        of_query = torch.repeat_interleave(torch.tensor(self.queries)).to(self.table.device)
        page = self.table[of_query[:, None, None], (indices.clamp(min=0) // size).long()]
        return torch.where(indices >= 0, page * size + indices % size, -1).to(torch.int32)


def layout_as_given(pages: Tensor) -> Tensor:
    return pages


def layout_in_one(pages: Tensor) -> Tensor:
    """Keys and values of a page beside each other, as vLLM has them: one half of [P, 2, page size, H, D]."""
    both = torch.full((pages.shape[0], 2, *pages.shape[1:]), NAN, dtype=pages.dtype)
    both[:, 1] = pages
    return both[:, 1]


def layout_heads_first(pages: Tensor) -> Tensor:
    return pages.transpose(1, 2).contiguous().transpose(1, 2)


def layout_dims_apart(pages: Tensor) -> Tensor:
    return pages.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    f.__name__.removeprefix("layout_"): f
    for f in (layout_as_given, layout_in_one, layout_heads_first, layout_dims_apart)
}


def cache(
    queries: list[int],
    used: list[int],
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    make=normal,
    layout: str = "as_given",
    value_layout: str | None = None,
    shared: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 9,
    value_dim: int = 5,
) -> Cache:
    """Random page order; behind the used part NaN, in the table numbers that are no pages. The first `shared` pages
    of all sequences are those of the first."""
    counts = [-(-n // size) for n in used]
    order = torch.randperm(sum(counts) + 4, generator=torch.Generator().manual_seed(7)).tolist()
    table = torch.full((len(used), max(counts, default=0) + 2), 10**6, dtype=torch.int32)
    table[:, -1:] = -1
    stored = [torch.full((len(order), size, kv_heads, width), NAN, dtype=dtype) for width in (dim, value_dim)]
    packed: list[list[Tensor]] = [[], []]
    for s, (n, pages) in enumerate(zip(used, counts, strict=True)):
        rows = [
            make(n, kv_heads, width, dtype=dtype, seed=10 * s + i) for i, width in enumerate((dim, value_dim))
        ]
        for j in range(pages):
            common = s > 0 and j < shared and (j + 1) * size <= min(n, used[0])
            page = int(table[0, j]) if common else order.pop()
            table[s, j] = page
            for to, own in zip(stored, rows, strict=True):
                here = slice(j * size, min(n, (j + 1) * size))
                if common:
                    own[here] = to[page]
                else:
                    to[page, : here.stop - here.start] = own[here]
        for to, own in zip(packed, rows, strict=True):
            to.append(own)
    key = LAYOUTS[layout](stored[0])
    value = LAYOUTS[value_layout or layout](stored[1])
    end_to_end = [
        torch.cat(rows) if rows else torch.zeros(0, kv_heads, width, dtype=dtype)
        for rows, width in zip(packed, (dim, value_dim), strict=True)
    ]
    query = make(sum(queries), heads, dim, dtype=dtype, seed=3)
    return Cache(query, (key, value), tuple(end_to_end), table, queries, used)


LENGTHS = {
    "a step": ([1] * 6, [300, 17, 0, 700, 16, 64]),
    "drafts": ([4, 1, 0, 3, 5], [40, 1, 90, 257, 300]),
    "a longer step": ([1, 2, 1] * 9, [150 + 11 * i for i in range(27)]),
    "suffixes": ([40, 1, 70, 20], [140, 333, 70, 12]),
}
PAIRS = rows(
    lengths=list(LENGTHS),
    size=[1, 16, 48, 64, 256],
    share=["none", "kv", "all"],
    options=[
        {},
        {"is_causal": True},
        {"is_causal": True, "window": 2, "sinks": 3},
        {"sinks": 2, "softcap": 0.8, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.1])},
        {"is_causal": True, "scale": -0.7},
    ],
    make=[normal, integers],
    layout=list(LAYOUTS),
    shared=[0, 2],
)


@pytest.mark.parametrize("row", PAIRS, ids=[str(n) for n in range(len(PAIRS))])
def test_it_is_the_call_over_keys_end_to_end(wing, dtype, row):
    lengths, size, share, options, make, layout, shared = row
    if wing.refuses_offsets("paged_attention"):
        pytest.skip(f"the {wing.name} wing has no pages, and says so")
    own = cache(*LENGTHS[lengths], size, dtype=dtype, make=make, layout=layout, shared=shared).on(wing.device)
    options = tree_map_only(Tensor, lambda t: t.to(wing.device), options)
    options = {**options, "share": share, "backend": wing.name}
    out, lse, indices = own.attention(**options, **FLAGS)
    assert out.is_contiguous()
    expected = own.end_to_end(**options, **FLAGS)
    assert torch.equal(indices, expected[2])
    if wing.name == "cpu":
        assert torch.equal(lse, expected[1])
        assert torch.equal(out, expected[0])
    else:  # its products may sum in another order
        torch.testing.assert_close(lse, expected[1], atol=1e-2, rtol=1e-2)
    assert torch.equal(own.over_pages("varlen_topk_select", own.pages[0], **options), indices)
    # Both kinds of indices say the same, and can be replayed.
    physical = own.attention(**options, return_indices=True, physical_indices=True)[1]
    assert torch.equal(physical, own.physical(indices))
    scoring = {name: options[name] for name in ("scale", "softcap", "sink_logits") if name in options}
    for chosen, flag in ((indices, False), (physical, True), (physical.long(), True)):
        again = own.over_pages(
            "varlen_gathered_attention", *own.pages, chosen, physical_indices=flag, return_lse=True,
            backend=wing.name, **scoring,
        )  # fmt: skip
        if wing.name == "triton":  # its one kernel for both does not sum as the other one does
            torch.testing.assert_close(again, (out, lse), atol=2e-2, rtol=2e-2)
        else:
            assert torch.equal(again[0], out)
            assert torch.equal(again[1], lse)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("size", [1, 16, 64])
def test_each_sequence_against_float64(wing, dtype, lengths, share, size):
    if wing.refuses_offsets("paged_attention"):
        pytest.skip(f"the {wing.name} wing has no pages, and says so")
    own = cache(*LENGTHS[lengths], size, dtype=dtype)
    options = {"is_causal": True, "window": 2, "sinks": 1, "share": share}
    found = own.on(wing.device).attention(**options, **FLAGS, backend=wing.name)
    out, lse, indices = (t.cpu() for t in found)
    at_q = at_k = 0
    for count, used in zip(own.queries, own.used, strict=True):
        q = own.query[at_q : at_q + count].transpose(0, 1)[None]
        k, v = (t[at_k : at_k + used].transpose(0, 1)[None] for t in own.packed)
        mine = slice(at_q, at_q + count)
        at_q, at_k = at_q + count, at_k + used
        if not count:
            continue
        chosen = indices[mine].transpose(0, 1)[None]
        assert bool((chosen[..., used:] == -1).all())
        chosen = chosen[..., :used].contiguous()
        causal = {**options, "causal_offset": used - count}
        compare.assert_well_formed(chosen, q, k, 6, **causal)
        compare.assert_best(chosen, q, k, 6, **causal)
        exact, exact_lse = oracle.gathered_attention(q, k, v, chosen)
        compare.assert_close(out[mine].transpose(0, 1)[None], exact, "out")
        compare.assert_close(lse[mine].transpose(0, 1)[None], exact_lse, "lse", units=64)


@pytest.mark.parametrize("layouts", [("as_given", "heads_first"), ("in_one", "as_given")])
def test_keys_and_values_may_lie_differently(layouts):
    own = cache([1, 30, 2], [100, 200, 64], 16, layout=layouts[0], value_layout=layouts[1])
    for mine, expected in zip(
        own.attention(is_causal=True, **FLAGS), own.end_to_end(is_causal=True, **FLAGS), strict=True
    ):
        assert torch.equal(mine, expected)


def test_any_number_of_threads():
    own = cache([1, 3, 0, 40, 1], [5000, 2000, 64, 300, 3000], 16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(own.attention(is_causal=True, **FLAGS))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_lengths_by_cu_seq_k():
    """As continuous batching of Hugging Face gives them; with seqused_k the first so many of those."""
    own = cache([1, 2, 1], [100, 33, 64], 16)
    cu_seq_q, cu_seq_k, *most = own.bounds
    table = {"block_table": own.table, "is_causal": True}
    by_cu = sparse_attn.varlen_topk_attention(own.query, *own.pages, cu_seq_q, cu_seq_k, *most, 6, **table)
    assert torch.equal(by_cu, own.attention(is_causal=True))
    fewer = torch.tensor([90, 33, 2])
    both = sparse_attn.varlen_topk_attention(
        own.query, *own.pages, cu_seq_q, cu_seq_k, *most, 6, seqused_k=fewer, **table
    )
    assert torch.equal(both, own.attention(is_causal=True, seqused_k=fewer))
    assert torch.equal(both, own.end_to_end(is_causal=True, seqused_k=fewer))


def test_int64_tables_and_queries_behind_the_last_sequence():
    own = cache([1, 2, 1], [100, 33, 64], 16)
    out = own.attention(is_causal=True)
    wide = own.table.long()
    wide[wide < 0] = 2**32  # its lower half is page 0
    longer = own._replace(query=torch.cat((own.query, own.query)), table=wide)
    found, lse = longer.attention(is_causal=True, return_lse=True)
    assert torch.equal(found[:4], out)
    assert bool((found[4:] == 0).all())
    assert bool(lse[4:].isneginf().all())


def test_nothing():
    empty = cache([], [], 16)
    out, lse, indices = empty.attention(**FLAGS)
    assert (out.shape, lse.shape, indices.shape) == ((0, 4, 5), (0, 4), (0, 4, 0))
    no_pages = cache([2, 1], [0, 0], 16)
    pages = tuple(t[:0] for t in no_pages.pages)
    out, lse, indices = no_pages._replace(pages=pages).attention(is_causal=True, **FLAGS)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())
    assert indices.shape == (3, 4, 0)
    no_table = no_pages._replace(table=torch.zeros(2, 0, dtype=torch.int32))
    sinks = torch.arange(4.0)
    out, lse = no_table.attention(sink_logits=sinks, return_lse=True)
    assert bool((out == 0).all())
    assert torch.equal(lse, sinks.expand(3, 4))


def test_it_compiles_to_one_graph():
    own = cache([1, 3], [100, 60], 16)

    def call(query, key, value, cu_seq_q, used, table):
        return sparse_attn.varlen_topk_attention(
            query, key, value, cu_seq_q, None, 3, 128, 6, is_causal=True, seqused_k=used, block_table=table,
            physical_indices=True, **FLAGS,
        )  # fmt: skip

    inputs = own.query, *own.pages, own.bounds[0], torch.tensor(own.used), own.table
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(*inputs), call(*inputs), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.parametrize("op", ["paged_select", "paged_attention"])
@pytest.mark.parametrize("entry", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("queries", [3, 20])
def test_a_direct_call_follows_no_entry_that_is_no_page(wing, op, entry, queries):
    """Keys of such pages do not exist."""
    if wing.refuses_offsets("paged_attention"):
        pytest.skip(f"the {wing.name} wing has no pages, and says so")
    query = normal(1, 2, queries, 4)
    key = normal(3, 1, 16, 4)
    table = torch.tensor([[2, entry, 0]], dtype=torch.int32)
    starts, offsets = torch.zeros(1, queries, dtype=torch.int64), 47 - torch.arange(queries)[None]
    rule = None, None, starts, offsets, [1, 0, 0, 18, 2], 0.5, 0.0, None
    tensors = (query, key) if op == "paged_select" else (query, key, key)
    call = getattr(getattr(torch.ops.sparse_attn, op), wing.name)
    given = tree_map_only(Tensor, lambda t: t.to(wing.device), (*tensors, table, 40, *rule, *NO_INDEX))
    found = tree_map_only(Tensor, lambda t: t.cpu(), call(*given))
    indices = found if op == "paged_select" else found[2]
    there = [*range(16), *range(32, 48)]
    assert indices[0].tolist() == [[[*there, *[-1] * 8]] * queries] * 2
    if op == "paged_attention":
        both = key[[2, 0]].transpose(0, 1).reshape(1, 1, 32, 4)
        dense = sparse_attn.topk_attention(query, both, both, 32, scale=0.5)
        torch.testing.assert_close(found[0].transpose(0, 1)[None], dense)


@pytest.mark.parametrize("op", ["paged_select", "paged_attention"])
def test_a_direct_call_that_does_not_fit_is_refused(op):
    query, key, table = normal(1, 2, 3, 4), normal(3, 1, 16, 4), torch.zeros(1, 2, dtype=torch.int32)
    starts, offsets = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[31, 30, 29]])
    rule = None, None, starts, offsets, [1, 0, 0, 0, 2], 0.5, 0.0, None
    call = getattr(torch.ops.sparse_attn, op).cpu
    caches = (key,) if op == "paged_select" else (key, key)
    rule = *rule, *NO_INDEX
    call(query, *caches, table, 4, *rule)
    wrong = [
        (query.expand(2, -1, -1, -1), *caches, table, 4, *rule),
        (query, *(t[..., :3] for t in caches), table, 4, *rule),
        (query, *caches, table.long(), 4, *rule),
        (query, *caches, table[0], 4, *rule),
        (query, *caches, table, 4, *rule[:2], None, *rule[3:]),
        (query, *caches, table, 4, *rule[:3], offsets + 1, *rule[4:]),
        (query, *caches, table, 4, torch.ones(1, 2, 3, 32, dtype=torch.bool), *rule[1:]),
        (query, *caches, table, 4, *rule[:4], [0, 0, 0, 0, 2], *rule[5:]),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="paged"):
            call(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seqused_k": None}, ValueError, "block_table needs seqused_k"),
        ({"seqused_k": torch.tensor([100])}, ValueError, "one entry per sequence, 2"),
        ({"seqused_k": torch.tensor([100, -1])}, ValueError, "got -1 for sequence 1 of 144 keys"),
        ({"seqused_k": torch.tensor([145, 60])}, ValueError, "got 145 for sequence 0 of 144 keys"),
        ({"seqused_k": torch.tensor([113, 60])}, ValueError, "max_k must be at least .* 113, got 100"),
        ({"block_table": torch.zeros(2, 9)}, TypeError, "block_table must be an int32"),
        ({"block_table": torch.zeros(3, 9, dtype=torch.int32)}, ValueError, "with S = 2 sequences"),
        ({"block_table": torch.full((2, 9), 99)}, IndexError, r"pages 0 … 14 .* got 99 for page 0 of seq"),
        ({"block_table": torch.full((2, 9), -3).int()}, IndexError, "got -3 for page 0 of sequence 0"),
        ({"key": normal(15, 8, 2, 9)}, ValueError, "pages of 1 key or of a multiple of 16, got pages of 8"),
        ({"key": normal(240, 2, 9)}, ValueError, "key must have 4 dimensions"),
        ({"value": normal(14, 16, 2, 5)}, ValueError, "with the key's pages and heads"),
        ({"value": normal(240, 2, 5)}, ValueError, "value must have 4 dimensions"),
        ({"query": normal(4, 3, 9)}, ValueError, "multiple of the number of key heads"),
        ({"query": normal(4, 4, 8)}, ValueError, "one head dimension"),
        ({"query": normal(4, 4, 9, dtype=torch.bfloat16)}, TypeError, "one dtype"),
        ({"physical_indices": 1}, TypeError, "physical_indices must be True or False"),
        ({"cu_seq_k": torch.tensor([0, 100, 50])}, ValueError, "fall in between"),
        ({"cu_seq_k": torch.tensor([0, 100])}, ValueError, "one entry more than there are sequences"),
        ({"cu_seq_k": torch.tensor([0, 90, 160])}, ValueError, "and of cu_seq_k, got 100 for sequence 0"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    own = cache([1, 3], [100, 60], 16)
    assert own.pages[0].shape[0] == 15
    assert own.table.shape[1] == 9
    cu_seq_q, _, max_q, max_k = own.bounds
    given = {
        "query": own.query, "key": own.pages[0], "value": own.pages[1], "cu_seq_q": cu_seq_q, "cu_seq_k": None,
        "max_q": max_q, "max_k": max_k, "top_k": 6, "seqused_k": torch.tensor(own.used),
        "block_table": own.table,
    }  # fmt: skip
    sparse_attn.varlen_topk_attention(**given)
    with pytest.raises(error, match=message):
        sparse_attn.varlen_topk_attention(**{**given, **changes})


def test_what_pages_do_not_have_is_refused():
    own = cache([1, 3], [100, 60], 16)
    chosen = own.attention(return_indices=True)[1]
    for at in range(3):
        leaves = [t.detach().requires_grad_(i == at) for i, t in enumerate((own.query, *own.pages))]
        given = own._replace(query=leaves[0], pages=tuple(leaves[1:]))
        with pytest.raises(NotImplementedError, match="no gradient: call it under"):
            given.attention()
        with pytest.raises(NotImplementedError, match="no gradient"):
            given.over_pages("varlen_gathered_attention", *given.pages, chosen)
        with torch.no_grad():
            assert torch.equal(given.attention(), own.attention())
        assert not given.over_pages("varlen_topk_select", given.pages[0]).requires_grad
    for function in (sparse_attn.varlen_topk_select, sparse_attn.varlen_topk_attention):
        tensors = own.packed[: 1 if function is sparse_attn.varlen_topk_select else 2]
        with pytest.raises(ValueError, match="physical_indices needs block_table"):
            function(own.query, *tensors, *own.bounds, 6, physical_indices=True)
    with pytest.raises(ValueError, match="physical_indices needs block_table"):
        sparse_attn.varlen_gathered_attention(
            own.query, *own.packed, chosen, *own.bounds, physical_indices=True
        )
    if "cuda" in {w.name for w in sparse_attn.wings.base.wings()}:
        with pytest.raises(ValueError, match="backend='cuda' cannot run varlen_topk_attention"):
            own.attention(backend="cuda")


def test_physical_indices_that_are_no_keys_are_empty_slots():
    own = cache([1, 1], [20, 16], 16)
    total = own.pages[0].shape[0] * 16
    page = int(own.table[1, 0])
    indices = torch.tensor([-1, total, -(2**31), 2**40, page * 16 + 3]).expand(2, 1, 5)
    out = own.over_pages("varlen_gathered_attention", *own.pages, indices, physical_indices=True)
    assert torch.equal(out, own.pages[1][page, 3].repeat_interleave(2, dim=0).expand(2, -1, -1))
