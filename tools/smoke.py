"""A few calls of an installed sparse_attn against float64: does this wheel work with this torch, on this machine?

python tools/smoke.py               the package as installed, with its extension
python tools/smoke.py --pure        one that has none

Needs nothing but the package. Start it outside the checkout, or what is in the checkout is tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time

import torch

import sparse_attn


def by_definition(query, key, value, top_k):
    """Causal top-k attention in float64 with a [T, T] matrix."""
    query, key, value = (t.detach().double().requires_grad_() for t in (query, key, value))
    length = query.shape[-2]
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    kept = scores.topk(min(top_k, length)).values[..., -1:]
    out = torch.softmax(scores.masked_fill(scores < kept, -torch.inf), -1) @ value
    return out, (query, key, value)


def check_attention(backend: str | None) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        # The definition gets the same values, rounded to this dtype already.
        inputs = (torch.randn(2, 3, 40, 16).to(dtype).requires_grad_() for _ in range(3))
        query, key, value = inputs
        out = sparse_attn.topk_attention(query, key, value, 8, is_causal=True, backend=backend)
        right, leaves = by_definition(query, key, value, 8)
        torch.testing.assert_close(out.double(), right, atol=tolerance, rtol=tolerance)
        weight = torch.randn_like(out)
        found = torch.autograd.grad(out, (query, key, value), weight)
        for mine, theirs in zip(found, torch.autograd.grad(right, leaves, weight.double()), strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=5 * tolerance, rtol=5 * tolerance)


def check_selection(backend: str | None) -> None:
    query, key, value = (torch.randn(1, 2, 33, 8) for _ in range(3))
    indices = sparse_attn.topk_select(query, key, 5, is_causal=True, window=2, sinks=1, backend=backend)
    again = sparse_attn.gathered_attention(query, key, value, indices, backend=backend)
    fused = sparse_attn.topk_attention(
        query, key, value, 5, is_causal=True, window=2, sinks=1, backend=backend
    )
    assert indices.shape == (1, 2, 33, 5)
    torch.testing.assert_close(again, fused)


def check_embedding() -> None:
    counts = torch.arange(200, 0, -1)
    head = sparse_attn.nn.VariableWidthHead(
        sparse_attn.nn.VariableWidthEmbedding(sparse_attn.plan_widths(counts, 32, ratio=0.5))
    )
    ids = torch.randint(200, (64,))
    hidden = head.embedding(ids)
    loss = head.loss(hidden, ids)
    dense = torch.nn.functional.cross_entropy(head(hidden), ids)
    torch.testing.assert_close(loss, dense)
    loss.backward()


def check_refusal() -> None:
    tensor = torch.randn(1, 1, 4, 8)
    message = ""
    try:
        sparse_attn.topk_attention(tensor, tensor, tensor, -1)
    except ValueError as error:
        message = str(error)
    assert "top_k" in message, f"top_k=-1 was not refused by name: {message!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pure", action="store_true", help="there must be no extension (else: there must be)"
    )
    pure = parser.parse_args().pure
    torch.manual_seed(0)
    start = time.perf_counter()
    has = importlib.util.find_spec("sparse_attn._C") is not None
    if has == pure:
        raise SystemExit(f"the package in {sparse_attn.__file__} has {'an' if has else 'no'} extension")
    query = torch.randn(1, 1, 4, 8)
    wing = sparse_attn.explain(query, query, query, 2).backend
    expected = "reference" if pure else "cpu"
    assert wing == expected, sparse_attn.explain(query, query, query, 2)
    for backend in (None, "reference"):
        check_attention(backend)
        check_selection(backend)
    check_embedding()
    check_refusal()
    print(
        f"smoke: ok on the {wing} wing; torch {torch.__version__}, Python {platform.python_version()}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
