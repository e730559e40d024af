"""indexer_loss against its formula in float64, its gradients by autograd, and its memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from helpers import oracle
from helpers.inputs import index_rows, mask, normal

import sparse_attn
import sparse_attn.wings.reference.chunks
from ops.test_memory import MIB, peak_beyond
from sparse_attn.selection import Rule

SIZES = [  # B, G, Hi, Hq, Hkv, Tq, Tk
    (2, 1, 3, 4, 2, 11, 11),
    (1, 2, 2, 4, 2, 7, 16),
    (2, 1, 4, 3, 3, 5, 9),
]


def make(batch, groups, index_heads, heads, kv_heads, queries, keys, dtype=torch.float64):
    """(index query, index key, index weights, query, key)"""
    return (
        normal(batch, groups * index_heads, queries, 5, dtype=dtype),
        normal(batch, groups, keys, 5, dtype=dtype, seed=1),
        normal(batch, groups * index_heads, queries, dtype=dtype, seed=2),
        normal(batch, heads, queries, 6, dtype=dtype, seed=3),
        normal(batch, kv_heads, keys, 6, dtype=dtype, seed=4),
    )


def formula(index_query, index_key, weights, query, key, seen, scale=None, softcap=None, sink_logits=None):
    """seen [B, G, Tq, Tk]; row by row."""
    guess = oracle.indexer_scores(index_query, index_key, weights)
    groups = index_key.shape[1]
    each = oracle.scores(query, key, scale, softcap)
    each = torch.cat((each, oracle.sink_column(each, sink_logits)), -1).unflatten(1, (groups, -1))
    total, rows = 0.0, 0
    for place in seen.any(-1).nonzero().tolist():
        b, g, i = place
        keys = seen[b, g, i]
        mass = (
            torch.cat((each[b, g, :, i, :-1][:, keys], each[b, g, :, i, -1:]), -1).softmax(-1)[:, :-1].mean(0)
        )
        mass = mass / mass.sum()
        total = total + (mass * (mass.log() - guess[b, g, i, keys].log_softmax(-1))).sum()
        rows += 1
    return total / rows


def options_of(kind, sizes):
    batch, groups, _, _, _, queries, keys = sizes
    causal = {"is_causal": True, "causal_offset": keys - queries}
    return {
        "plain": {},
        "causal": causal,
        "offset": {"is_causal": True, "causal_offset": -2},
        "mask": {"attn_mask": mask(batch, groups, queries, keys), "scale": 0.7},
        "lengths": causal | {"key_lengths": torch.arange(batch) * 3 + keys - 3},
    }[kind]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "offset", "mask", "lengths", "indices"])
@pytest.mark.parametrize("block", [None, 40])
@pytest.mark.parametrize("scores", ["plain", "capped", "sinks", "both"])
def test_value_and_gradients(monkeypatch, sizes, kind, block, scores):
    """In one block, and in blocks of a row or two."""
    if block:
        monkeypatch.setattr(sparse_attn.wings.reference.chunks, "_ELEMENTS", block * 40)
    inputs = make(*sizes)
    batch, groups, _, _, _, queries, keys = sizes
    leaves = [t.requires_grad_() for t in inputs[:3]]
    if kind == "indices":
        options = {"indices": index_rows((batch, groups, queries, 4), keys)}
        seen = oracle.multiplicity(inputs[1], inputs[1], options["indices"]) > 0
        seen = seen.expand(batch, groups, queries, keys)
    else:
        options = options_of(kind, sizes)
        seen = oracle.visible(inputs[0][:, :groups], inputs[1], **options)
    scoring = {"softcap": 1.3} if scores in ("capped", "both") else {}
    if scores in ("sinks", "both"):
        scoring["sink_logits"] = normal(inputs[3].shape[1], seed=7) + 2
    loss = sparse_attn.indexer_loss(*inputs, **options, **scoring)
    want = formula(*inputs, seen, options.get("scale"), **scoring)
    torch.testing.assert_close(loss, want)
    for ours, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, true)


def test_a_selection_of_no_keys():
    """Rows of empty slots over no keys at all: a loss of 0, with gradients."""
    inputs = make(2, 1, 3, 4, 2, 5, 0)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    loss = sparse_attn.indexer_loss(*inputs, indices=torch.full((2, 1, 5, 3), -1, dtype=torch.int32))
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_half_types_and_mixed_dtypes():
    """The indexer may be bfloat16 beside a float32 attention; the loss is float32."""
    inputs = make(*SIZES[0], dtype=torch.float32)
    halves = [t.bfloat16().requires_grad_() for t in inputs[:2]]
    loss = sparse_attn.indexer_loss(*halves, inputs[2], *inputs[3:], is_causal=True)
    assert loss.dtype == torch.float32
    want = sparse_attn.indexer_loss(*(t.detach().float() for t in halves), *inputs[2:], is_causal=True)
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    assert all(t.grad.dtype == torch.bfloat16 and bool(t.grad.isfinite().all()) for t in halves)


def test_only_what_needs_gradients():
    inputs = make(*SIZES[0])
    inputs[1].requires_grad_()
    inputs[3].requires_grad_()
    sparse_attn.indexer_loss(*inputs).backward()
    assert inputs[1].grad is not None
    assert inputs[0].grad is None
    assert inputs[3].grad is None, "the attention is a constant"
    assert not sparse_attn.indexer_loss(*(t.detach() for t in inputs)).requires_grad


def test_zero_where_the_scores_are_right():
    """Scores equal to the attention's own logits, up to a constant, have loss 0."""
    query, key = normal(1, 1, 6, 4, dtype=torch.float64), normal(1, 1, 9, 4, dtype=torch.float64, seed=1)
    signs = torch.cat((query, -query), dim=1)  # x = relu(x) − relu(−x)
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1).expand(1, 2, 6)
    loss = sparse_attn.indexer_loss(signs, key, weights, query, key, scale=1.0)
    assert abs(loss) < 1e-12


def test_rows_that_see_nothing():
    inputs = make(*SIZES[0])
    leaves = [t.requires_grad_() for t in inputs[:3]]
    loss = sparse_attn.indexer_loss(*inputs, key_lengths=torch.zeros(2, dtype=torch.int64))
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("selected", [False, True])
def test_memory_grows_with_the_length(monkeypatch, selected):
    monkeypatch.setattr(sparse_attn.wings.reference.chunks, "_ELEMENTS", 1 << 18)

    def peak(length: int) -> int:
        inputs = make(1, 1, 4, 4, 2, length, length, dtype=torch.float32)
        inputs[0].requires_grad_()
        options = {"indices": index_rows((1, 1, length, 32), 256)} if selected else {"is_causal": True}
        return peak_beyond("cpu", lambda: sparse_attn.indexer_loss(*inputs, **options).backward())

    peak(256)
    assert peak(3072) < 40 * MIB < 4 * 3072 * 3072 * 4 / 3


def test_per_sample_gradients():
    """vmap(grad) is the loop, over the constants too."""
    samples = [torch.stack((t, 1.1 * t)) for t in make(*SIZES[1])]
    lengths = torch.tensor([[16], [9]])

    def loss(*inputs):
        return sparse_attn.indexer_loss(*inputs[:5], key_lengths=inputs[5])

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    ours = torch.func.vmap(gradients)(*samples, lengths)
    want = [gradients(*inputs) for inputs in zip(*samples, lengths, strict=True)]
    assert all(torch.equal(o, torch.stack(w)) for o, w in zip(ours, zip(*want, strict=True), strict=True))
    leaves = [t[0].clone().requires_grad_() for t in samples[:3]]
    loss(*leaves, *(t[0] for t in samples[3:]), lengths[0]).backward()
    assert all(torch.equal(leaf.grad, true) for leaf, true in zip(leaves, want[0], strict=True))


def test_other_derivatives_are_refused():
    inputs = make(*SIZES[1])

    def loss(index_query):
        return sparse_attn.indexer_loss(index_query, *inputs[1:])

    leaf = inputs[0].clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="indexer_loss has first-order gradients only; a second"):
        once.sum().backward()
    with pytest.raises(NotImplementedError, match="indexer_loss has first-order gradients only; a second"):
        torch.func.jacrev(torch.func.grad(loss))(inputs[0])
    with pytest.raises(NotImplementedError, match="indexer_loss has no forward mode"):
        torch.func.jvp(loss, inputs[:1], inputs[:1])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward mode"):
        loss(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]))


@pytest.mark.parametrize("selected", [False, True])
def test_compiled_for_any_length(selected):
    """One graph, gradients included."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def gradients(function, inputs, options):
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        loss = function(*leaves, *inputs[3:], **options)
        return loss, *torch.autograd.grad(loss, leaves)

    compiled = torch.compile(sparse_attn.indexer_loss, fullgraph=True, dynamic=True, backend=counter)
    for length in (11, 7, 24):
        inputs = make(2, 2, 2, 4, 2, length, length)
        options = {"indices": index_rows((2, 2, length, 4), length)} if selected else {"is_causal": True}
        ours, want = (gradients(f, inputs, options) for f in (compiled, sparse_attn.indexer_loss))
        assert all(torch.equal(mine, true) for mine, true in zip(ours, want, strict=True))
    assert counter.frame_count == 1


def test_opcheck():
    inputs = [t.requires_grad_() for t in make(*SIZES[0])[:3]], make(*SIZES[0])[3:]
    rule = (
        Rule(True, inputs[0][1].shape[2] - inputs[0][0].shape[2])
        .packed(*inputs[0][:2], per_group=True)
        .parts()
    )
    op = torch.ops.sparse_attn.indexer_loss.reference
    torch.library.opcheck(op, (*inputs[0], *inputs[1], None, *rule, True, True, True))


def test_errors():
    inputs = dict(
        zip(("index_query", "index_key", "index_weights", "query", "key"), make(*SIZES[1]), strict=True)
    )
    for error, says, wrong in (
        (ValueError, "batch size and the lengths of query and key", {"query": inputs["query"][:, :, 1:]}),
        (ValueError, "multiple of the indexer's groups, got 1 and 2", {"key": inputs["key"][:, :1]}),
        (ValueError, "is_causal, attn_mask, key_lengths and key_starts go without",
         {"indices": index_rows((1, 2, 7, 3), 16), "is_causal": True}),
        (ValueError, "needs causal_offset", {"is_causal": True}),
        (ValueError, "scale must be finite", {"scale": math.inf}),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            sparse_attn.indexer_loss(**inputs | wrong)
