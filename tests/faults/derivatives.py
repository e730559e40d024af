"""Second derivatives, forward mode, functorch transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vjp, vmap

import sparse_attn as sa
from faults import case, off_by, refused


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _embedding() -> sa.nn.VariableWidthEmbedding:
    torch.manual_seed(0)
    return sa.nn.VariableWidthEmbedding(sa.WidthPlan.from_cutoffs(60, 16, cutoffs=[10], widths=[16, 4]))


@case(
    "`torch.func.jvp` of topk_attention where no input requires grad",
    "a tangent of 0, finite differences 1.88",
)
def forward_mode() -> str:
    q, k, v, dq = (_normal(1, 2, 6, 4, seed=s) for s in range(4))

    def attention(q):
        return sa.topk_attention(q, k, v, 3)

    _, tangent = jvp(attention, (q,), (dq,))
    right = (attention(q + 1e-5 * dq) - attention(q - 1e-5 * dq)) / 2e-5
    return off_by(tangent, right, 1e-8)


@case("the second derivative of block_attention", "dropped with a warning")
def block_attention_twice() -> str:
    q, k, v = (_normal(1, 1, 8, 4, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    blocks = sa.block_select(q, k, 2, block_size=2, query_tile=2)
    out = sa.block_attention(q, k, v, blocks, block_size=2, query_tile=2)

    def penalty():
        (g,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        g.square().sum().backward()

    return refused(penalty, "second derivative")


@case("`torch.func.grad` and `vjp` of topk_attention", "RuntimeError about setup_context")
def functional_gradients() -> str:
    q, k, v = (_normal(1, 2, 6, 4, seed=s) for s in range(3))
    ours = grad(lambda q: sa.topk_attention(q, k, v, 6).sin().sum())(q)
    right = grad(lambda q: F.scaled_dot_product_attention(q, k, v).sin().sum())(q)
    _, pull = vjp(lambda v: sa.topk_attention(q, k, v, 6), v)
    _, dense = vjp(lambda v: F.scaled_dot_product_attention(q, k, v), v)
    off_by(pull(q)[0], dense(q)[0], 1e-12)
    return off_by(ours, right, 1e-12)


@case("per-sample gradients, `vmap(grad)`, of the loss of a tied head", "RuntimeError about setup_context")
def per_sample_gradients() -> str:
    head = sa.nn.VariableWidthHead(_embedding())
    hidden, targets = _normal(3, 5, 16, dtype=torch.float32), torch.arange(15).view(3, 5)
    ours = vmap(grad(lambda h, t: head.loss(h, t)))(hidden, targets)
    right = torch.stack(
        [grad(lambda h, t=t: F.cross_entropy(head(h), t))(h) for h, t in zip(hidden, targets, strict=True)]
    )
    return off_by(ours, right, 1e-6)


@case("`vmap` over the ids of an embedding and over key_lengths", "“.item() on a Tensor”")
def vmap_over_ids() -> str:
    embedding, ids = _embedding(), torch.arange(6).view(2, 3)
    off_by(vmap(embedding)(ids), embedding(ids), 0)
    q, lengths = _normal(3, 1, 2, 6, 4), torch.tensor([[2], [6], [1]])
    ours = vmap(lambda q, n: sa.topk_attention(q, q, q, 2, key_lengths=n))(q, lengths)
    right = torch.stack(
        [sa.topk_attention(a, a, a, 2, key_lengths=n) for a, n in zip(q, lengths, strict=True)]
    )
    return off_by(ours, right, 1e-12)


@case(
    "a score of +inf in bfloat16, on CPUs with and without AVX-512",
    "tests took PyTorch's NaN, or 0, for right",
)
def infinite_score() -> str:
    q, k = (torch.full((1, 1, 1, 4), x, dtype=torch.bfloat16) for x in (3e38, 1.0))
    out, lse = sa.topk_attention(q, k.expand(1, 1, 3, 4), k.expand(1, 1, 3, 4), 2, return_lse=True)
    assert out.isnan().all(), out
    return f"NaN, as inf − inf has it, LSE {lse.item()}"
