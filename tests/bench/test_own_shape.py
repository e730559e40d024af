"""A shape of one's own: what is measured, what is left out, and what is said about it."""

from __future__ import annotations

import pytest

from sparse_attn.bench import own_shape
from sparse_attn.bench.own_shape import Shape, Wish

pytestmark = pytest.mark.torch_defaults


def row(dtype, direction, top_k, faster, queries=None):
    case = {"dtype": dtype, "direction": direction, "top_k": top_k, "query_length": queries}
    return {"case": case, "rivals": {"sdpa": {"faster": faster}}}


def test_the_verdict_names_the_winner():
    rows = [
        row("float32", "forward", 64, 2.0),
        row("float32", "forward", 256, 0.5),
        row("float32", "both", 64, 1.0),
    ]
    rows.append(row("float32", "forward", 64, 0.25, 1))
    assert own_shape.verdict(rows) == [
        "At this shape in float32, forward: topk_attention is faster than SDPA (2.0× at K=64), SDPA is faster (2.0× at "
        "K=256); forward + backward: both are as fast (K=64); one decoding step: SDPA is faster (4.0× at K=64)."
    ]


def test_where_dense_wins_everything_it_says_so():
    (sentence,) = own_shape.verdict([row("bfloat16", "forward", 64, 0.5)])
    assert sentence.endswith("it pays nowhere here, so stay with SDPA.")
    assert "nothing can be said" in own_shape.verdict([])[0]


def test_what_takes_too_long_is_left_out(monkeypatch):
    seconds = {"ours": 1.0, "sdpa": 0.5, "plain_tuned": 1e6, "flex": 1.0}
    cases = next(own_shape.groups(Wish(Shape(1, 2, 2, 64, 64, 16), (4, 8), ("float32",))))
    kept, absent = own_shape._chosen(cases, seconds, 12.0)
    assert [case.top_k for case in kept] == [4]
    assert {"K=8", "plain_tuned"} <= set(absent)
    assert "--seconds" in absent["plain_tuned"]


def test_estimates_count_the_visible_keys():
    (case, *_), *_ = own_shape.groups(Wish(Shape(2, 2, 2, 1024, 2048, 16), (4,), ("float32",)))
    small, times = own_shape._probe(case)
    assert (small.batch, small.queries, small.causal) == (1, own_shape.PROBED, False)
    assert small.length == pytest.approx(1536, abs=1)
    assert times == 2 * 1024 / own_shape.PROBED
