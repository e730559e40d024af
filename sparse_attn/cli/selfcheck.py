"""One small attention, forward and backward, on one wing: is what it computes right?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import sparse_attn

# float32 sums of 65 terms err by about 1e-6; a wrong key or a missed term errs by 1e-2 and more.
TOLERANCE = 1e-4
SHAPE = {"B": 1, "Hq": 4, "Hkv": 2, "T": 65, "D": 32}  # 65: no multiple of any vector or tile width
TOP_K = 16


def self_check(wing: str, device: str) -> dict:
    """`{"passed", "errors": {what: relative error}, "error": exception or None}` of `wing` on `device`."""
    try:
        errors = {**_against_float64(wing, device), **_against_dense(wing, device)}
    except Exception as error:  # whatever a broken wing raises is the finding
        return {"passed": False, "errors": {}, "error": f"{type(error).__name__}: {error}"}
    strange = [what for what, value in errors.items() if not math.isfinite(value)]
    if strange:  # JSON knows no NaN, so it is said in words
        return {"passed": False, "errors": {}, "error": f"not finite: {', '.join(strange)}"}
    passed = all(value <= TOLERANCE for value in errors.values())
    return {"passed": passed, "errors": errors, "error": None}


def _inputs(device: str) -> tuple[Tensor, ...]:
    """query, key, value, grad_out; the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(SHAPE["B"], SHAPE[heads], SHAPE["T"], SHAPE["D"]) for heads in ("Hq", "Hkv", "Hkv", "Hq")]
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return *(t.requires_grad_() for t in tensors[:3]), tensors[3]


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors]


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.detach().cpu().double() - want).abs().max() / want.abs().max()).item()


def _against_float64(wing: str, device: str) -> dict[str, float]:
    query, key, value, grad_out = _inputs(device)
    out, indices = sparse_attn.topk_attention(
        query, key, value, TOP_K, is_causal=True, window=4, return_indices=True, backend=wing
    )
    grads = torch.autograd.grad(out, (query, key, value), grad_out)

    query, key, value, grad_out = _double(query, key, value, grad_out)
    best = sparse_attn.topk_select(query, key, TOP_K, is_causal=True, window=4, backend="reference")
    # Another key of (nearly) the same score is as good, so scores are compared, not positions.
    errors = {"selected scores": _relative(_scores(query, key, indices.cpu()), _scores(query, key, best))}
    want = sparse_attn.gathered_attention(query, key, value, indices.cpu(), backend="reference")
    errors["output"] = _relative(out, want)
    for name, got, wanted in zip(
        ("query", "key", "value"),
        grads,
        torch.autograd.grad(want, (query, key, value), grad_out),
        strict=True,
    ):
        errors[f"gradient of {name}"] = _relative(got, wanted)
    return errors


def _scores(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """The scores of the chosen keys, ascending, [B, Hq, T, K]; an empty slot counts 0."""
    with torch.no_grad():
        every = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
        chosen = every.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, 0.0)
        return chosen.sort(dim=-1).values


def _against_dense(wing: str, device: str) -> dict[str, float]:
    query, key, value, grad_out = _inputs(device)
    out = sparse_attn.topk_attention(query, key, value, SHAPE["T"], is_causal=True, backend=wing)
    grads = torch.autograd.grad(out, (query, key, value), grad_out)

    query, key, value, grad_out = _double(query, key, value, grad_out)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    wanted = torch.autograd.grad(want, (query, key, value), grad_out)
    worst = max(_relative(*pair) for pair in zip((out, *grads), (want, *wanted), strict=True))
    return {"dense, against SDPA": worst}
