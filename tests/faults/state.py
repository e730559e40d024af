"""What a call, a block or a module leaves behind."""

from __future__ import annotations

import io
import threading

import torch

import sparse_attn as sa
from faults import case, off_by, refused


@case("two threads leave their `use_backend` blocks in another order", "“reference” stays forced for good")
def use_backend_in_threads() -> str:
    a_in, b_in, a_out = (threading.Event() for _ in range(3))

    def first():
        with sa.use_backend("reference"):
            a_in.set()
            b_in.wait()
        a_out.set()

    def second():
        a_in.wait()
        with sa.use_backend("cpu"):
            b_in.set()
            a_out.wait()

    threads = [threading.Thread(target=f) for f in (first, second)]
    q = torch.randn(1, 1, 4, 4)
    before = sa.explain(q, q, q, 2).backend
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = sa.explain(q, q, q, 2).backend
    assert after == before, f"{after!r} is forced"
    return f"“{after}”, as before"


@case("`meta`, `to_empty`, `reset_parameters` of an embedding", "one embedding for all ids")
def maps_after_to_empty() -> str:
    plan = sa.WidthPlan.from_cutoffs(262_144, 64, cutoffs=[2000], widths=[64, 8])
    with torch.device("meta"):
        embedding = sa.nn.VariableWidthEmbedding(plan)
    embedding.to_empty(device="cpu")
    for module in embedding.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(embedding.token_band.long().cpu(), plan.token_band.long())
    distinct = len(torch.unique(embedding(torch.arange(4096)).detach(), dim=0))
    assert distinct == 4096
    return "the maps of the plan, 4,096 embeddings of 4,096 ids"


@case("maps of tokens that are all zeros, loaded into an embedding", "accepted: every token has one row")
def impossible_maps() -> str:
    embedding = sa.nn.VariableWidthEmbedding(sa.WidthPlan.from_cutoffs(60, 16, cutoffs=[10], widths=[16, 4]))
    state = {name: t.clone() for name, t in embedding.state_dict().items()}
    maps = [name for name in state if name.endswith(("token_band", "token_row"))]
    if not maps:
        return "maps are no part of the state: they come from the plan"
    for name in maps:
        state[name] = torch.zeros_like(state[name])
    before = embedding(torch.arange(60))
    sentence = refused(lambda: embedding.load_state_dict(state), "token_")
    off_by(embedding(torch.arange(60)), before, 0)
    return sentence


@case("training through topk_attention_with_residual", "no gradient and no error")
def residual_gradient() -> str:
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64) for _ in range(3))

    def residual(q):
        return sa.topk_attention_with_residual(q, k, v, 3, is_causal=True)

    x = q.clone().requires_grad_()
    try:
        (ours,) = torch.autograd.grad(residual(x).sin().sum(), x)
    except RuntimeError:
        return refused(lambda: residual(x), "topk_attention_with_residual")
    direction, step = torch.randn_like(q), 1e-6
    right = (residual(q + step * direction).sin().sum() - residual(q - step * direction).sin().sum()) / (
        2 * step
    )
    return "a gradient, " + off_by((ours * direction).sum(), right, 1e-6)


@case("a pickled WidthPlan with `weights_only=True`", "refused as unsafe")
def plan_with_weights_only() -> str:
    plan, file = sa.WidthPlan.from_cutoffs(60, 16, cutoffs=[10], widths=[16, 4]), io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert again.widths == plan.widths
    assert torch.equal(again.token_band, plan.token_band)
    return "the same plan"
