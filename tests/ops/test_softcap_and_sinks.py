"""The soft cap of scores and the extra logit of each head's softmax, in every op that has a softmax."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_close, assert_within_budget
from helpers.inputs import index_rows, normal, qkv
from helpers.wings import HALF_DTYPES, overload

import sparse_attn
from sparse_attn import selection
from sparse_attn.rule import PackedRule

SCORING = ["softcap", "sink_logits", "both"]


def scoring(which: str, heads: int, softcap: float = 1.5) -> dict:
    """Scores of N(0, 1) are bent by the cap, and the sinks weigh about as much as a key."""
    options = {"softcap": softcap, "sink_logits": 2 * normal(heads, seed=9)}
    return options if which == "both" else {which: options[which]}


def with_gradients(function, inputs, options):
    """(results (out, lse, …), incoming gradients, those of the inputs and of the sinks)."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    if "sink_logits" in options:
        options = options | {"sink_logits": options["sink_logits"].detach().requires_grad_()}
    out, lse, *others = function(*leaves, return_lse=True, **options)
    grads = (
        normal(*out.shape, dtype=out.dtype, seed=5),
        normal(*lse.shape, seed=6).where(lse > -math.inf, 0.0),
    )
    sought = [*leaves, *([options["sink_logits"]] if "sink_logits" in options else [])]
    return (out, lse, *others), grads, torch.autograd.grad((out, lse), sought, grads)


def check(function, inputs, indices, options):
    """out, LSE and all gradients against the formula in float64; `function` may return its indices last."""
    (out, lse, *own), grads, ours = with_gradients(function, inputs, options)
    indices = own[0] if own else indices
    formula = [options.get(name) for name in ("scale", "softcap", "sink_logits")]
    true_out, true_lse = oracle.gathered_attention(*inputs, indices, *formula)
    assert_close(out, true_out, "out")
    assert_close(lse, true_lse, "lse")
    half = out.dtype in HALF_DTYPES
    true = oracle.gradients(*inputs, indices, *grads, *formula)
    for name, mine, want in zip(("query", "key", "value"), ours, true, strict=False):
        assert_close(mine, want, f"gradient of {name}", units=2 if half else None)
    if len(ours) == 4:  # it is made of the results: of `out` in a half type, of the LSE in float32
        mine = ours[3].to(out.dtype if half else torch.float32)
        assert_close(mine, true[3], "gradient of sink_logits", units=2 if half else None)


@pytest.mark.parametrize("which", SCORING)
@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 2, 1), (4, 2, 4), (3, 3, 3), (9, 1, 1)])
def test_gathered_attention(wing, dtype, which, heads, kv_heads, groups):
    inputs = qkv(2, heads, kv_heads, 5, 30, 19, 13, dtype=dtype)
    indices = index_rows(
        (2, groups, 5, 21), 30, garbage=which == "both"
    )  # without garbage some rows are empty
    check(
        lambda *qkv, **o: wing.gathered_attention(*qkv, indices, **o), inputs, indices, scoring(which, heads)
    )


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("which", SCORING)
def test_topk_attention(wing, dtype, which, share):
    inputs = qkv(2, 4, 2, 11, 24, 16, 8, dtype=dtype)
    rule = {"is_causal": True, "causal_offset": 10, "window": 2, "sinks": 1, "share": share}
    options = rule | scoring(which, 4, softcap=0.7)

    def function(*qkv, **options):
        return wing.topk_attention(*qkv, 6, return_indices=True, **options)

    check(function, inputs, None, options)
    assert_best(function(*inputs, **options)[1], *inputs[:2], 6, **options)


@pytest.mark.parametrize("share", ["kv", "all"])
def test_heads_that_share_rank_by_capped_probabilities_with_their_sinks(wing, dtype, share):
    """Sinks that silence some heads, and a cap that flattens, choose other keys."""
    query, key, _ = qkv(1, 4, 2, 9, 40, 16, dtype=dtype)
    query = query * 4
    sinks = torch.tensor([30.0, -30.0, 30.0, -30.0])
    chosen = []
    for options in (
        {},
        {"softcap": 1.0},
        {"sink_logits": sinks},
        {"softcap": 1.0, "sink_logits": sinks / 10},
    ):
        indices = wing.topk_select(query, key, 5, share=share, **options)
        assert_best(indices, query, key, 5, share=share, **options)
        chosen.append(indices)
    assert not any(torch.equal(chosen[0], other) for other in chosen[1:])


def test_a_selection_per_head_is_the_same_bit_for_bit(wing, dtype):
    """Also where the cap makes many scores equal: ranks are those of the uncapped q·k."""
    query, key, value = qkv(1, 4, 2, 9, 40, 16, dtype=dtype)
    options = {"softcap": 1e-3, "sink_logits": normal(4)}
    plain = wing.topk_select(query, key, 5)
    assert torch.equal(wing.topk_select(query, key, 5, **options), plain)
    assert torch.equal(wing.topk_attention(query, key, value, 5, return_indices=True, **options)[1], plain)


def dense(query, key, value, seen, softcap, sink_logits, scale):
    """What models do in eager mode, with every score in memory."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.mT * scale
    scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~seen, -math.inf)
    column = sink_logits.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize("share", ["none", "all"])
def test_a_budget_for_all_keys_is_dense_attention(wing, dtype, share):
    """Within the error that PyTorch itself makes in that dtype, forward and backward."""
    inputs = qkv(2, 4, 2, 20, 20, 32, dtype=dtype)
    options = {"softcap": 2.0, "sink_logits": normal(4, seed=9)}
    seen = torch.ones(20, 20, dtype=torch.bool).tril()

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (*inputs, options["sink_logits"].to(dtype))]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=3).to(dtype))]

    def ours(query, key, value, sinks):
        rule = {"is_causal": True, "scale": 0.3, "softcap": 2.0, "sink_logits": sinks, "share": share}
        return wing.topk_attention(query, key, value, 20, **rule)

    def theirs(query, key, value, sinks):
        return dense(query, key, value, seen, 2.0, sinks, 0.3)

    names = ("out", "query", "key", "value", "sink_logits")
    if dtype == torch.float64:
        for name, mine, true in zip(names, run(ours, dtype), run(theirs, dtype), strict=True):
            torch.testing.assert_close(mine, true, rtol=0, atol=1e-6 if name == "sink_logits" else 1e-12)
        return
    each = zip(names, run(ours, dtype), run(theirs, dtype), run(theirs, torch.float64), strict=True)
    for name, mine, pytorchs, exact in each:
        assert_within_budget(mine, pytorchs, exact, name)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("op", ["topk_attention", "gathered_attention", "block_attention"])
def test_gradcheck(wing, dtype, op):
    inputs = [t.requires_grad_() for t in (*qkv(1, 4, 2, 4, 7, 3, 2, dtype=dtype), normal(4, dtype=dtype))]
    indices = index_rows((1, 2, 4, 5), 7, garbage=True)
    blocks = torch.tensor([[[[0, 1], [1, 3]]]], dtype=torch.int32)

    def function(query, key, value, sinks):
        options = {"softcap": 0.8, "sink_logits": sinks}
        if op == "topk_attention":
            return wing.topk_attention(query, key, value, 4, share="kv", **options)
        if op == "gathered_attention":
            return wing.gathered_attention(query, key, value, indices, **options)
        return wing.block_attention(query, key, value, blocks, block_size=2, query_tile=2, **options)

    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivatives_of_the_sinks_are_right_and_others_refused(wing):
    """The sinks' gradient is made of the results, which have gradients; the others' is an op without."""
    leaves = [t.requires_grad_() for t in (*qkv(1, 4, 2, 6, 9, 8), normal(4, seed=9))]
    indices = index_rows((1, 2, 6, 5), 9)
    weights = normal(4, seed=3)

    def second(leaves, function):
        out = function(*leaves)
        (of_sinks,) = torch.autograd.grad(out.square().sum(), leaves[3:], create_graph=True)
        return torch.autograd.grad((of_sinks * weights).sum(), leaves)

    def ours(query, key, value, sinks):
        return wing.gathered_attention(query, key, value, indices, softcap=1.5, sink_logits=sinks)

    true = second(
        [t.detach().double().requires_grad_() for t in leaves],
        lambda query, key, value, sinks: oracle.gathered_attention(
            query, key, value, indices, None, 1.5, sinks
        )[0],
    )
    for mine, want in zip(second(leaves, ours), true, strict=True):
        assert_close(mine, want, "second derivative", units=64)
    (grad,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


@pytest.mark.parametrize("which", SCORING)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_attention(wing, dtype, which, groups):
    """Two rows of tiles and a last block that is not full, against the tokens of the blocks."""
    inputs = qkv(2, 4, 2, 21, 90, 16, 12, dtype=dtype)
    rule = {"is_causal": True, "causal_offset": 5, "key_lengths": torch.tensor([90, 37])}
    blocks = index_rows((2, groups, 3, 3), 6)
    position = blocks.long().unsqueeze(-1) * 16 + torch.arange(16)
    position = (
        torch.where(blocks.unsqueeze(-1) < 0, -1, position).flatten(3).repeat_interleave(8, dim=2)[:, :, :21]
    )
    seen = oracle.visible(*inputs[:2], **rule)[:, :1].expand(-1, groups, -1, -1)
    inside = (position >= 0) & (position < 90)
    inside &= seen.gather(-1, position.clamp(0, 89))
    indices = torch.where(inside, position, -1).int()

    def function(*qkv, **options):
        return wing.block_attention(*qkv, blocks, block_size=16, query_tile=8, **rule, **options)

    check(function, inputs, indices, scoring(which, 4))


def test_a_row_that_sees_no_key(wing, dtype):
    """Nothing but the sink: out 0 and the LSE is that logit. A sink of −inf is none at all."""
    inputs = qkv(1, 4, 2, 5, 9, 8, dtype=dtype)
    sinks = normal(4, seed=9)
    lengths = torch.zeros(1, dtype=torch.int32)
    for empty in ({"key_lengths": lengths}, {"is_causal": True, "causal_offset": -5}):
        out, lse = wing.topk_attention(*inputs, 3, return_lse=True, sink_logits=sinks, **empty)
        assert not out.any()
        assert_close(lse, sinks.view(1, -1, 1).expand_as(lse), "lse", units=2)
    for indices in (torch.full((1, 2, 5, 4), -1), torch.zeros(1, 1, 5, 0)):
        out, lse = wing.gathered_attention(*inputs, indices.int(), return_lse=True, sink_logits=sinks)
        assert not out.any()
        assert_close(lse, sinks.view(1, -1, 1).expand_as(lse), "lse", units=2)
    causal = {"is_causal": True, "causal_offset": -2, "return_lse": True}  # two rows see nothing
    none = wing.topk_attention(*inputs, 3, **causal)
    minus = wing.topk_attention(*inputs, 3, sink_logits=torch.full((4,), -math.inf), **causal)
    assert all(torch.equal(a, b) for a, b in zip(none, minus, strict=True))
    sinks = torch.full((4,), -math.inf, requires_grad=True)
    wing.topk_attention(*inputs, 3, sink_logits=sinks, **causal)[0].sum().backward()
    assert not sinks.grad.any()


def test_merging_by_lse(wing):
    """Two halves of the keys, the sink in one of them, are together the attention to all."""
    query, key, value = qkv(1, 4, 2, 6, 20, 8)
    options = {"softcap": 1.0, "return_lse": True}
    sinks = normal(4, seed=9)
    left = wing.topk_attention(query, key[:, :, :12], value[:, :, :12], 12, sink_logits=sinks, **options)
    right = wing.topk_attention(query, key[:, :, 12:], value[:, :, 12:], 8, **options)
    out, lse = wing.topk_attention(query, key, value, 20, sink_logits=sinks, **options)
    both = torch.logaddexp(left[1], right[1])
    torch.testing.assert_close(lse, both)
    merged = sum(o * (own - both).exp().unsqueeze(-1) for o, own in (left, right))
    torch.testing.assert_close(out, merged)


@pytest.mark.parametrize("softcap", [30.0, 50.0])
def test_saturation(wing, dtype, softcap):
    """Scores of ±10⁴ are ± the cap, and their gradients 0."""
    query = torch.tensor([100.0, -100.0, 0.01]).view(1, 1, 3, 1).to(dtype)
    key = torch.tensor([100.0, -100.0, 0.01, 0.0, 0.005]).view(1, 1, 5, 1).to(dtype)
    value = normal(1, 1, 5, 3, dtype=dtype)
    indices = torch.arange(5, dtype=torch.int32).expand(1, 1, 3, 5)
    options = {"scale": 1.0, "softcap": softcap, "sink_logits": torch.zeros(1)}
    check(
        lambda *qkv, **o: wing.gathered_attention(*qkv, indices, **o), (query, key, value), indices, options
    )
    ends = query[:, :, :2].requires_grad_()
    out = wing.topk_attention(ends, key[:, :, :2], value[:, :, :2], 2, **options)
    assert not torch.autograd.grad(out.sum(), ends)[0].any()


def test_the_cap_is_accurate_everywhere(wing):
    """With one key the LSE is the capped score: near 0, in between, at the ends, of infinities and of NaN."""
    count = 40 if wing.name == "triton" else 4000  # the interpreter takes its time
    size = torch.logspace(-37, 4, count, dtype=torch.float64).float()
    x = torch.cat((size, -size, torch.tensor([0.0, math.inf, -math.inf, math.nan])))
    key = value = torch.ones(1, 1, 1, 1)
    for softcap in (1.0, 30.0):
        _, lse = wing.topk_attention(
            x.view(1, 1, -1, 1), key, value, 1, scale=1.0, softcap=softcap, return_lse=True
        )
        lse, true = lse.flatten().double(), softcap * torch.tanh(x.double() / softcap)
        assert torch.equal(lse.isnan(), true.isnan())
        assert lse[-4] == 0
        assert_close(lse[-3:-1].float(), torch.tensor([softcap, -softcap]), "ends", units=2)
        error = (lse - true)[:-4].abs() / true[:-4].abs()
        assert error.max() < 6 * 2**-24
        assert lse[:-1].abs().max() <= softcap * (1 + 2**-22)


def test_special_values(wing, dtype):
    """NaN of a key or a sink makes NaN in the rows that see it; an infinite score has a finite cap."""
    query, key, value = qkv(1, 2, 1, 6, 6, 4, dtype=dtype)
    key[0, 0, 3, 1] = math.nan
    sinks = torch.tensor([0.5, math.nan])
    options = {"is_causal": True, "return_lse": True, "softcap": 2.0}
    out, lse = wing.topk_attention(query, key, value, 6, sink_logits=sinks, **options)
    for result in (out.sum(-1), lse):
        assert not result[0, 0, :3].isnan().any()
        assert result[0, 0, 3:].isnan().all()
        assert result[0, 1].isnan().all()
    query, key, value = qkv(1, 1, 1, 2, 4, 1, dtype=dtype)
    query[:] = 1
    key[0, 0, :2, 0] = torch.tensor([math.inf, -math.inf])
    indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 2, 4)
    out, lse = wing.gathered_attention(query, key, value, indices, return_lse=True, softcap=2.0)
    finite = key.clone()
    finite[0, 0, :2, 0] = torch.tensor([1e4, -1e4])
    want, want_lse = oracle.gathered_attention(query, finite, value, indices, None, 2.0)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")


@pytest.mark.parametrize("op", ["gathered_attention", "topk_attention", "block_attention"])
def test_forward_mode(wing, op):
    """The tangent along all four inputs is that of the formula."""
    inputs = (*qkv(1, 4, 2, 6, 24, 8), 2 * normal(4, seed=9))
    moves = tuple(normal(*t.shape, seed=30 + number) for number, t in enumerate(inputs))
    indices = torch.arange(24, dtype=torch.int32).expand(1, 1, 6, 24).contiguous()
    blocks = torch.arange(3, dtype=torch.int32).expand(1, 1, 2, 3)
    calls = {
        "gathered_attention": lambda q, k, v, **o: wing.gathered_attention(q, k, v, indices, **o),
        "topk_attention": lambda q, k, v, **o: wing.topk_attention(q, k, v, 24, **o),
        "block_attention": lambda q, k, v, **o: wing.block_attention(
            q, k, v, blocks, block_size=8, query_tile=4, **o
        ),
    }

    def ours(query, key, value, sinks):
        return calls[op](query, key, value, softcap=1.5, sink_logits=sinks, return_lse=True)

    def formula(query, key, value, sinks):
        return oracle.gathered_attention(query, key, value, indices, None, 1.5, sinks)

    doubles = [tuple(t.double() for t in tensors) for tensors in (inputs, moves)]
    (_, along), (_, true) = torch.func.jvp(ours, inputs, moves), torch.func.jvp(formula, *doubles)
    for name, mine, want in zip(("out", "lse"), along, true, strict=True):
        assert_close(mine, want, f"tangent of {name}")


def test_per_sample_gradients_and_a_batch_of_sinks(wing):
    """vmap over a batch gives each sample its own gradient of the sinks; over sinks it is a call each."""
    query, key, value = qkv(3, 4, 2, 5, 9, 8)
    sinks = normal(4, seed=9)

    def loss(query, key, value, sinks):
        options = {"softcap": 1.5, "sink_logits": sinks, "backend": wing.name}
        return sparse_attn.topk_attention(query[None], key[None], value[None], 4, **options).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 3)), in_dims=(0, 0, 0, None))
    each = [torch.func.grad(loss, argnums=(0, 3))(query[i], key[i], value[i], sinks) for i in range(3)]
    for mine, want in zip(gradients(query, key, value, sinks), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(want))
    many = torch.stack((sinks, 2 * sinks))
    own = torch.func.vmap(loss, in_dims=(None, None, None, 0))(query[0], key[0], value[0], many)
    torch.testing.assert_close(own, torch.stack([loss(query[0], key[0], value[0], s) for s in many]))


def selectors() -> dict:
    query, key, weights = normal(1, 4, 24, 8, seed=4), normal(1, 2, 24, 8, seed=5), normal(1, 4, 24, seed=6)
    scorer = sparse_attn.nn.LowRankScorer(2, 16, 4)
    scorer.calibrate(normal(1, 4, 24, 16, seed=7), normal(1, 2, 24, 16, seed=8)).fit()
    return {
        "exact": selection.Exact(),
        "rounded": selection.Rounded(),
        "low_rank": selection.LowRank(scorer),
        "indexer": selection.FromIndexer(query, key, weights),
        "refined": selection.Refined(factor=1, blocks=selection.Blocks(block_size=8, query_tile=4)),
        "blocks": selection.Blocks(block_size=8, query_tile=4),
    }


@pytest.mark.parametrize("share", ["none", "kv"])
@pytest.mark.parametrize("name", ["exact", "rounded", "low_rank", "indexer", "refined", "blocks"])
def test_a_rule_carries_them_through_every_selector(name, share):
    """Chosen by whom it may be, the attention is capped and has its sinks; the fused call is the same."""
    query, key, value = qkv(1, 4, 2, 24, 24, 16)
    rule = selection.Rule(is_causal=True, share=share, **scoring("both", 4))
    chosen = selectors()[name].select(query, key, 16, rule)
    out, lse = sparse_attn.attend(query, key, value, chosen, rule=rule, return_lse=True)
    indices = chosen.indices
    if name == "blocks":
        indices = indices.unsqueeze(-1) * 8 + torch.arange(8).where(indices.unsqueeze(-1) >= 0, -99)
        indices = indices.flatten(3).repeat_interleave(4, dim=2)
        indices = torch.where(indices <= torch.arange(24).view(-1, 1), indices, -1).int()
    want, want_lse = oracle.gathered_attention(query, key, value, indices, None, 1.5, rule.sink_logits)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    assert torch.equal(selection.select_and_attend(query, key, value, 16, selectors()[name], rule), out)


def test_what_is_left_out_has_its_share_of_the_whole_softmax():
    leaves = [t.requires_grad_() for t in (*qkv(1, 4, 2, 9, 24, 8), 2 * normal(4, seed=9))]
    rule = {"is_causal": True, "causal_offset": 15, "share": "kv", "softcap": 1.5, "sink_logits": leaves[3]}
    out = sparse_attn.topk_attention_with_residual(*leaves[:3], 5, **rule)
    query, key, value, sinks = doubles = [t.detach().double().requires_grad_() for t in leaves]
    rule = rule | {"sink_logits": sinks}
    indices = sparse_attn.topk_select(query, key, 5, **rule)
    seen = oracle.visible(query, key, **rule)
    scores = oracle.scores(query, key, None, rule["softcap"]).masked_fill(~seen, -math.inf)
    column = oracle.sink_column(scores, rule["sink_logits"])
    probabilities = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    chosen = oracle.multiplicity(query, key, indices) > 0
    left, values = seen & ~chosen, value.double().repeat_interleave(2, dim=1)
    mean = left.double() @ values / left.sum(-1, keepdim=True).clamp(min=1)
    want = (
        probabilities.where(chosen, 0.0) @ values
        + probabilities.where(left, 0.0).sum(-1, keepdim=True) * mean
    )
    assert_close(out, want, "out")
    grad = normal(*out.shape, seed=5)
    ours, true = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, doubles, grad.double())
    for name, mine, exact in zip(("query", "key", "value", "sink_logits"), ours, true, strict=True):
        assert_close(mine, exact, f"gradient of {name}")


@pytest.mark.torch_defaults
def test_the_same_for_any_number_of_threads(wing):
    inputs = qkv(1, 1, 1, 40_000, 16, 4)  # one number out of a sum that torch would divide among threads
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        options = {"is_causal": True, "causal_offset": 0, "softcap": 1.0, "sink_logits": torch.ones(1)}
        results.append(
            with_gradients(lambda *qkv, **o: wing.topk_attention(*qkv, 2, **o), inputs, options)[2][3]
        )
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", ["topk_attention", "block_attention"])
def test_compile_is_one_graph(wing, op):
    torch._dynamo.reset()
    inputs = [t.to(wing.device).requires_grad_() for t in (*qkv(2, 4, 2, 11, 11, 8), normal(4, seed=9))]
    blocks = torch.zeros(2, 1, 3, 1, dtype=torch.int32, device=wing.device)

    def eager(query, key, value, sinks):
        options = {"softcap": 1.5, "sink_logits": sinks * 2, "is_causal": True, "backend": wing.name}
        if op == "topk_attention":
            return sparse_attn.topk_attention(query, key, value, 4, share="kv", **options).relu()
        return sparse_attn.block_attention(query, key, value, blocks, query_tile=4, **options).relu()

    if wing.refuses(op):
        pytest.skip(wing.refuses(op))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for ours, want in zip(
        torch.autograd.grad(compiled(*inputs).sum(), inputs),
        torch.autograd.grad(eager(*inputs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, want)


QUERY, KEY, VALUE = qkv(1, 4, 2, 3, 5, 8)


@pytest.mark.parametrize(
    "sinks",
    [
        torch.ones(3),
        torch.ones(5),
        torch.ones(0),
        torch.ones(4, 1),
        torch.ones(4).double(),
        torch.ones(8)[::2],
    ],
    ids=["fewer", "more", "none", "two axes", "float64", "strided"],
)
@pytest.mark.parametrize("op", ["topk_select", "topk_attention", "gathered_attention", "gathered_attention_backward",
                                "block_attention", "block_attention_backward"])  # fmt: skip
def test_wrong_sinks_are_refused_in_a_direct_call(op, sinks):
    rule = PackedRule(None, None, False, 0, 0, 0, 4, 1.0, 0.0, sinks).parts()
    indices = torch.zeros(1, 4, 3, 1, dtype=torch.int32)
    lse, out = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3, 8)
    blocks = (QUERY, KEY, VALUE, indices[:, :, :1].contiguous())
    arguments = {
        "topk_select": (QUERY, KEY, 2, *rule, False, None, 1, 1),
        "topk_attention": (QUERY, KEY, VALUE, 2, *rule),
        "gathered_attention": (QUERY, KEY, VALUE, indices, *rule[-3:]),
        "gathered_attention_backward": (out, None, QUERY, KEY, VALUE, indices, out, lse, *rule[-3:], False),
        "block_attention": (*blocks, 5, 3, *rule),
        "block_attention_backward": (out, None, *blocks, out, lse, 5, 3, *rule),
    }[op]
    with pytest.raises(RuntimeError, match=r"sink_logits must be float32 \[Hq\], contiguous"):
        overload(op, "cpu")(*arguments)


@pytest.mark.parametrize("softcap", [-1.0, math.nan, math.inf, 1e-40])
def test_wrong_caps_are_refused_in_a_direct_call(softcap):
    rule = PackedRule(None, None, False, 0, 0, 0, 4, 1.0, softcap, None).parts()
    with pytest.raises(RuntimeError, match="softcap must be from 1e-30 to 1e30, or 0 for none"):
        overload("topk_attention", "cpu")(QUERY, KEY, VALUE, 2, *rule)
