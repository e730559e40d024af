"""The reference wing works through its queries in chunks; where they end must not show."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import OPTIONS, normal, options_for, qkv

import sparse_attn.wings.reference.chunks
from sparse_attn.wings.reference.chunks import query_chunks


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_do_not_show(monkeypatch, name):
    def run():
        inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 23, 31, 8, 5, dtype=torch.float64)]
        options = options_for(name, *inputs[:2]) | {"share": "kv", "backend": "reference"}
        results = sparse_attn.topk_attention(*inputs, 6, return_lse=True, return_indices=True, **options)
        grads = torch.autograd.grad(
            results[0], inputs, normal(*results[0].shape, dtype=torch.float64, seed=4)
        )
        return [*results, *grads]

    whole = run()
    for elements in (1, 2000, 10000):
        monkeypatch.setattr(sparse_attn.wings.reference.chunks, "_ELEMENTS", elements)
        for ours, want in zip(run(), whole, strict=True):
            torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("length", [0, 1, 7, 100])
@pytest.mark.parametrize("per_query", [0, 1, 1 << 22, 1 << 40])
def test_chunks_cover_every_query_once(length, per_query):
    chunks = list(query_chunks(length, per_query))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(length))
    for chunk in chunks:
        assert (chunk.stop - chunk.start) * per_query <= 1 << 24 or chunk.stop - chunk.start == 1
