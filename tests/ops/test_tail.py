"""tail="mean" and tail="blocks" against their formulas, dense, in float64: output, LSE and gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import normal, qkv

import sparse_attn
from sparse_attn.ops import gathered_attention, topk_attention
from sparse_attn.ops import tail as tails
from sparse_attn.selection import Blocks, Exact, Rule, Selection, attend
from sparse_attn.wings.cpu import attention_by_tiles

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
CASES = {
    "plain": ((2, 4, 2, 17, 150, 8, 6), 6, {}),
    "causal": ((1, 4, 2, 200, 200, 8, 8), 5, {"is_causal": True, "window": 2, "sinks": 1}),
    "many chosen": ((1, 2, 1, 300, 300, 16, 24), 90, {"is_causal": True}),
    "most chosen": ((1, 2, 1, 30, 150, 16, 64), 140, {}),
    "wide": ((1, 2, 2, 20, 131, 64, 64), 3, {}),
    "shared": ((2, 4, 2, 30, 150, 8, 8), 7, {"is_causal": True, "causal_offset": 120, "share": "kv"}),
    "one for all": ((1, 6, 3, 20, 130, 8, 8), 7, {"share": "all", "scale": 0.9}),
    "negative scale": ((1, 2, 1, 20, 130, 8, 8), 7, {"scale": -0.4}),
    "lengths": ((2, 2, 1, 12, 130, 8, 5), 4, {"key_lengths": torch.tensor([130, 66])}),
    "starts": ((2, 2, 1, 12, 260, 8, 5), 4, {"key_starts": torch.tensor([0, 60]), "sinks": 1}),
    "offsets": (
        (2, 2, 1, 5, 140, 8, 8),
        4,
        {"is_causal": True, "causal_offset": torch.tensor([135, 70])},
    ),
    "cap and sinks": (
        (1, 4, 2, 140, 140, 8, 8),
        5,
        {"is_causal": True, "softcap": 1.5, "sink_logits": SINKS},
    ),
    "nothing seen": ((1, 2, 2, 80, 80, 8, 8), 3, {"is_causal": True, "causal_offset": -6}),
}


def formula(query, key, value, top_k, tail, **options):
    """(out, lse) in float64; differentiable, the selection is constant."""
    detached = [t.detach().float() for t in (query, key, value)]
    _, _, indices = oracle.topk_attention(*detached, top_k, **options)
    seen = oracle.visible(query, key, **options)
    chosen = (oracle.multiplicity(query, key, indices) > 0) & seen
    cap, sinks = options.get("softcap"), options.get("sink_logits")
    scores = oracle.scores(query, key, options.get("scale"), cap)
    values = value.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    left = seen & ~chosen
    if tail == "mean":
        logits = scores.masked_fill(~seen, -math.inf)
        mean = (left.double() @ values) / left.sum(-1, keepdim=True).clamp(min=1)
    else:
        count, size = key.shape[2] // tails.BLOCK, tails.BLOCK
        keys, values_of = (
            t[:, :, : count * size].unflatten(2, (count, size)).mean(3)
            for t in (key.double(), value.double())
        )
        whole = seen[..., : count * size].unflatten(-1, (count, size)).all(-1)
        times = left[..., : count * size].unflatten(-1, (count, size)).sum(-1) * whole
        coarse = oracle.scores(query, keys, options.get("scale"), cap)
        coarse = torch.where(times > 0, coarse + times.clamp(min=1).double().log(), -math.inf)
        logits = torch.cat((scores.masked_fill(~chosen, -math.inf), coarse), dim=-1)
        values_of = values_of.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if sinks is not None:
        sink = sinks.double().view(-1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), dim=-1)
    lse = logits.logsumexp(-1)
    mass = (logits - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1)).exp()
    if sinks is not None:
        mass = mass[..., :-1]
    if tail == "blocks":
        length = key.shape[2]
        return mass[..., :length] @ values + mass[..., length:] @ values_of, lse
    kept = mass.masked_fill(~chosen, 0.0)
    return kept @ values + mass.masked_fill(~left, 0.0).sum(-1, keepdim=True) * mean, lse


def rounding(dtype):
    # lse is float32 whatever the inputs are; half types round means of blocks, outputs and what is between
    return {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 3e-5)


@pytest.mark.parametrize("tail", ["mean", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_formula_and_gradients(wing, dtype, name, tail):
    sizes, top_k, options = CASES[name]
    inputs = [t.requires_grad_() for t in qkv(*sizes, dtype=dtype)]
    if "sink_logits" in options:
        options = options | {"sink_logits": options["sink_logits"].clone().requires_grad_()}
        inputs.append(options["sink_logits"])
    out, lse = wing.topk_attention(*inputs[:3], top_k, tail=tail, return_lse=True, **options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in inputs]
    right = dict(options)
    if "sink_logits" in options:
        right["sink_logits"] = exact[3]
    want, want_lse = formula(*exact[:3], top_k, tail, **right)
    allowed = rounding(dtype)
    assert (out.double() - want).abs().max() <= allowed * want.abs().max()
    finite = want_lse > -math.inf
    assert torch.equal(lse.cpu() > -math.inf, finite)
    assert (lse.double() - want_lse)[finite].abs().max() <= allowed
    weights, of_lse = normal(*out.shape).double(), normal(*lse.shape, seed=1).double()

    def loss(out, lse):
        return (out.double() * weights).sum() + (lse.double()[finite] * of_lse[finite]).sum()

    grads = torch.autograd.grad(loss(out, lse), inputs)
    wanted = torch.autograd.grad(loss(want, want_lse), exact)
    for grad, one, label in zip(grads, wanted, ("query", "key", "value", "sinks"), strict=False):
        error = (grad.double() - one).abs().max().item()
        assert error <= allowed * one.abs().max().item() + 1e-6, (label, error)


def test_lse_of_the_mean_is_that_of_dense_attention(wing):
    query, key, value = qkv(1, 4, 2, 90, 90, 16)
    _, lse = wing.topk_attention(query, key, value, 8, is_causal=True, tail="mean", return_lse=True)
    _, dense = wing.topk_attention(query, key, value, 90, is_causal=True, return_lse=True)
    torch.testing.assert_close(lse, dense)


@pytest.mark.parametrize("tail", ["mean", "blocks"])
def test_equal_keys_and_values_are_dense_attention(wing, tail):
    """Where all keys of a block are alike, its mean says all of them."""
    query, key, value = qkv(1, 2, 2, 40, 256, 16)
    key, value = (t[:, :, ::64].repeat_interleave(64, dim=2) for t in (key, value))
    if tail == "mean":  # of all blocks together
        value = value[:, :, :1].expand_as(value)
    out = wing.topk_attention(query, key, value, 4, tail=tail)
    torch.testing.assert_close(out, wing.topk_attention(query, key, value, 256), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["mean", "blocks"])
def test_nan_reaches_only_those_that_see_it(wing, tail):
    nan_reaches_only_those_that_see_it(wing, tail, (5, 100))


def nan_reaches_only_those_that_see_it(wing, tail, budgets, length=200, of_value=150, of_key=170):
    query, key, value = qkv(1, 2, 1, length, length, 8)
    value[:, :, of_value] = math.nan
    key[:, :, of_key] = math.nan
    for chosen in budgets:
        out = wing.topk_attention(query, key, value, chosen, is_causal=True, tail=tail)
        assert bool(out[:, :, :of_value].isfinite().all())
        if tail == "mean":
            assert bool(out[:, :, of_value:].isnan().all())
        else:  # from there on it is chosen, from 191 on a block has the other
            assert bool(out[:, :, of_key:].isnan().all())


@pytest.mark.parametrize("tail", ["mean", "blocks"])
def test_any_number_of_threads_and_no_hidden_future(tail):
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 300, 300, 16)]

    def run():
        out = sparse_attn.topk_attention(*inputs, 12, is_causal=True, tail=tail)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    first = run()
    torch.set_num_threads(1)
    try:
        again = run()
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    changed = [t.detach().clone() for t in inputs]
    for t in changed:
        t[:, :, 130:] = 7.0
    later = sparse_attn.topk_attention(*changed, 12, is_causal=True, tail=tail)
    torch.testing.assert_close(later[:, :, :130], first[0].detach()[:, :, :130])


def test_packed_sequences():
    """Each gets what it gets alone; blocks where it begins on their grid."""
    query, key, value = normal(320, 4, 16), normal(320, 2, 16, seed=1), normal(320, 2, 16, seed=2)
    ends = (0, 128, 192, 320)
    options = {"is_causal": True, "return_lse": True}
    for tail in ("mean", "blocks"):
        packed = sparse_attn.varlen_topk_attention(
            query, key, value, torch.tensor(ends), None, 128, 128, 8, tail=tail, **options
        )
        for begin, end in pairwise(ends):
            one = [t[begin:end].transpose(0, 1)[None] for t in (query, key, value)]
            out, lse = sparse_attn.topk_attention(*one, 8, tail=tail, **options)
            torch.testing.assert_close(packed[0][begin:end], out[0].transpose(0, 1))
            torch.testing.assert_close(packed[1][begin:end], lse[0].transpose(0, 1))


@pytest.mark.parametrize("tail", ["mean", "blocks"])
def test_attend_takes_any_selection(tail):
    """What the rule hides does not count with the mean, and no key counts twice."""
    query, key, value = qkv(1, 2, 1, 150, 150, 8)
    rule = Rule(is_causal=True, softcap=2.0)
    indices = Exact().select(query, key, 9, rule).indices
    want = sparse_attn.topk_attention(
        query, key, value, 9, is_causal=True, softcap=2.0, tail=tail, return_lse=True
    )
    found = attend(query, key, value, Selection(indices), rule=rule, tail=tail, return_lse=True)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    if tail == "mean":
        more = torch.cat((indices, indices, torch.full_like(indices, 149)), dim=-1)
        again, _ = attend(query, key, value, Selection(more), rule=rule, tail=tail, return_lse=True)
        torch.testing.assert_close(again[:, :, :149], found[0][:, :, :149])


def test_torch_func_and_compile():
    inputs = qkv(2, 2, 1, 140, 140, 8)
    for tail in ("mean", "blocks"):

        def loss(query, key, value, tail=tail):
            out, lse = sparse_attn.topk_attention(
                query, key, value, 4, is_causal=True, tail=tail, return_lse=True
            )
            return out.square().sum() + lse.sum()

        leaves = [t.clone().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(loss(*leaves), leaves)
        _, along = torch.func.jvp(loss, inputs, inputs)
        wanted = sum((grad * t).sum() for grad, t in zip(grads, inputs, strict=True))
        torch.testing.assert_close(along, wanted, rtol=1e-4, atol=1e-3)
        each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*(t.unsqueeze(1) for t in inputs))
        for one, other in zip(each, grads, strict=True):
            torch.testing.assert_close(one.squeeze(1), other)
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), grads, strict=True):
            torch.testing.assert_close(one, other)
        (grad,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order gradients only"):
            grad.sum().backward()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name):
    query, key, value = (t.requires_grad_() for t in qkv(1, 4, 2, 70, 70, 8))
    packed = Rule(is_causal=True).packed(query, key)
    indices = sparse_attn.topk_select(query.detach(), key.detach(), 5, is_causal=True)
    of_tail = getattr(torch.ops.sparse_attn.tail_attention, name, None)
    if of_tail is None:
        pytest.skip("there is no extension")
    torch.library.opcheck(of_tail, (query, key, value, indices, *packed.parts()))
    means = [t.detach()[:, :, :64].mean(2, keepdim=True).requires_grad_() for t in (key, value)]
    of_blocks = getattr(torch.ops.sparse_attn.block_tail, name)
    torch.library.opcheck(of_blocks, (query, *means, indices, 70, 64, *packed.parts()))
    if joined := getattr(getattr(torch.ops.sparse_attn, "attention_with_blocks", None), name, None):
        means = [t.detach() for t in means]
        own = [t.detach() for t in gathered_attention.attend(query, key, value, indices)]
        torch.library.opcheck(
            joined, (query, key, value, *means, indices, False, *own, 70, 64, *packed.parts()),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_the_joined_op_refuses_outputs_of_another_shape():
    joined = getattr(getattr(torch.ops.sparse_attn, "attention_with_blocks", None), "cpu", None)
    if joined is None:
        pytest.skip("there is no extension")
    query, key, value = qkv(1, 2, 2, 130, 130, 8)
    packed = Rule(is_causal=True).packed(query, key)._replace(groups=2)
    indices = sparse_attn.topk_select(query, key, 5, is_causal=True)
    means = [t[:, :, :128].unflatten(2, (2, 64)).mean(3) for t in (key, value)]
    out, lse = gathered_attention.attend(query, key, value, indices)
    for name, wrong in (("own_out", (out.transpose(2, 3), lse)), ("own_lse", (out, lse.double()))):
        with pytest.raises(RuntimeError, match=f"{name} must be float32"):
            joined(query, key, value, *means, indices, False, *wrong, 130, 64, *packed.parts())


def test_one_gradient_of_selection_and_blocks():
    """What one op does for both stages is what the two do apart, which torch.func has; sinks, cap and LSE, too."""
    query, key, value = qkv(2, 4, 2, 200, 200, 24, 40)
    given = {"is_causal": True, "tail": "blocks", "softcap": 3.0, "window": 4, "sinks": 2, "return_lse": True}
    given["key_lengths"] = torch.tensor([200, 150])

    def loss(query, key, value, sink_logits):
        out, lse = sparse_attn.topk_attention(query, key, value, 12, sink_logits=sink_logits, **given)
        return (out * normal(*out.shape, seed=5)).sum() + (lse * normal(*lse.shape, seed=6)).sum(), (out, lse)

    arguments = query, key, value, normal(4)
    leaves = [t.clone().requires_grad_() for t in arguments]
    total, found = loss(*leaves)
    ours = torch.autograd.grad(total, leaves)
    apart, results = torch.func.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
    _, plain = loss(*arguments)
    for one, other in zip((*ours, *found), (*apart, *results), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": 2}, {"softcap": 2.0}], ids=str)
def test_a_selection_kept_as_bits_is_the_one_of_indices(options, monkeypatch):
    """Where K is large and nobody asks for the indices."""
    monkeypatch.setattr(topk_attention, "FEW_KEPT", 1)
    inputs = qkv(2, 4, 2, 300, 300, 24, 40)
    lengths = torch.tensor([300, 222])
    found, kept = [], []
    for return_indices in (True, False):
        leaves, saved = [t.clone().requires_grad_() for t in (*inputs, normal(4))], []
        with (
            attention_by_tiles(True),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t),
        ):
            out, lse, *_ = sparse_attn.topk_attention(
                *leaves[:3], 150, is_causal=True, tail="blocks", sink_logits=leaves[3], key_lengths=lengths,
                return_lse=True, return_indices=return_indices, backend="cpu", **options,
            )  # fmt: skip
        loss = (out * normal(*out.shape, seed=7)).sum() + lse.square().sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves)))
        kept.append(max(t.shape[3] for t in saved if t.dtype == torch.int32 and t.dim() == 4))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert kept == [150, 10]


def test_what_is_refused():
    query, key, value = qkv(1, 2, 2, 128, 128, 8)
    for tail in ("mean", "blocks"):
        with pytest.raises(ValueError, match="know of a rule only is_causal"):
            sparse_attn.topk_attention(
                query, key, value, 4, attn_mask=torch.ones(128, 128, dtype=torch.bool), tail=tail
            )
        chosen = Blocks().select(query, key, 192, Rule(is_causal=True))
        with pytest.raises(ValueError, match=f"tail='{tail}' needs a selection of tokens"):
            attend(query, key, value, chosen, rule=Rule(is_causal=True), tail=tail)
        pages = torch.zeros(2, 16, 2, 8)
        table = torch.tensor([[0, 1]], dtype=torch.int32)
        with pytest.raises(ValueError, match=f"tail='{tail}' needs keys and values that lie in one tensor"):
            sparse_attn.varlen_topk_attention(
                query[0].transpose(0, 1)[:4], pages, pages, torch.tensor([0, 4]), torch.tensor([0, 30]),
                4, 30, 4, block_table=table, tail=tail,
            )  # fmt: skip
    for wrong in ("sum", None, 1):
        with pytest.raises(ValueError, match="tail must be one of 'none', 'mean', 'blocks', got"):
            sparse_attn.topk_attention(query, key, value, 4, tail=wrong)


def test_the_gradient_stores_no_matrix():
    query, key, value = (t.requires_grad_() for t in qkv(1, 2, 2, 512, 512, 4))
    stored = []

    def note(tensor):
        stored.append(tensor.numel())
        return tensor

    for tail in ("mean", "blocks"):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sparse_attn.topk_attention(query, key, value, 4, is_causal=True, tail=tail)
        assert max(stored) < 2 * 512 * 64


def test_everything_chosen_is_attention(wing):
    query, key, value = qkv(1, 4, 2, 130, 130, 16)
    want = wing.topk_attention(query, key, value, 130, is_causal=True)
    for tail in ("mean", "blocks"):
        assert_close(wing.topk_attention(query, key, value, 200, is_causal=True, tail=tail), want, "out")
