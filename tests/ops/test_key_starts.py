"""`key_starts`: against a mask that says the same, and against each sequence alone, to the last bit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from helpers import oracle
from helpers.compare import assert_best, assert_identical
from helpers.inputs import integers, mask, normal, qkv
from helpers.pairwise import rows
from helpers.wings import DTYPES, WingUnderTest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn.selection import Exact, LowRank, Refined, Rounded, Rule, attend
from sparse_attn.wings import extension

INT64 = torch.iinfo(torch.int64)
SHARES = ("none", "kv", "all")
FLAGS = {"return_lse": True, "return_indices": True}
# Other wings promise a sequence the keys that it has alone; this one their order of summation, too.
cpu = WingUnderTest("cpu", "cpu", DTYPES[:3])
natively = pytest.mark.skipif(extension.module is None, reason=str(extension.load_error))
FLOATS = DTYPES[:3]


@pytest.fixture(autouse=True)
def _known(request):
    """A wing that has not learned starts refuses them, in one clause; it has no other test here."""
    wing = request.node.callspec.params.get("wing") if hasattr(request.node, "callspec") else None
    if wing is None or wing.refuses("topk_select", rule=Rule(key_starts=torch.zeros(1).int())) is None:
        return
    with pytest.raises(ValueError, match="it has no key_starts"):
        wing.topk_select(
            normal(1, 1, 2, 4), normal(1, 1, 2, 4), 1, key_starts=torch.zeros(1, dtype=torch.int64)
        )
    pytest.skip(f"the {wing.name} wing has no key_starts, and says so")


def documents(*cuts: int, batch: int = 1, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[B, T]: where the document of each position begins."""
    lengths = torch.tensor(cuts).diff()
    return torch.tensor(cuts[:-1]).repeat_interleave(lengths).to(dtype).expand(batch, -1)


def starts_of(kind: str, batch: int, queries: int, keys: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(queries * keys)
    if kind == "left padding":
        return torch.arange(batch, dtype=torch.int32) * 5
    if kind == "beyond both ends":
        edges = torch.tensor([INT64.min, -1, 0, 1, keys - 1, keys, INT64.max])
        return edges[torch.randint(0, len(edges), (batch, queries), generator=generator)]
    if kind == "strided":
        return torch.randint(-3, keys, (queries, 2 * batch), generator=generator).int().T[::2]
    if kind == "one number":
        return torch.tensor([[3]]).expand(batch, queries)
    cuts = [0, queries // 3, queries // 3 + 1, queries]
    return documents(*cuts, batch=batch) + (keys - queries if keys > queries else 0)


KINDS = ("left padding", "beyond both ends", "strided", "one number", "documents")
PAIRS = rows(
    kind=KINDS,
    share=SHARES,
    causal=[{}, {"is_causal": True}, {"is_causal": True, "window": 3}],
    sinks=[0, 2],
    lengths=[None, torch.int32],
    seen=[False, True],
    sizes=[(17, 17), (9, 70), (33, 20), (1, 40)],
)


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_it_is_a_mask(wing, dtype, row):
    """Any two parts of the rule meet: integers give the oracle's very indices, normal numbers the best."""
    kind, share, options, sinks, lengths, seen, (queries, keys) = row
    options = {**options, "sinks": sinks, "key_starts": starts_of(kind, 2, queries, keys)}
    if options.get("is_causal"):
        options["causal_offset"] = keys - queries
    if lengths is not None:
        options["key_lengths"] = torch.tensor([keys, keys // 2], dtype=lengths)
    if seen:
        options["attn_mask"] = mask(2, 1, queries, keys)
    inputs = qkv(2, 4, 2, queries, keys, 9, 5, dtype=dtype, make=integers)
    assert_identical(wing.topk_select(*inputs[:2], 6, **options), *inputs[:2], 6, **options)
    inputs = qkv(2, 4, 2, queries, keys, 9, 5, dtype=dtype)
    out, lse, indices = wing.topk_attention(*inputs, 6, share=share, **FLAGS, **options)
    assert_best(indices, *inputs[:2], 6, share=share, **options)
    assert torch.equal(out, wing.gathered_attention(*inputs, indices))
    assert torch.equal(lse.isneginf(), ~oracle.visible(*inputs[:2], **options).any(-1))


def alone(function, starts: list[tuple[int, int]], tensors, **options):
    """Per sequence (begin, end): what `function` gives for it by itself, indices shifted back."""
    for begin, end in starts:
        yield begin, end, function(*(t[:, :, begin:end] for t in tensors), **options)


def assert_shifted(together: torch.Tensor, single: torch.Tensor, begin: int) -> None:
    """Indices of a sequence in its row, and of it alone, whose budget may be cut to its length."""
    width = single.shape[-1]
    assert torch.equal(together[..., :width], torch.where(single >= 0, single + begin, -1))
    assert bool((together[..., width:] == -1).all())


CUTS = (0, 1, 18, 19, 77, 150, 333)  # none of them where a vector or a panel begins


@pytest.mark.parametrize("make", [integers, normal], ids=["ties", "normal"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", FLOATS)
@natively
def test_packed_documents_are_documents_alone(dtype, share, make):
    """Causal, with sinks and a window of their own: indices, out and LSE, to the last bit."""
    inputs = qkv(1, 4, 2, CUTS[-1], CUTS[-1], 24, 40, dtype=dtype, make=make)
    options = {"is_causal": True, "window": 3, "sinks": 2, "share": share}
    out, lse, indices = cpu.topk_attention(*inputs, 16, **FLAGS, key_starts=documents(*CUTS), **options)
    quantized = cpu.quantized_select(
        *inputs[:2], 16, key_starts=documents(*CUTS, dtype=torch.int32), **options
    )
    pieces = list(itertools.pairwise(CUTS))
    for begin, end, single in alone(cpu.topk_attention, pieces, inputs, top_k=16, **FLAGS, **options):
        assert torch.equal(out[:, :, begin:end], single[0])
        assert torch.equal(lse[:, :, begin:end], single[1])
        assert_shifted(indices[:, :, begin:end], single[2], begin)
    for begin, end, single in alone(cpu.quantized_select, pieces, inputs[:2], top_k=16, **options):
        assert_shifted(quantized[:, :, begin:end], single, begin)


@pytest.mark.parametrize("make", [integers, normal], ids=["ties", "normal"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("queries", [333, 7])
@pytest.mark.parametrize("dtype", FLOATS)
@natively
def test_padded_batches_are_sequences_alone(dtype, share, make, queries):
    """Padding on the left, and with key_lengths on the right: the last queries of each, and a few of them."""
    starts, ends = [0, 61, 200], [333, 333, 290]
    query, key, value = qkv(3, 4, 2, queries, 333, 24, 40, dtype=dtype, make=make)
    options = {"is_causal": True, "causal_offset": 333 - queries, "window": 3, "sinks": 2, "share": share}
    padding = {"key_starts": torch.tensor(starts), "key_lengths": torch.tensor(ends)}
    out, lse, indices = cpu.topk_attention(query, key, value, 16, **FLAGS, **options, **padding)
    for b, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        rows_of = slice(max(0, begin - 333 + queries), queries)
        options["causal_offset"] = 333 - queries + rows_of.start - begin
        single = cpu.topk_attention(
            query[b : b + 1, :, rows_of],
            *(t[b : b + 1, :, begin:end] for t in (key, value)),
            16,
            **FLAGS,
            **options,
        )
        assert torch.equal(out[b : b + 1, :, rows_of], single[0])
        assert torch.equal(lse[b : b + 1, :, rows_of], single[1])
        assert_shifted(indices[b : b + 1, :, rows_of], single[2], begin)
        assert bool((indices[b, :, : rows_of.start] == -1).all())


@pytest.mark.parametrize("int8", [False, True])
def test_an_indexer_of_packed_documents(wing, dtype, int8):
    query, key, weights = (normal(1, h, CUTS[-1], 12, dtype=dtype, seed=h) for h in (6, 2, 1))
    weights = weights[..., :6].transpose(1, 3).squeeze(-1)
    options = {"is_causal": True, "window": 3, "sinks": 2, "int8": int8}
    together = wing.indexer_select(query, key, weights, 16, key_starts=documents(*CUTS), **options)
    for begin, end in itertools.pairwise(CUTS):
        part = slice(begin, end)
        single = wing.indexer_select(query[:, :, part], key[:, :, part], weights[:, :, part], 16, **options)
        assert_shifted(together[:, :, part], single, begin)


@pytest.mark.parametrize("share", SHARES)
def test_whole_blocks_of_packed_documents(wing, dtype, share):
    """Documents that begin where blocks do choose the blocks that they would choose alone, and attend alike."""
    cuts = (0, 64, 192, 256, 416)
    query, key, value = qkv(1, 4, 2, cuts[-1], cuts[-1], 24, 40, dtype=dtype)
    sizes = {"block_size": 16, "query_tile": 16, "is_causal": True}
    starts = {"key_starts": documents(*cuts)}
    blocks = sparse_attn.block_select(query, key, 3, share=share, backend=wing.name, **starts, **sizes)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out, lse = wing.block_attention(*inputs, blocks, return_lse=True, **starts, **sizes)
    grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    refined = wing.refine_blocks(query, key, blocks, 20, window=3, sinks=2, share=share, **starts, **sizes)
    for begin, end in itertools.pairwise(cuts):
        part = [t.detach()[:, :, begin:end].requires_grad_() for t in inputs]
        single = sparse_attn.block_select(*part[:2], 3, share=share, backend=wing.name, **sizes)
        tiles = blocks[:, :, begin // 16 : end // 16]
        assert_shifted(tiles, single, begin // 16)
        own, own_lse = wing.block_attention(*part, single, return_lse=True, **sizes)
        own_grads = torch.autograd.grad(own.sum() + own_lse.sum(), part)
        own_refined = wing.refine_blocks(*part[:2], single, 20, window=3, sinks=2, share=share, **sizes)
        if wing.name == "cpu":
            assert torch.equal(out[:, :, begin:end], own)
            assert torch.equal(lse[:, :, begin:end], own_lse)
            assert_shifted(refined[:, :, begin:end], own_refined, begin)
        for all_of, mine in zip((out, *grads), (own, *own_grads), strict=True):
            torch.testing.assert_close(all_of[:, :, begin:end], mine)


def test_selectors_take_it():
    """By the rule, like every other part: whole blocks, refined ones, rounded, low rank."""
    query, key, value = qkv(2, 4, 2, 128, 128, 16)
    plain = Rule(is_causal=True, key_starts=torch.tensor([0, 32]))
    rule = replace(plain, sinks=1, window=2)
    scorer = sparse_attn.nn.LowRankScorer(2, 16, 8).calibrate(query, key).fit()
    blocks = sparse_attn.selection.Blocks(16, 16)
    for selector, of_it in (
        (Exact(), rule),
        (Rounded(), rule),
        (LowRank(scorer), rule),
        (Refined(2, blocks), plain),
    ):
        chosen = selector.select(query, key, 32, of_it).indices
        assert bool((chosen[1, :, :32] == -1).all())
        assert bool((chosen[1][chosen[1] >= 0] >= 32).all())
        if of_it.sinks:
            assert bool((chosen[1, :, 32:, 0] == 32).all())
    out = attend(query, key, value, blocks.select(query, key, 64, plain), rule=plain)
    query, key, value = (t[1:, :, 32:] for t in (query, key, value))
    single = attend(
        query, key, value, blocks.select(query, key, 64, Rule(is_causal=True)), rule=Rule(is_causal=True)
    )
    assert torch.equal(out[1:, :, 32:], single)
    assert not out[1, :, :32].any()


def test_the_loss_of_an_indexer():
    """As under a mask that says the same."""
    query, key = normal(2, 4, 20, 8, seed=1), normal(2, 2, 20, 8, seed=2)
    index = normal(2, 3, 20, 5, seed=3), normal(2, 1, 20, 5, seed=4), normal(2, 3, 20, seed=5)
    starts = documents(0, 7, 8, 20, batch=2)
    seen = oracle.visible(query[:, :1], key, key_starts=starts)
    ours = sparse_attn.indexer_loss(*index, query, key, is_causal=True, key_starts=starts)
    assert torch.equal(ours, sparse_attn.indexer_loss(*index, query, key, is_causal=True, attn_mask=seen))


def test_the_indexer_module_takes_it():
    """Packed documents select what each selects alone, and the loss is that of the mask."""
    indexer = sparse_attn.nn.Indexer(12, num_heads=3, head_dim=8)
    hidden, query, key = normal(1, 20, 12), normal(1, 4, 20, 8, seed=1), normal(1, 2, 20, 8, seed=2)
    starts = documents(0, 7, 20)
    indices = indexer.select(hidden, 4, key_starts=starts, sinks=1)
    assert_shifted(indices[:, :, 7:], indexer.select(hidden[:, 7:], 4, sinks=1), 7)
    seen = oracle.visible(query[:, :1], key, key_starts=starts)
    ours = indexer.loss(hidden, query, key, key_starts=starts)
    assert torch.equal(ours, indexer.loss(hidden, query, key, attn_mask=seen))


def test_values_that_are_no_numbers_stay_where_they_are_seen(wing, dtype):
    """NaN and infinities before a start reach no query behind it: outputs, tails and gradients."""
    query, key, value = qkv(1, 4, 2, 40, 40, 8, dtype=dtype)
    starts = documents(0, 13, 40)
    options = {"is_causal": True, "key_starts": starts, "sinks": 1}
    want = [wing.topk_attention(query, key, value, 5, share=s, **options)[:, :, 13:] for s in SHARES]
    tail = wing.topk_attention_with_residual(query, key, value, 5, **options)[:, :, 13:]
    key, value = key.clone(), value.clone()
    key[:, :, 3], value[:, :, 5], value[:, :, 6] = math.nan, math.inf, math.nan
    for share, true in zip(SHARES, want, strict=True):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out = wing.topk_attention(*leaves, 5, share=share, **options)
        assert torch.equal(out[:, :, 13:], true)
        grads = torch.autograd.grad(out[:, :, 13:].sum(), leaves)
        assert all(bool(g[:, :, 13:].isfinite().all()) for g in grads)
    torch.testing.assert_close(
        wing.topk_attention_with_residual(query, key, value, 5, **options)[:, :, 13:], tail
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_starts(wing, data):
    """Whatever the numbers: the oracle's indices, for tokens and for an indexer of one head."""
    batch, queries, keys = (data.draw(st.integers(1, most)) for most in (2, 60, 90))
    number = st.integers(-5, keys + 5) | st.sampled_from([INT64.min, INT64.max])
    shape = (batch,) if data.draw(st.booleans()) else (batch, queries)
    starts = data.draw(st.lists(number, min_size=math.prod(shape), max_size=math.prod(shape)))
    top_k, window = data.draw(st.integers(1, keys + 3)), 0
    options: dict = {"key_starts": torch.tensor(starts).view(shape)}
    if data.draw(st.booleans()):
        window = data.draw(st.integers(0, top_k))
        options |= {"is_causal": True, "causal_offset": data.draw(st.integers(-3, keys)), "window": window}
    options["sinks"] = data.draw(st.integers(0, top_k - window))
    query, key, _ = qkv(batch, 2, 1, queries, keys, 4, make=integers, seed=data.draw(st.integers(0, 99)))
    assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)
    for share in ("kv", "all"):
        assert_best(
            wing.topk_select(query, key, top_k, share=share, **options),
            query,
            key,
            top_k,
            share=share,
            **options,
        )


def test_compiled(wing):
    """An input of one graph, forward and backward, whose values may change; nothing is read on the host."""
    torch._dynamo.reset()

    def eager(query, key, value, starts):
        return sparse_attn.topk_attention(
            query, key, value, 6, is_causal=True, sinks=1, key_starts=starts, backend=wing.name
        )

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    for length, cut in ((30, 7), (30, 20), (44, 9)):
        inputs = [t.to(wing.device).requires_grad_() for t in qkv(2, 4, 2, length, length, 8)]
        starts = documents(0, cut, length, batch=2).to(wing.device)
        ours, want = compiled(*inputs, starts), eager(*inputs, starts)
        for mine, true in zip(
            (ours, *torch.autograd.grad(ours.sum(), inputs)),
            (want, *torch.autograd.grad(want.sum(), inputs)),
            strict=True,
        ):
            torch.testing.assert_close(mine, true)
    assert counter.frame_count == 1


def test_blocks_compiled():
    torch._dynamo.reset()
    sizes = {"block_size": 8, "query_tile": 8, "is_causal": True}

    def eager(query, key, value, starts):
        blocks = sparse_attn.block_select(query, key, 3, key_starts=starts, **sizes)
        return sparse_attn.block_attention(query, key, value, blocks, key_starts=starts, **sizes)

    inputs = *qkv(2, 4, 2, 40, 40, 8), torch.tensor([3, 17])
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), eager(*inputs))


def test_opcheck(wing):
    inputs = [t.to(wing.device).requires_grad_() for t in qkv(2, 4, 2, 6, 9, 8, 5)]
    starts = torch.tensor([[3], [0]], device=wing.device).expand(2, 6)
    packed = Rule(is_causal=True, causal_offset=3, sinks=1, key_starts=starts).packed(*inputs[:2], 4)
    op = getattr(torch.ops.sparse_attn.topk_attention, wing.name)
    torch.library.opcheck(op, [*inputs, 4, *packed.parts()])


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)],
    ids=str,
)
@natively
def test_a_raw_call_is_refused(wrong):
    """What Python checks first is checked again where the memory is read."""
    query = normal(2, 2, 5, 4)
    packed = Rule().packed(query, query, 2)._replace(key_starts=wrong)
    ops = torch.ops.sparse_attn
    blocks = torch.zeros(2, 2, 5, 1, dtype=torch.int32)
    for call in (
        lambda: ops.topk_select.cpu(query, query, 2, *packed.parts(), False, None, 1, 1),
        lambda: ops.topk_attention.cpu(query, query, query, 2, *packed.parts()),
        lambda: ops.indexer_select.cpu(query, query, query[..., 0], 2, *packed.parts(), False),
        lambda: ops.block_attention.cpu(query, query, query, blocks, 1, 1, *packed.parts()),
    ):
        with pytest.raises(RuntimeError, match="key_starts must be int32 or int64"):
            call()
