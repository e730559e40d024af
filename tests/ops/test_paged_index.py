"""An index in pages beside a cache in pages changes what a step costs, never what it gives."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import integers, normal
from helpers.pairwise import rows
from helpers.wings import overload

import sparse_attn
from sparse_attn import KeyIndex, PagedKeyIndex

FLAGS = {"return_lse": True, "return_indices": True}


def outliers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    sizes = torch.linspace(-3, 1, shape[-1]).exp()
    return ((normal(*shape, seed=seed) + 4 * normal(shape[-1], seed=9)) * sizes).to(dtype)


def alike(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (1 + 1e-3 * normal(*shape, seed=seed)).to(dtype)


class Served:
    """A cache, its index, and sequences that grow in it."""

    def __init__(self, used, size, *, dtype=torch.float32, make=normal, heads=4, kv_heads=2, dim=64) -> None:
        counts = [-(-(n + 8) // size) for n in used]
        pages = sum(counts) + 2
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(5))
        self.table = torch.full((len(used), max(counts)), -1, dtype=torch.int32)
        begin = 0
        for s, count in enumerate(counts):
            self.table[s, :count] = order[begin : begin + count].to(torch.int32)
            begin += count
        shape = pages, size, kv_heads, dim
        # What nobody wrote is never read through: NaN would show.
        self.key, self.value = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        self.index = PagedKeyIndex.of(self.key)
        self.size, self.make, self.dtype, self.heads = size, make, dtype, heads
        self.used = [0] * len(used)
        self.append(used)

    def slots(self, sequence: int, count: int) -> torch.Tensor:
        at = self.used[sequence] + torch.arange(count)
        return self.table[sequence, at // self.size].long() * self.size + at % self.size

    def append(self, counts, seed: int = 0) -> None:
        slots = torch.cat([self.slots(s, n) for s, n in enumerate(counts)])
        _, _, heads, dim = self.key.shape
        new = self.make(len(slots), heads, dim, dtype=self.dtype, seed=seed)
        self.key.flatten(0, 1)[slots] = new
        self.value.flatten(0, 1)[slots] = normal(len(slots), heads, dim, dtype=self.dtype, seed=seed + 1)
        assert self.index.write(slots, new) is self.index
        self.used = [a + n for a, n in zip(self.used, counts, strict=True)]

    def call(self, queries, top_k, *, index=None, function="varlen_topk_attention", **options):
        query = self.make(sum(queries), self.heads, self.key.shape[3], dtype=self.dtype, seed=77)
        caches = (self.key, self.value) if function == "varlen_topk_attention" else (self.key,)
        sizes = torch.tensor([0, *queries]).cumsum(0), None, max(queries), max(self.used)
        return getattr(sparse_attn, function)(
            query, *caches, *sizes, top_k, seqused_k=torch.tensor(self.used), block_table=self.table,
            key_index=index, **options,
        )  # fmt: skip

    def assert_same(self, queries, top_k, **options) -> None:
        plain = self.call(queries, top_k, **FLAGS, **options)
        for a, b in zip(self.call(queries, top_k, index=self.index, **FLAGS, **options), plain, strict=True):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        chosen = self.call(queries, top_k, index=self.index, function="varlen_topk_select", **options)
        assert torch.equal(chosen, plain[2])


PAIRS = rows(
    lengths=[([1, 1, 1], [700, 33, 1500]), ([4, 1, 16], [90, 2000, 300]), ([1, 30], [1000, 900])],
    size=[16, 64, 256],
    share=["none", "kv"],
    options=[
        {"is_causal": True},
        {},
        {"is_causal": True, "window": 2, "sinks": 3},
        {"is_causal": True, "softcap": 0.8, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.1])},
        {"is_causal": True, "scale": -0.7},
    ],
    make=[normal, integers, outliers, alike],
    dim=[64, 33, 128],
    top_k=[6, 100],
)


@pytest.mark.parametrize("row", PAIRS, ids=[str(n) for n in range(len(PAIRS))])
def test_the_same_result(wing, dtype, row):
    (queries, used), size, share, options, make, dim, top_k = row
    if wing.refuses_offsets("paged_attention") or wing.device != "cpu":
        pytest.skip(f"the {wing.name} wing has no pages, and says so")
    served = Served(used, size, dtype=dtype, make=make, dim=dim)
    served.assert_same(queries, top_k, share=share, backend=wing.name, **options)
    served.append([n % 3 for n in range(1, len(used) + 1)], seed=3)
    served.assert_same(queries, top_k, share=share, backend=wing.name, **options)


def test_the_index_is_used(monkeypatch):
    """A lie about a key in the index alone is believed: it was ruled out by its bounds."""
    served = Served([2000], 64)
    best = int(served.call([1], 1, function="varlen_topk_select")[0, 0, 0])
    page, lane = int(served.table[0, best // 64]), best % 64
    for at in (
        served.index.codes[page, :, lane // 16, :, lane % 16],
        served.index.bounds[page, :, lane // 16, :, lane % 16],
    ):
        at.zero_()
    found = served.call([1], 1, index=served.index, function="varlen_topk_select")
    assert int(found[0, 0, 0]) != best


@pytest.mark.parametrize("written", [0, 500])
def test_keys_that_it_was_not_told_of_are_scored(written):
    served = Served([2000, 900], 64)
    index = PagedKeyIndex.of(served.key)
    if written:
        slots = torch.cat(
            [served.table[0, at // 64].long() * 64 + at % 64 for at in torch.arange(written)[:, None]]
        )
        index.write(slots, served.key.flatten(0, 1)[slots])
    expected = served.call([1, 2], 32, is_causal=True, **FLAGS)
    for a, b in zip(served.call([1, 2], 32, index=index, is_causal=True, **FLAGS), expected, strict=True):
        assert torch.equal(a, b)


def test_of_a_cache_that_is_full_already():
    served = Served([700, 300], 16)
    slots = torch.cat(
        [
            served.table[s, at // 16].long() * 16 + at % 16
            for s, n in enumerate(served.used)
            for at in [torch.arange(n)]
        ]
    )
    served.index = PagedKeyIndex.of(served.key, slots)
    served.assert_same([1, 1], 20, is_causal=True)


def test_pages_that_go_to_another_sequence():
    served = Served([640, 640], 64)
    served.assert_same([1, 1], 20)
    served.used[0] = 0  # it leaves; another takes its pages
    served.append([500, 0], seed=40)
    served.assert_same([1, 1], 20)


@pytest.mark.parametrize("seed", range(4))
def test_nan_and_infinity(seed):
    served = Served([900, 400], 64)
    generator = torch.Generator().manual_seed(seed)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        slot = served.table[0, 0].long() * 64 + torch.randint(64, (1,), generator=generator)
        served.key.flatten(0, 1)[slot, 1, 3] = value
        served.index.write(slot, served.key.flatten(0, 1)[slot])
        served.assert_same([1, 2], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_definition(dtype):
    """Written in any order and any parts; of keys with one slot the last one stays."""
    key = outliers(100, 2, 33, dtype=dtype, seed=1)
    slots = torch.randperm(5 * 32, generator=torch.Generator().manual_seed(2))[:100]
    slots[3] = slots[70]
    shift = key.float().mean(0).contiguous()
    found = {}
    for name in ("cpu", "reference"):
        index = PagedKeyIndex.of(torch.zeros(5, 32, 2, 33, dtype=dtype))
        for part in (slice(0, 37), slice(37, 38), slice(38, 100)):
            overload("index_pages", name)(key[part], slots[part], index.codes, index.bounds, shift)
        found[name] = index
    assert int((found["cpu"].codes.int() - found["reference"].codes.int()).abs().max()) <= 1
    finite = found["cpu"].bounds.isfinite()
    assert torch.equal(finite, found["reference"].bounds.isfinite())
    assert int((~finite).sum()) == (5 * 32 - 99) * 2
    torch.testing.assert_close(found["cpu"].bounds, found["reference"].bounds, rtol=1e-2, atol=1e-4)


def test_rows_are_those_of_a_key_index():
    """Bit for bit, page by page, where the shift is the same."""
    key = normal(96, 2, 33)
    paged = PagedKeyIndex.of(torch.zeros(3, 32, 2, 33)).write(torch.arange(96), key)
    plain = KeyIndex.of(key.transpose(0, 1)[None])
    plain.shift.copy_(paged.shift[None])
    plain.crop(0).append(key.transpose(0, 1)[None])
    assert torch.equal(paged.codes.transpose(0, 1).flatten(1, 2), plain.codes[0])
    assert torch.equal(paged.bounds.transpose(0, 1).flatten(1, 2), plain.bounds[0])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name):
    index = PagedKeyIndex.of(torch.zeros(3, 32, 2, 33))
    arguments = (
        normal(5, 2, 33),
        torch.tensor([4, 5, 90, 31, 32]),
        index.codes,
        index.bounds,
        torch.zeros(2, 33),
    )
    torch.library.opcheck(overload("index_pages", name), arguments)


def test_it_compiles_to_one_graph():
    served = Served([300, 200], 16)

    def step(query, key, value, cu_seq, used, table):
        return sparse_attn.varlen_topk_attention(
            query, key, value, cu_seq, None, 1, 320, 6, is_causal=True, seqused_k=used, block_table=table,
            key_index=served.index, **FLAGS,
        )  # fmt: skip

    given = (
        normal(2, 4, 64), served.key, served.value, torch.tensor([0, 1, 2]), torch.tensor(served.used),
        served.table,
    )  # fmt: skip
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), step(*given), strict=True):
        assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    key = torch.zeros(3, 32, 2, 8)
    index = PagedKeyIndex.of(key)
    slots, new = torch.arange(4), normal(4, 2, 8)
    with pytest.raises(ValueError, match="pages of a multiple of 16 keys, got pages of 1"):
        PagedKeyIndex.of(torch.zeros(3, 1, 2, 8))
    with pytest.raises(ValueError, match="key must have 4 dimensions"):
        PagedKeyIndex.of(torch.zeros(3, 32, 8))
    with pytest.raises(TypeError, match="slots must be an int64"):
        index.write([0, 1, 2, 3], new)
    with pytest.raises(ValueError, match=r"slots must have shape \[T\]"):
        index.write(slots[None], new)
    for wrong in (-1, 96):
        with pytest.raises(IndexError, match=f"slots must be 0 … 95, got {wrong}"):
            index.write(torch.tensor([0, 1, 2, wrong]), new)
    with pytest.raises(TypeError, match=r"one of torch.float32 keys, got key torch.float16"):
        index.write(slots, new.half())
    with pytest.raises(ValueError, match=r"\[4, 2, 8\] on cpu, one for each slot"):
        index.write(slots, new[:3])
    assert index.shift is None  # a refused call changes nothing
    assert bool((index.codes == 0).all())
    index.write(slots, new)
    call = {
        "max_q": 1, "max_k": 32, "top_k": 4, "cu_seq_q": torch.tensor([0, 1]), "cu_seq_k": None,
        "seqused_k": torch.tensor([4]), "block_table": torch.zeros(1, 1, dtype=torch.int32),
    }  # fmt: skip
    query = normal(1, 2, 8)
    sparse_attn.varlen_topk_select(query, key, **call, key_index=index)
    with pytest.raises(ValueError, match=r"is of pages .* = \[3, 32, 2, 8\], got key \[2, 32, 2, 8\]"):
        sparse_attn.varlen_topk_select(query, key[:2], **call, key_index=index)
    with pytest.raises(TypeError, match=r"must be a sparse_attn.PagedKeyIndex of the pages, got"):
        sparse_attn.varlen_topk_select(query, key, **call, key_index=KeyIndex.of(normal(1, 2, 4, 8)))
    with pytest.raises(TypeError, match=r"one of torch.float32 keys"):
        sparse_attn.varlen_topk_select(query.half(), key.half(), **call, key_index=index)
    packed = normal(4, 2, 8)
    for function, tensors in (("varlen_topk_select", (packed,)), ("varlen_topk_attention", (packed, packed))):
        with pytest.raises(ValueError, match="key_index needs block_table in a packed call"):
            getattr(sparse_attn, function)(
                query, *tensors, torch.tensor([0, 1]), torch.tensor([0, 4]), 1, 4, 2, key_index=index
            )
