"""The ops as users run them, without the deterministic mode that the other tests stand under.

On a GPU that mode turns two things off that are meant for users: sums by atomic additions, and the tuning of Triton's
block sizes. Here both are asked for.
"""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_best
from helpers.embeddings import make_ids, make_tables
from helpers.inputs import index_rows, normal, qkv

from ops import test_variable_width_embedding as of_embeddings
from ops.test_gathered_attention import check

pytestmark = pytest.mark.torch_defaults


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_ATOMICS", "1")
    monkeypatch.setenv("SPARSE_ATTN_TRITON_TUNE", "1")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("shared", [1, 8])
def test_gathered_attention(wing, dtype, shared):
    check(wing, qkv(2, 2 * shared, 2, 9, 40, 16, dtype=dtype), index_rows((2, 2, 9, 12), 40, garbage=True))


@pytest.mark.parametrize("share", ["none", "all"])
def test_topk_select(wing, dtype, share):
    query, key = normal(2, 4, 9, 16, dtype=dtype), normal(2, 2, 70, 16, dtype=dtype, seed=1)
    options = {"is_causal": True, "causal_offset": 61, "share": share}
    assert_best(wing.topk_select(query, key, 8, **options), query, key, 8, **options)


def test_variable_width_embedding(wing, dtype):
    e = make_tables(24, (24, 10, 6), (6, 90, 200), dtype=dtype)
    of_embeddings.check(wing, e, make_ids("uniform", 296, 400))
