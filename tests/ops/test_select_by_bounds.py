"""Selection by bounds of rounded scores: the same bits as by the full product, whatever the inputs."""

from __future__ import annotations

import pytest
import torch
from helpers.bounds import bounds_of, survivors
from helpers.inputs import OPTIONS, integers, normal, options_for

import sparse_attn
from sparse_attn.wings import extension
from sparse_attn.wings.cpu import selection_by_bounds

native = extension.module
compiled = pytest.mark.skipif(native is None, reason=str(extension.load_error))


# Rows of bfloat16 are multiplied by tiles; without those 9 bits are 16.
BITS = (8, 9, 16) if native is not None and native.cpu_isa() == "amx" else (8, 16)


def same_bits(query, key, value, top_k, **options) -> dict[str, int]:
    """Asserts that all ways give the same out, lse and indices; what the bounds of 16 bits did."""
    call = lambda: sparse_attn.topk_attention(  # noqa: E731
        query, key, value, top_k, return_lse=True, return_indices=True, backend="cpu", **options
    )
    with selection_by_bounds(False) as counts:
        full = call()
    assert counts["blocks"] == counts["given_up"] == 0
    for bits in BITS:
        with selection_by_bounds(True, bits) as counts:
            bounded = call()
            chosen = sparse_attn.topk_select(query, key, top_k, backend="cpu", **options)
        for name, a, b in zip(("out", "lse", "indices"), full, bounded, strict=True):
            whole = {torch.float32: torch.int32, torch.int32: torch.int32}.get(a.dtype, torch.int16)
            # Of a NaN only that it is one.
            differ = (a.view(whole) != b.view(whole)) & ~((a != a) & (b != b))
            assert not differ.any(), (
                f"{name} by {bits} bits: {int(differ.sum())} differ, first at {differ.nonzero()[0].tolist()}"
            )
        assert torch.equal(chosen, full[2]), bits
    return counts


def correlated(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows like a model's: a common mean, a few large components, neighbours alike."""
    rows = normal(*shape, seed=seed)
    rows = rows + 0.7 * rows.roll(1, -2) + 2 * normal(*shape[:2], 1, shape[-1], seed=seed + 1)
    return rows * (1 + 4 * (torch.arange(shape[-1]) % 16 == 3))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_rules(name, dtype):
    for number, (make, heads, length, dim, top_k) in enumerate(
        [(normal, (2, 2), 150, 64, 16), (correlated, (4, 2), 131, 40, 9), (integers, (3, 1), 97, 7, 8)]
    ):
        query, key, value = (make(2, h, length, dim, seed=i) for i, h in enumerate((*heads, heads[1])))
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        counts = same_bits(query, key, value, top_k, **options_for(name, query, key, seed=number))
        assert (counts["blocks"] > 0) == (name != "zero_scale")  # all keys tie there


@compiled
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 31, 72, 96, 128, 200, 256])
def test_head_dimensions(dim):
    for dtype in (torch.float32, torch.bfloat16):
        query, key = correlated(1, 2, 120, dim).to(dtype), correlated(1, 1, 120, dim, seed=5).to(dtype)
        same_bits(query, key, key, 7, is_causal=True)


@compiled
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_scales_and_layouts(scale):
    query, key = correlated(1, 80, 4, 32).transpose(1, 2), correlated(1, 90, 2, 32, seed=3).transpose(1, 2)
    same_bits(query, key, key, 6, scale=scale, is_causal=True, causal_offset=10)
    same_bits(query, key.mT.contiguous().mT, key, 6, scale=scale)  # keys whose components are not neighbours


def _nan(query, key):
    query[0, 0, 20], query[0, 1, 3, 5] = torch.nan, torch.nan
    key[0, 0, 30], key[0, 1, 77, 2] = torch.nan, torch.nan


def _infinite(query, key):
    query[0, 0, 20, 1], query[0, 1, 3, 5] = torch.inf, -torch.inf
    key[0, 0, 30, 1], key[0, 1, 77, 2] = torch.inf, -torch.inf


def _zero_rows(query, key):
    query[:, :, ::3] = 0
    key[:, :, ::4] = 0


def _outlier(query, key):
    key[:, :, 7] *= 1000
    key[..., 5] *= 100


def _ties(query, key):
    key.copy_(key[:, :, torch.arange(key.shape[2]) % 5])


def _near_ties(query, key):
    key.copy_(key[:, :, :1] * (1 + 1e-6 * torch.randn(1, 1, key.shape[2], 1)))


def _tiny(query, key):
    query *= 1e-30
    key *= 1e-15


def _denormal(query, key):
    query *= 1e-38
    key[:, :, ::2] *= 1e-38


def _huge(query, key):
    query *= 1e30
    key *= 1e25


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [_nan, _infinite, _zero_rows, _outlier, _ties, _near_ties, _tiny, _denormal, _huge]
)
def test_special_values(change, dtype):
    query, key = normal(1, 2, 300, 48), normal(1, 2, 300, 48, seed=1)
    change(query, key)
    query, key = query.to(dtype), key.to(dtype)
    same_bits(query, key, normal(1, 2, 300, 48).to(dtype), 12, is_causal=True)
    same_bits(query, key, key, 12, is_causal=True, window=3, sinks=2)


def _sorted_by_score(query, key, descending):
    """The same keys for all queries, which agree on their order."""
    query.copy_(query[:, :, :1] * (1 + torch.rand(query.shape[2], 1)))
    order = (key * query[:, :, :1]).sum(-1, keepdim=True).argsort(-2, descending=descending)
    return key.gather(-2, order.expand_as(key))


# Scores are kept for 16,384 keys at a time: what comes before and behind is another part.
@compiled
@pytest.mark.parametrize(
    "order", ["random", "ascending", "descending", "alike 128 keys apart", "in one place"]
)
@pytest.mark.parametrize(
    "rule",
    [
        {"causal_offset": 16370},
        {"causal_offset": 32800, "window": 5, "sinks": 3},
        {"causal_offset": 50000},
        {"causal_offset": 50000, "key_starts": torch.arange(40).mul(828)[None]},
        {"causal_offset": 36000, "mask": True},
    ],
)
def test_rows_of_several_parts(rule, order):
    query, key = normal(1, 2, 40, 32), normal(1, 2, 50400, 32, seed=1)
    if order in ("ascending", "descending"):
        key = _sorted_by_score(query, key, order == "descending")
    if order == "alike 128 keys apart":  # the best keys of a query fall into few groups
        key = key[:, :, :128].repeat(1, 1, 394, 1)[:, :, : key.shape[2]] + 0.05 * key
    if order == "in one place":
        key[:, :, 20000:20100] += query.mean(-2, keepdim=True) + query[:, :, :1]
    rule = dict(rule)
    if rule.pop("mask", False):
        rule["attn_mask"] = torch.rand(40, 50400, generator=torch.Generator().manual_seed(2)) < 0.3
    counts = same_bits(query, key, key, 20, is_causal=True, **rule)
    assert counts["given_up"] == 0


# What rows may keep is guessed from the group of 4, 6 or 12 rows before: groups that are not alike, either way.
@compiled
@pytest.mark.parametrize("rows", [1, 4, 6, 12])
@pytest.mark.parametrize("near", [0.0, 0.02, 0.5, 3.0])
def test_rows_unlike_those_before(rows, near):
    query, key = normal(1, 2, 100, 32), normal(1, 2, 3000, 32, seed=1)
    # Every other group has as many good keys as it keeps, some, or none that others lack.
    for group in range(rows, 100, 2 * rows):
        there = slice(20 * group, 20 * group + 13)
        key[:, :, there] += near * query[:, :, group : group + 1]
    query[:, :, 50:] *= torch.exp2(4 * normal(1, 2, 50, 1, seed=2))
    for top_k in (13, 40):
        assert same_bits(query, key, key, top_k)["given_up"] == 0
        same_bits(query, key, key, top_k, is_causal=True, causal_offset=2900)


@compiled
def test_budgets_of_any_size():
    query, key = correlated(1, 2, 50, 40), correlated(1, 2, 700, 40, seed=1)
    for top_k in (1, 2, 17, 64, 100, 300, 650, 699):
        same_bits(query, key, key, top_k, is_causal=True, causal_offset=650)
    query, key = normal(1, 1, 30, 16), normal(1, 1, 9000, 16, seed=1)
    for top_k in (1100, 3000):
        same_bits(query, key, key, top_k, is_causal=True, causal_offset=8970)


@compiled
def test_keys_of_very_different_lengths():
    query, key = normal(1, 2, 60, 64), normal(1, 2, 1000, 64, seed=1)
    for powers in (3.0, 12.0):  # of two, either way
        lengths = torch.exp2(powers * torch.randn(1, 2, 1000, 1, generator=torch.Generator().manual_seed(3)))
        same_bits(query, key * lengths, key, 15)
        same_bits(query, key * lengths.sort(2).values, key, 15, is_causal=True, causal_offset=940)


@compiled
def test_any_number_of_threads():
    query, key = correlated(1, 3, 400, 64), correlated(1, 3, 400, 64, seed=1)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            same_bits(query, key, key, 20, is_causal=True)
    finally:
        torch.set_num_threads(threads)


@compiled
def test_bounds_leave_few_keys_and_give_up_where_they_prune_nothing():
    query, key = correlated(1, 2, 600, 64), correlated(1, 2, 600, 64, seed=1)
    counts = same_bits(query, key, key, 16)
    assert counts["given_up"] == 0
    assert counts["budget"] == 16 * counts["rows"]
    assert counts["kept"] < 1.1 * counts["budget"]
    assert counts["scored"] < 0.2 * counts["budget"]
    _near_ties(query, key)
    counts = same_bits(query, key, key, 16)
    assert counts["given_up"] > 0


@pytest.mark.skipif(9 not in BITS, reason="bfloat16 is multiplied in tiles on CPUs with AMX alone")
@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 1.5), (torch.bfloat16, 1.05)])
def test_tiles_of_bfloat16_leave_few_keys(dtype, left):
    """That they did the work, not the full product behind them: of bfloat16 nothing is rounded."""
    query, key = (normal(1, 2, 1200, 64, dtype=dtype, seed=i) for i in range(2))
    with selection_by_bounds(True, 9) as counts:
        sparse_attn.topk_select(query, key, 32, is_causal=True, backend="cpu")
    assert counts["given_up"] == 0 < counts["blocks"]
    assert counts["budget"] <= counts["kept"] < left * counts["budget"]


@compiled
def test_long_rows_choose_bounds_by_themselves():
    query, key = normal(1, 1, 1024, 64), normal(1, 1, 1024, 64, seed=1)
    before = native.bounds_counts()
    budget = 8 if native.cpu_isa().startswith("neon_") else 32  # 64-bit ARM wants longer rows for it
    sparse_attn.topk_select(query, key, budget, is_causal=True, backend="cpu")
    ran = native.bounds_counts()["blocks"] > before["blocks"]
    assert ran == (native.cpu_isa() not in ("generic", "neon"))
    before = native.bounds_counts()
    sparse_attn.topk_select(query[:, :, :256], key[:, :, :256], 32, is_causal=True, backend="cpu")
    assert native.bounds_counts() == before


@pytest.mark.parametrize("norm", [181, 2900, 32700])
@pytest.mark.parametrize("make", [normal, correlated])
def test_no_key_of_the_true_selection_is_ever_pruned(make, norm):
    for seed in range(5):
        query, key = make(1, 2, 64, 40, seed=seed), make(1, 2, 300, 40, seed=seed + 50)
        bounds = bounds_of(query, key, norm)
        left = survivors(bounds, 10)
        exact = query @ key.mT  # float32 sums, in some order
        assert left.gather(-1, exact.topk(10, -1).indices).all()
        shifted = exact.double() - (query.double() @ key.double().mean(-2, keepdim=True).mT)
        assert (shifted >= bounds.lower).all()
        assert (shifted <= bounds.upper).all()
        if norm == 32700:
            assert left.sum() <= 1.05 * 10 * left[..., 0].numel()


@compiled
def test_explain_measures():
    """What a run of the call did; on other wings nothing is known of it, and without the option nothing runs."""
    query, key, value = (normal(1, 2, 700, 64, seed=i) for i in range(3))
    call = lambda **options: sparse_attn.explain(query, key, value, 16, is_causal=True, **options)  # noqa: E731
    with selection_by_bounds(True) as counts:
        said = call(measure=True)
        plain = call()
    assert said.measured.startswith("by bounds: 1."), said.measured
    assert said.measured in str(said)
    assert counts["rows"] == 2 * (700 - 16)
    assert plain.measured is None
    assert "measured" not in str(plain)
    with selection_by_bounds(False):
        assert call(measure=True).measured == "every score exact"
    assert call(measure=True, backend="reference").measured is None
