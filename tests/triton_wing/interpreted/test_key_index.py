"""Selection with a key index in Triton, interpreted: the bits of that without one, proven or selected again."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import integers, normal, qkv
from helpers.wings import overload
from ops import test_key_index as ops

from sparse_attn import KeyIndex
from sparse_attn.ops.key_index import OP
from sparse_attn.rule import Rule
from sparse_attn.triton_kernels import indexed_select, topk_select

HALF, FLOAT, SHORT = torch.bfloat16, torch.float32, torch.float16


@pytest.mark.parametrize(
    ("sizes", "dtype", "make"),
    [
        ((1, 2, 2, 1, 300, 64), FLOAT, normal),
        ((2, 4, 1, 1, 200, 128), HALF, ops.outliers),
        ((1, 3, 1, 3, 200, 33), SHORT, integers),
        ((1, 1, 1, 16, 160, 1), FLOAT, ops.alike),
        ((1, 1, 1, 2, 5, 256), HALF, normal),
    ],
)
def test_sizes(wing, sizes, dtype, make):
    inputs = qkv(*sizes, dtype=dtype, make=make)
    ops.assert_same(wing, inputs, 7)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"is_causal": True, "causal_offset": 190, "window": 3, "sinks": 2}, FLOAT),
        ({"is_causal": True, "causal_offset": torch.tensor([190, 100]), "window": 2, "sinks": 1}, HALF),
        ({"key_starts": torch.tensor([0, 57]), "sinks": 2, "scale": -1.0}, SHORT),
        ({"key_lengths": torch.tensor([200, 31]), "softcap": 1.0, "sink_logits": normal(2)}, FLOAT),
        ({"attn_mask": normal(3, 200) > 0}, FLOAT),
        ({"is_causal": True, "causal_offset": 197, "window": 6, "sinks": 2}, FLOAT),
    ],
)
def test_rules(wing, options, dtype):
    ops.assert_same(wing, qkv(2, 2, 1, 3, 200, 24, dtype=dtype), 8, **options)


@pytest.mark.parametrize("split", [1, 5])
def test_keys_split_over_programs(wing, split, monkeypatch):
    """Also of rows that are selected again, of which each part has candidates, and of others beside them."""
    length = -(-200 // split // 32) * 32
    monkeypatch.setattr(topk_select, "_splits", lambda *_: (split, length))
    query, key, value = qkv(1, 4, 2, 2, 200, 24)
    ops.assert_same(wing, (query, key, value), 9, is_causal=True, causal_offset=198, window=2)
    key[:, 1] = key[:, 1, :1]  # ties: nothing is proven of its heads
    ops.assert_same(wing, (query, key, value), 9)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_special_values(wing, dtype):
    """Of keys and of queries, with which the index says nothing."""
    query, key, value = qkv(1, 2, 1, 2, 200, 16, dtype=dtype)
    for at, bad in enumerate((math.nan, math.inf, -math.inf, 3e38, 1e30, 1e-38)):
        key[0, 0, 30 * at + 5] = bad
    ops.assert_same(wing, (query, key, value), 12)
    query[0, 0, 1, 3], query[0, 1, 0] = math.nan, 0.0
    ops.assert_same(wing, (query, key, value), 12, scale=-1.0)
    ops.assert_same(wing, (query * 1e-30, key.nan_to_num(1.0, 1.0, 1.0), value), 12)


def test_where_it_does_not_serve(wing):
    ops.assert_same(wing, qkv(1, 4, 2, 2, 200, 16), 9, share="kv")
    ops.assert_same(wing, qkv(1, 1, 1, 17, 200, 16), 9)


def test_other_calls(wing):
    ops.test_gradients(wing)
    ops.test_op(wing)


def test_the_bounds_decide(wing):
    """As in `ops`, of fewer queries and keys."""
    query, key, _ = qkv(1, 2, 1, 2, 300, 64)
    index = KeyIndex.of(key)
    index.bounds[..., 1::2] = 0.0
    wrong = wing.topk_select(query, key, 10, key_index=index)
    assert not torch.equal(wrong, wing.topk_select(query, key, 10))


def redone(query: torch.Tensor, key: torch.Tensor, top_k: int, monkeypatch) -> list[int]:
    """How many rows are selected again."""
    counts = []

    def note(*arguments, redo=None, **options):
        if redo is not None:
            counts.append(int(redo[0].sum()))
        return topk_select.select(*arguments, redo=redo, **options)

    monkeypatch.setattr(indexed_select, "select", note)
    rule = Rule().packed(query, key, top_k)
    OP.on("triton")(query, key, top_k, *rule.parts(), *KeyIndex.of(key).tensors())
    return counts


def test_most_rows_are_proven(monkeypatch):
    """Else it would cost more than it saves. On few calls it is not even asked."""
    query, key, _ = qkv(1, 4, 2, 2, 300, 64, make=ops.outliers)
    assert redone(query, key, 16, monkeypatch) == [0]
    assert redone(query, torch.ones_like(key), 16, monkeypatch) == [8]
    query[:, 3, 1] = math.nan
    assert redone(query, key, 16, monkeypatch) == [1]
    assert redone(query, key[:, :, :190], 16, monkeypatch) == []


@pytest.mark.parametrize("dtype", [FLOAT, HALF, SHORT])
@pytest.mark.parametrize("make", [normal, ops.outliers, ops.alike])
def test_rows_of_the_index(make, dtype):
    """Of the definition's numbers, written in pieces, none is missed and none lies beside them."""
    key = make(2, 3, 77, 21, dtype=dtype, seed=1)
    key[:, :, ::9] *= 1e-14 if dtype == FLOAT else 0.0
    key[0, 0, 3, 2], key[1, 1, 4, 1], key[1, 2, 9] = math.nan, math.inf, 0.0
    index = KeyIndex.of(key)
    parts = {
        name: (torch.full_like(index.codes, 77), torch.full_like(index.bounds, 5.0))
        for name in ("triton", "reference")
    }
    for name, (codes, bounds) in parts.items():
        begin = 0
        for piece in key.split([1, 30, 46], dim=2):
            overload("index_keys", name)(piece, codes, bounds, index.shift, begin)
            begin += piece.shape[2]
    ours, want = parts["triton"], parts["reference"]
    assert int((ours[0].int() - want[0].int()).abs().max()) <= 1
    assert (ours[0] != want[0]).float().mean() < 1e-2
    torch.testing.assert_close(ours[1], want[1], rtol=2e-3, atol=1e-30)
