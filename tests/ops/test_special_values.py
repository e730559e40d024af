"""NaN, infinities, huge and tiny scores, constant rows, rows that see one key or none."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_close, assert_identical, assert_well_formed
from helpers.inputs import integers, mask, normal, qkv

CAUSAL = {"is_causal": True}
SHARES = ("none", "kv", "all")


def run(wing, inputs, top_k, **options):
    """(out, lse, indices), the indices well formed whatever the values."""
    results = wing.topk_attention(*inputs, top_k, return_lse=True, return_indices=True, **options)
    assert_well_formed(results[2], *inputs[:2], top_k, **options)
    return results


def rows_that_attend_to(indices: torch.Tensor, heads: int, key: int) -> torch.Tensor:
    """bool [B, Hq, Tq]."""
    return (indices == key).any(-1).repeat_interleave(heads // indices.shape[1], dim=1)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_nan_in_a_query(wing, dtype, top_k, share):
    """Its own row is NaN, every other row is what it was."""
    query, key, value = qkv(2, 4, 2, 19, 19, 8, dtype=dtype)
    clean = run(wing, (query, key, value), top_k, share=share, **CAUSAL)
    dirty = query.clone()
    dirty[1, 2, 9, 3] = math.nan
    out, lse, indices = run(wing, (dirty, key, value), top_k, share=share, **CAUSAL)
    assert bool(out[1, 2, 9].isnan().all())
    assert bool(lse[1, 2, 9].isnan())
    others = torch.ones(19, dtype=torch.bool)
    others[9] = False
    for ours, want in zip((out, lse, indices), clean, strict=True):
        assert torch.equal(ours[:, :, others], want[:, :, others])
    assert bool(out[0].isfinite().all())
    if share == "none":
        assert int(out.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("top_k", [1, 5, 40])
@pytest.mark.parametrize("bad", [0, 7, 22])
def test_nan_in_a_key(wing, dtype, bad, top_k, share):
    """Rows that see the key choose it and are NaN, the rest are what they were."""
    query, key, value = qkv(2, 4, 2, 23, 23, 8, dtype=dtype)
    clean = run(wing, (query, key, value), top_k, share=share, **CAUSAL)
    key = key.clone()
    key[1, 1, bad, 5] = math.nan
    out, lse, indices = run(wing, (query, key, value), top_k, share=share, **CAUSAL)
    sees = torch.zeros(2, 4, 23, dtype=torch.bool)
    sees[1, 2:, bad:] = True
    assert bool(rows_that_attend_to(indices, 4, bad)[sees].all())
    assert torch.equal(out.isnan().any(-1), sees)
    assert torch.equal(out.isnan().all(-1), sees)
    assert torch.equal(lse.isnan(), sees)
    untouched = ~sees
    if share == "all":  # the other heads of the batch entry share the choice
        untouched[1, :, bad:] = False
    assert torch.equal(out[untouched], clean[0][untouched])
    assert torch.equal(lse[untouched], clean[1][untouched])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["nan", "-nan", "0 * inf"])
def test_every_kind_of_nan(wing, dtype, kind, share):
    """Also of negative sign, which is what 0 · inf gives on x86: as bits it is the smallest number of all."""
    query, key, value = qkv(1, 4, 2, 9, 40, 8, dtype=dtype)
    if kind == "0 * inf":
        query[..., 2] = 0
        key[:, :, 25, 2] = math.inf
    else:
        key[:, :, 25, 2] = torch.copysign(
            torch.tensor(math.nan), torch.tensor(-1.0 if kind[0] == "-" else 1.0)
        )
    for top_k in (1, 4):
        out, lse, indices = run(wing, (query, key, value), top_k, share=share)
        assert bool((indices == 25).any(-1).all())
        assert bool(out.isnan().all())
        assert bool(lse.isnan().all())


def test_nan_in_many_keys(wing, dtype):
    """More NaN keys than slots, in every place of a vector: well formed, and every row NaN that sees one."""
    query, key, value = qkv(1, 2, 2, 70, 70, 8, dtype=dtype)
    key[0, 0, torch.arange(0, 70, 3)] = math.nan
    key[0, 1, 20:] = math.nan
    out, _, indices = run(wing, (query, key, value), 6, **CAUSAL)
    assert bool(out[0, 0].isnan().all())
    assert torch.equal(out[0, 1].isnan().all(-1), torch.arange(70) >= 20)
    assert bool(key[0, 1, indices[0, 1, 40].long()].isnan().all())


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("where", ["key", "query"])
def test_nan_where_a_row_keeps_all_that_it_sees(wing, dtype, where, share):
    """Rows that need no scores stand beside rows that do: a NaN is chosen once."""
    query, key, value = qkv(1, 2, 1, 70, 70, 8, dtype=dtype)
    if where == "key":
        key[0, 0, 3] = math.nan
    else:
        query[0, :, 37] = math.nan
    indices = run(wing, (query, key, value), 40, share=share, **CAUSAL)[2]
    everything = torch.where(torch.ones(40, 40, dtype=torch.bool).tril(), torch.arange(40), -1)
    assert torch.equal(indices[0, :, :40].long(), everything.expand(indices.shape[1], -1, -1))


def test_forced_keys_leave_no_slot_for_a_nan(wing, dtype):
    """Where window and sinks are the whole budget, a NaN key reaches only the rows whose window holds it."""
    query, key, value = qkv(1, 2, 2, 30, 30, 8, dtype=dtype)
    key[0, :, 12] = math.nan
    out, _, _ = run(wing, (query, key, value), 5, window=3, sinks=2, **CAUSAL)
    row = torch.arange(30)
    assert torch.equal(out[0, 0].isnan().all(-1), (row >= 12) & (row < 15))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hidden_keys_do_not_leak(wing, dtype, bad):
    """What a mask, the length or the diagonal hides may hold anything, keys and values.

    Key 0 is among them, and rows have empty slots: a wing that reads some key in their place must not show it.
    """
    query, key, value = qkv(2, 4, 2, 10, 25, 8, dtype=dtype)
    options = {
        "is_causal": True,
        "causal_offset": 2,
        "key_lengths": torch.tensor([9, 12]),
        "attn_mask": torch.arange(25) % 3 != 0,
    }
    want = run(wing, (query, key, value), 5, **options)
    hidden = torch.zeros(2, 25, dtype=torch.bool)
    hidden[:, ::3] = hidden[0, 9:] = hidden[1, 12:] = True
    for tensor in (key, value):
        tensor[hidden.unsqueeze(1).expand(2, 2, 25)] = bad
    inputs = [t.requires_grad_() for t in (query, key, value)]
    results = run(wing, inputs, 5, **options)
    assert all(torch.equal(ours, true) for ours, true in zip(results, want, strict=True))
    grads = torch.autograd.grad(results[0], inputs, normal(*results[0].shape, dtype=dtype, seed=1))
    assert all(bool(g.isfinite().all()) for g in grads)
    garbage = results[2].where(results[2] >= 0, 25)
    for indices in (results[2], garbage):
        staged = wing.gathered_attention(*inputs, indices)
        assert_close(staged, results[0].double(), "staged")
        again = torch.autograd.grad(staged, inputs, normal(*staged.shape, dtype=dtype, seed=1))
        assert all(bool(g.isfinite().all()) for g in again)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_special_values_in_a_value(wing, dtype, bad):
    """One element of one value: it reaches that element of the rows that attend to it, and nothing else."""
    query, key, value = qkv(1, 2, 1, 31, 31, 8, 6, dtype=dtype)
    clean = run(wing, (query, key, value), 4, **CAUSAL)
    value = value.clone()
    value[0, 0, 5, 2] = bad
    out, lse, indices = run(wing, (query, key, value), 4, **CAUSAL)
    assert torch.equal(indices, clean[2])
    assert torch.equal(lse, clean[1])
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[..., 2] = rows_that_attend_to(indices, 2, 5)
    assert bool(touched.any())
    assert torch.equal(out[~touched], clean[0][~touched])
    expected = torch.full_like(out[touched], bad)
    assert torch.equal(out[touched].isnan(), expected.isnan())
    assert bool(((out[touched] == bad) | expected.isnan()).all())


def test_a_score_of_plus_infinity(wing, dtype):
    """It is chosen first, and its row is NaN, gradients too: ∞ − ∞ in the softmax. Other rows are what they were.

    The formula in float64 is the judge. PyTorch's own attention is none: its half types give NaN or 0, by the CPU.
    """
    query, key, value = qkv(1, 2, 1, 6, 40, 4, dtype=dtype)
    query = query.abs() + 1
    query[..., 1::2, 1] *= -1  # the odd rows' score is −∞
    clean = run(wing, (query, key[:, :, torch.arange(40) != 33], value[:, :, torch.arange(40) != 33]), 3)
    key[0, 0, 33, 1] = math.inf
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out, lse, indices = run(wing, inputs, 3)
    even = torch.arange(6) % 2 == 0
    assert torch.equal((indices == 33).any(-1), even.expand(1, 2, 6))
    exact, exact_lse = (t.detach() for t in oracle.gathered_attention(*inputs, indices))
    assert torch.equal(exact.isnan().all(-1), even.expand(1, 2, 6))
    assert_close(out.detach(), exact, "out")
    assert torch.equal(lse.isfinite(), exact_lse.isfinite())
    assert torch.equal(out[:, :, ~even], clean[0][:, :, ~even])
    assert torch.equal(lse[:, :, ~even], clean[1][:, :, ~even])
    grads = torch.autograd.grad(out, inputs, normal(*out.shape, dtype=dtype, seed=1))
    named = torch.isin(torch.arange(40), indices[:, :, even].long())  # by a row that is NaN
    for grad, bad in zip(grads, (even, named, named), strict=True):
        assert torch.equal(grad.isnan().all(-1), bad.expand(grad.shape[:3]))
        assert torch.equal(grad.isnan().any(-1), bad.expand(grad.shape[:3]))


def test_scores_of_minus_infinity(wing, dtype):
    """Chosen last but before hidden keys, and of weight 0; a row with nothing else is as if it saw no key."""
    query, key, value = qkv(1, 1, 1, 6, 40, 4, dtype=dtype)
    query = query.abs() + 1
    key[0, 0, 4:, 1] = -math.inf
    out, lse, indices = run(wing, (query, key, value), 6)
    assert bool((indices[..., :4] == torch.arange(4)).all())
    want = run(wing, (query, key[:, :, :4], value[:, :, :4]), 6)
    assert_close(out, want[0].double(), "out")
    assert_close(lse, want[1].double(), "lse")
    out, lse, _ = run(wing, (query, key[:, :, 4:], value[:, :, 4:]), 6)
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("share", SHARES)
def test_infinities_among_heads_that_share(wing, dtype, share):
    query, key, value = qkv(1, 4, 2, 9, 50, 4, dtype=dtype)
    key[0, 0, 11, 0] = math.inf
    key[0, 1, 30, 2] = -math.inf
    run(wing, (query, key, value), 5, share=share)


@pytest.mark.parametrize("share", SHARES)
def test_constant_rows(wing, dtype, share):
    """Every key the same: the first ones are chosen and weigh the same.

    The reference has its scores from PyTorch's matrix product, which may round equal columns differently by their
    place: its scores are of integers, and exact.
    """
    make = integers if wing.name == "reference" else normal
    query, key, value = qkv(2, 4, 2, 11, 37, 8, dtype=dtype, make=make)
    key = key[:, :, :1].expand(2, 2, 37, 8)
    out, lse, indices = run(wing, (query, key, value), 5, share=share)
    assert bool((indices == torch.arange(5)).all())
    mean = value[:, :, :5].double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 11, 8)
    assert_close(out, mean, "out")
    _, want = oracle.gathered_attention(query, key, value, indices)
    assert_close(lse, want, "lse")


@pytest.mark.parametrize("share", SHARES)
def test_queries_of_zero(wing, dtype, share):
    _, key, value = qkv(1, 4, 2, 8, 20, 8, dtype=dtype)
    query = torch.zeros(1, 4, 8, 8, dtype=dtype)
    query[:, :, ::2] = -0.0  # −0 and +0 are one score
    _, _, indices = run(wing, (query, key, value), 6, share=share)
    assert bool((indices == torch.arange(6)).all())


def test_negative_zero_ties_with_zero(wing, dtype):
    key = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, 1.0] * 8, dtype=dtype).view(1, 1, 48, 1)
    query = torch.tensor([1.0, -1.0], dtype=dtype).view(1, 1, 2, 1)
    for top_k in (9, 20, 43):
        assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


def test_huge_scores(wing):
    """Scores near 1e37: the softmax is all on one key, nothing overflows."""
    query = torch.full((1, 1, 1, 2), 1e18)
    key = (1 + torch.arange(30).flip(0).view(1, 1, 30, 1).expand(1, 1, 30, 2)) * 1e17
    value = normal(1, 1, 30, 8)
    for sign, best in ((1.0, 0), (-1.0, 29)):
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        out, lse, indices = run(wing, inputs, 4, scale=sign)
        assert_identical(indices, query, key, 4, scale=sign)
        assert torch.equal(out[0, 0, 0], value[0, 0, best])
        assert_close(lse, oracle.gathered_attention(query, key, value, indices, sign)[1], "lse")
        grads = torch.autograd.grad(out.sum(), inputs)
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("size", [1e-10, 1e-18, 1e-22])
def test_tiny_scores(wing, size):
    """Scores that underflow count as ties; the weights are all the same."""
    query, key, value = qkv(1, 2, 1, 9, 33, 8)
    query, key = query * size, key * size
    out, _, indices = run(wing, (query, key, value), 5)
    assert_best(indices, query, key, 5)
    assert_close(out, oracle.gathered_attention(query, key, value, indices)[0], "out")


def test_large_score_offsets_cancel(wing, dtype):
    """All scores of a row near 200, or near −200: exponentials are taken of differences alone."""
    query, key, value = qkv(1, 2, 2, 7, 40, 8, dtype=dtype, make=integers)
    query[..., 0], key[..., 0] = 14, 14
    for scale in (1.0, -1.0):
        out, lse, indices = run(wing, (query, key, value), 40, scale=scale)
        want, want_lse, _ = oracle.topk_attention(query, key, value, 40, scale=scale)
        assert_close(out, want, "out", units=2 if dtype in (torch.bfloat16, torch.float16) else 64)
        assert_close(lse, want_lse, "lse", units=2)
        assert_identical(indices, query, key, 40, scale=scale)


@pytest.mark.parametrize("share", SHARES)
def test_rows_that_see_nothing(wing, dtype, share):
    query, key, value = qkv(2, 4, 2, 12, 12, 8, dtype=dtype)
    nothing = {
        "mask": {"attn_mask": torch.zeros(12, 12, dtype=torch.bool)},
        "lengths": {"key_lengths": torch.zeros(2, dtype=torch.int32)},
        "offset": {"is_causal": True, "causal_offset": -12, "window": 2, "sinks": 2},
    }
    for options in nothing.values():
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        out, lse, indices = run(wing, inputs, 4, share=share, **options)
        assert not out.any()
        assert bool((lse == -math.inf).all())
        assert bool((indices == -1).all())
        grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize("share", SHARES)
def test_rows_that_see_some_nothing_and_one(wing, dtype, share):
    """Rows with 0, 1, 2, … visible keys beside each other; with one, the output is that value to the bit."""
    query, key, value = qkv(1, 4, 2, 24, 24, 8, dtype=dtype)
    seen = mask(24, 24, density=0.5).logical_and(torch.arange(24) < torch.arange(24).view(-1, 1) // 2)
    seen[1], seen[2] = False, False
    seen[2, 17] = True
    out, lse, indices = run(wing, (query, key, value), 6, attn_mask=seen, share=share)
    want, want_lse = oracle.gathered_attention(query, key, value, indices)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    assert torch.equal(out[0, :, 2], value[0, :, 17].repeat_interleave(2, 0))
    assert not out[0, :, 1].any()


def test_one_key_and_one_query(wing, dtype):
    query, key, value = qkv(3, 4, 2, 1, 1, 8, dtype=dtype)
    for options in ({}, CAUSAL, {"is_causal": True, "window": 1}, {"sinks": 1}):
        out, lse, indices = run(wing, (query, key, value), 1, **options)
        assert not indices.any()
        assert torch.equal(out, value.repeat_interleave(2, 1))
        assert_close(lse, oracle.scores(query, key)[..., 0], "lse")
