"""`explain_call`: for every function that calls an op, the wing that would run it, and nothing runs."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.inputs import qkv
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn.wings import base

Q, K, V = qkv(1, 4, 2, 64, 64, 16)
CAUSAL = {"is_causal": True}
INDICES = torch.zeros(1, 1, 64, 2, dtype=torch.int32)
BLOCKS = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
TILES = {"block_size": 16, "query_tile": 16}
MAPS = torch.zeros(8, dtype=torch.int32), torch.arange(8)
TABLES = [torch.randn(8, 4)], [None]

PACKED, BOUNDS = torch.randn(5, 2, 4), torch.tensor([0, 3, 5])
OWN_BLOCKS = sparse_attn.varlen_block_select(PACKED, PACKED, BOUNDS, None, 3, 3, 2)
CALLS = {
    "topk_select": ((Q, K, 4), CAUSAL),
    "quantized_select": ((Q, K, 4), CAUSAL),
    "refine_blocks": ((Q, K, BLOCKS, 4), TILES),
    "indexer_select": ((Q, K, torch.ones(1, 4, 64), 4), CAUSAL),
    "gathered_attention": ((Q, K, V, INDICES), {}),
    "topk_attention": ((Q, K, V, 4), CAUSAL),
    "topk_attention_with_residual": ((Q, K, V, 4), CAUSAL),
    "block_select": ((Q, K, 2), {**CAUSAL, **TILES}),
    "block_attention": ((Q, K, V, BLOCKS), TILES),
    "varlen_topk_select": ((PACKED, PACKED, BOUNDS, None, 3, 3, 2), {}),
    "varlen_topk_attention": ((PACKED, PACKED, PACKED, BOUNDS, None, 3, 3, 2), {}),
    "varlen_gathered_attention": (
        (PACKED, PACKED, PACKED, torch.zeros(5, 1, 2).int(), BOUNDS, None, 3, 3),
        {},
    ),
    "varlen_block_select": ((PACKED, PACKED, BOUNDS, None, 3, 3, 2), {}),
    "varlen_block_attention": (
        (PACKED, PACKED, PACKED, OWN_BLOCKS, BOUNDS, None, 3, 3),
        {},
    ),
    "varlen_indexer_select": ((PACKED, PACKED, torch.ones(5, 2), BOUNDS, None, 3, 3, 2), {}),
    "variable_width_embedding": ((torch.tensor([1, 2]), *TABLES, *MAPS), {}),
    "variable_width_cross_entropy": ((torch.randn(2, 4), torch.tensor([1, 2]), *TABLES, *MAPS), {}),
}


class OurOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_attn":
            self.names.append(func.name().removeprefix("sparse_attn::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_it_names_the_wing_and_runs_nothing(name, backend):
    function, (arguments, options) = getattr(sparse_attn, name), CALLS[name]
    with OurOps() as ran:
        explanation = sparse_attn.explain_call(function, *arguments, **options, backend=backend)
    assert ran.names == []
    assert set(explanation.reasons) == {w.name for w in base.wings()}
    assert explanation.reasons[explanation.backend] is None
    with OurOps() as ran:
        function(*arguments, **options, backend=backend)
    assert ran.names[0].endswith(f".{explanation.backend}")


def test_every_function_with_a_backend_is_here():
    import inspect

    public = (getattr(sparse_attn, name) for name in sparse_attn.__all__)
    choosing = {
        f.__name__ for f in public if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters
    }
    assert choosing - {"explain", "attend"} == set(CALLS)


def test_it_raises_what_the_call_would_raise():
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        sparse_attn.explain_call(sparse_attn.topk_select, Q, K, 0)
    with pytest.raises(ValueError, match="cannot run quantized_select here"):
        sparse_attn.explain_call(sparse_attn.quantized_select, Q.double(), K.double(), 4, backend="cpu")
    with pytest.raises(TypeError, match="a function that calls an op"):
        sparse_attn.explain_call(len, [])
    with pytest.raises(TypeError, match="a function that calls an op"):
        sparse_attn.explain_call(None)


def test_other_threads_go_on():
    """Only calls of the thread that asks are explained."""
    results = []

    def attended(*arguments):
        other = threading.Thread(target=lambda: results.append(sparse_attn.topk_select(Q, K, 4)))
        other.start()
        other.join()
        return sparse_attn.topk_select(*arguments)

    assert sparse_attn.explain_call(attended, Q, K, 4).op == "topk_select"
    assert results[0].shape == (1, 4, 64, 4)
    assert sparse_attn.topk_select(Q, K, 4).shape == (1, 4, 64, 4)
