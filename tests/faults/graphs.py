"""What compiles, and what works without Python."""

from __future__ import annotations

import torch

import sparse_attn as sa
from faults import case, off_by


@case("`indexer_loss` under torch.compile", "Unsupported: torch.autograd.grad")
def indexer_loss_compiles() -> str:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 24, 4), (1, 1, 24, 4), (1, 2, 24), (1, 2, 24, 8), (1, 2, 24, 8)
    index_query, *others = (torch.randn(shape, generator=generator) for shape in shapes)

    def loss(index_query):
        return sa.indexer_loss(index_query, *others, is_causal=True)

    eager, compiled = (index_query.clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    return "one graph, the gradient " + off_by(compiled.grad, eager.grad, 1e-6)


@case("the schemas of the ops in a program without Python", "“did you forget to def()”")
def schemas_without_python() -> str:
    entry = torch._C._dispatch_dump("sparse_attn::topk_attention.cpu")
    assert "topk_attention.cpp" in entry, entry
    return "defined by the library; tests/test_build.py runs such a program"
