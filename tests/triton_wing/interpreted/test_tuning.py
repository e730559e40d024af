"""Every configuration that tuning may take computes the same, and a tuned call is right from the first one on."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.inputs import index_rows, integers, normal, qkv

import sparse_attn
from sparse_attn.triton_kernels import topk_select, variable_width_cross_entropy
from sparse_attn.triton_kernels.lib import tuning

MOST = 4  # candidates of one kernel


def gathered(heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() for t in qkv(1, heads, kv_heads, 2, 40, 16, dtype=dtype)]
    out = sparse_attn.gathered_attention(*leaves, index_rows((1, 1, 2, 37), 40), backend="triton")
    if dtype == torch.float32:  # its backward has one way for heads in tiles and alone
        return [out.detach()]
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def attended() -> list[torch.Tensor]:
    query, key = integers(1, 2, 3, 8), integers(1, 1, 40, 8, seed=1)
    options = {"is_causal": True, "causal_offset": 37, "return_indices": True, "backend": "triton"}
    return list(sparse_attn.topk_attention(query, key, normal(1, 1, 40, 16), 5, **options))


def selected(dtype: torch.dtype) -> list[torch.Tensor]:
    query, key = integers(1, 1, 33, 8, dtype=dtype), integers(1, 1, 40, 8, dtype=dtype, seed=1)
    return [sparse_attn.topk_select(query, key, 5, backend="triton")]


def bands(dtype: torch.dtype, op: str) -> list[torch.Tensor]:
    tables = [normal(5, 40, dtype=dtype), normal(30, 12, dtype=dtype, seed=1)]
    projections = [None, normal(40, 12, dtype=dtype, seed=2)]
    leaves = [t.requires_grad_() for t in (*tables, projections[1])]
    band = torch.tensor([0] * 5 + [1] * 30, dtype=torch.int32)
    row = torch.cat([torch.arange(5), torch.arange(30)]).int()
    ids = torch.arange(40) * 7 % 35
    if op == "embedding":
        out = sparse_attn.variable_width_embedding(ids, tables, projections, band, row, backend="triton")
    else:
        hidden = normal(40, 40, dtype=dtype, seed=3)
        out = sparse_attn.variable_width_cross_entropy(
            hidden, ids, tables, projections, band, row, backend="triton"
        )
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


CALLS = {
    "heads in tiles": lambda: gathered(8, 1, torch.bfloat16),
    "float32 heads in tiles": lambda: gathered(8, 1, torch.float32),
    "heads alone": lambda: gathered(2, 2, torch.bfloat16),
    "topk_attention": attended,
    "topk_select half": lambda: selected(torch.bfloat16),
    "topk_select float": lambda: selected(torch.float32),
    "embedding half": lambda: bands(torch.bfloat16, "embedding"),
    "embedding float": lambda: bands(torch.float32, "embedding"),
    "loss half": lambda: bands(torch.bfloat16, "loss"),
    "loss float": lambda: bands(torch.float32, "loss"),
}


@pytest.mark.parametrize("call", CALLS)
def test_candidates_agree(call, monkeypatch):
    monkeypatch.setattr(topk_select, "INTERPRETED", False)  # the sizes of a GPU
    want = CALLS[call]()
    tried = set()
    for number in range(1, MOST):

        def choose(kernel, shape, configs, *rest, number=number):
            config = configs[min(number, len(configs) - 1)]
            tried.add(repr(config))
            assert len(configs) <= MOST
            return config

        for module in (tuning, variable_width_cross_entropy):
            monkeypatch.setattr(module, "chosen", choose)
        for ours, first in zip(CALLS[call](), want, strict=True):
            if ours.dtype in (torch.float32, torch.int32):
                torch.testing.assert_close(ours, first)
            else:  # one rounding of a half type either way
                torch.testing.assert_close(ours, first, rtol=2**-6, atol=2**-6 * float(first.abs().max()))
    assert len(tried) >= MOST - 2


@pytest.mark.torch_defaults
@pytest.mark.parametrize("call", ["heads alone", "embedding half", "loss half", "topk_attention"])
def test_a_tuned_call(call, monkeypatch, tmp_path):
    """Timed in the interpreter: results as untuned, and again from what was remembered."""
    want = CALLS[call]()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(tuning, "_winners", None)
    monkeypatch.setattr(tuning, "measure", lambda run, device: (run(), next(times))[1])
    times = iter(float(n) for n in range(1000, 0, -1))  # the last one wins
    for _ in range(2):
        for ours, first in zip(CALLS[call](), want, strict=True):
            torch.testing.assert_close(ours, first, rtol=2**-6, atol=2**-6 * float(first.abs().max()))
    known = json.loads(tuning.cache_file().read_text())
    assert known
    assert int(next(times)) >= 1000 - MOST * len(known), "timed once for each class"
