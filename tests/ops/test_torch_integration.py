"""The ops inside PyTorch: opcheck, torch.compile, autocast, meta and fake tensors, checkpointing."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo.testing
from helpers.inputs import index_rows, mask, normal, qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sparse_attn
from sparse_attn.rule import PackedRule


def overload(op: str, wing):
    return getattr(getattr(torch.ops.sparse_attn, op), wing.name)


def op_arguments(wing, dtype, op: str, variant: str):
    """The arguments of one overload as its schema has them, on the wing's device."""
    heads, kv_heads = 4, 2
    query, key, value = (t.to(wing.device) for t in qkv(2, heads, kv_heads, 6, 9, 8, 5, dtype=dtype))
    groups = {"plain": heads, "options": kv_heads, "shared": 1}[variant]
    if variant == "options":
        query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    indices = index_rows((2, groups, 6, 4), 9).to(wing.device)
    rule = PackedRule(None, None, False, 0, 0, 0, groups, 0.3)
    if variant == "options":
        seen = mask(2, groups, 6, 9).to(wing.device)
        rule = PackedRule(seen, torch.tensor([9, 7], device=wing.device), True, 3, 2, 1, groups, 0.3)
    if op == "gathered_attention_backward":
        out, lse = overload("gathered_attention", wing)(query, key, value, indices, 0.3)
        grad_lse = torch.zeros_like(lse) if variant == "options" else None
        return [torch.ones_like(out), grad_lse, query, key, value, indices, out, lse, 0.3, False]
    inputs = [t.requires_grad_() for t in (query, key, value)]
    return {
        "topk_select": [query.detach(), key.detach(), 4, *rule.parts(), False, None, 1, 1],
        "gathered_attention": [*inputs, indices, 0.3],
        "topk_attention": [*inputs, 4, *rule.parts()],
    }[op]


@pytest.mark.parametrize("variant", ["plain", "options", "shared"])
@pytest.mark.parametrize(
    "op", ["topk_select", "gathered_attention", "gathered_attention_backward", "topk_attention"]
)
def test_opcheck(wing, op, variant):
    dtype = torch.bfloat16 if variant == "shared" else torch.float32
    torch.library.opcheck(overload(op, wing), op_arguments(wing, dtype, op, variant))


@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 5, 7, 8, 6), (2, 4, 2, 0, 7, 8, 6), (2, 4, 2, 5, 0, 8, 6)], ids=str
)
def test_opcheck_of_nothing(wing, shape):
    inputs = [t.to(wing.device).requires_grad_() for t in qkv(*shape)]
    selection = [4, *PackedRule(None, None, False, 0, 0, 0, 2, 0.3).parts()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(overload("topk_attention", wing), [*inputs, *selection], test_utils=tests)


@pytest.mark.parametrize("op", ["topk_select", "gathered_attention", "topk_attention"])
def test_a_direct_call_with_tensors_of_two_devices(wing, op):
    """torch would give such a call results that nobody has written."""
    arguments = op_arguments(wing, torch.float32, op, "plain")
    with pytest.raises(RuntimeError, match=r"takes tensors of one device, got some on .* and meta"):
        overload(op, wing)(arguments[0], arguments[1].to("meta"), *arguments[2:])


def test_a_direct_call_without_heads(wing):
    """What Python refuses a direct call must survive; nothing comes of it."""
    if wing.name != "cpu":
        pytest.skip("of the CPU's host code")
    query, *others = op_arguments(wing, torch.float32, "topk_select", "options")
    with pytest.raises(RuntimeError, match="must agree"):
        overload("topk_select", wing)(query[:, :0], *others)


def attention_and_gradients(function, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [
        out,
        *torch.autograd.grad(out, leaves, normal(*out.shape, dtype=out.dtype, seed=3).to(out.device)),
    ]


def compiled_functions(wing):
    name = wing.name
    seen = mask(11, 11, density=0.9).to(wing.device)

    def plain(query, key, value):
        return sparse_attn.topk_attention(query, key, value, 4, is_causal=True, backend=name)

    def all_options(query, key, value):
        out, lse, indices = sparse_attn.topk_attention(
            query, key, value, 5, is_causal=True, attn_mask=seen, window=2, sinks=1, share="kv", scale=0.2,
            return_lse=True, return_indices=True, backend=name,
        )  # fmt: skip
        return out * lse.unsqueeze(-1).nan_to_num(0, 0, 0) + indices.sum()

    def staged(query, key, value):
        indices = sparse_attn.topk_select(query, key, 4, is_causal=True, backend=name)
        return sparse_attn.gathered_attention(query * 2, key, value, indices, backend=name).relu()

    def in_context(query, key, value):
        with sparse_attn.use_backend(name):
            return sparse_attn.topk_attention(query, key, value, 4, is_causal=True)

    return {"plain": plain, "all_options": all_options, "staged": staged, "in_context": in_context}


@pytest.mark.parametrize("function", ["plain", "all_options", "staged", "in_context"])
def test_compile_is_one_graph(wing, function):
    """fullgraph=True, forward and backward, the same results as without."""
    torch._dynamo.reset()
    eager = compiled_functions(wing)[function]
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    inputs = [t.to(wing.device) for t in qkv(2, 4, 2, 11, 11, 8)]
    ours, want = attention_and_gradients(compiled, *inputs), attention_and_gradients(eager, *inputs)
    for mine, true in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, true)


def test_compile_with_dynamic_shapes(wing):
    """New batch sizes and lengths need no new graph, also where the budget passes the number of keys."""
    torch._dynamo.reset()

    def eager(query, key, value):
        return sparse_attn.topk_attention(query, key, value, 6, is_causal=True, backend=wing.name)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    for number, (batch, length) in enumerate([(5, 11), (3, 16), (7, 40), (6, 5)]):
        inputs = [t.to(wing.device) for t in qkv(batch, 4, 2, length, length, 8, seed=number)]
        ours, want = attention_and_gradients(compiled, *inputs), attention_and_gradients(eager, *inputs)
        for mine, true in zip(ours, want, strict=True):
            torch.testing.assert_close(mine, true)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


def test_compile_with_numbers_that_change(wing):
    """A budget and an offset that are arguments, and an offset made of sizes (a KV cache): no new graph for each."""
    torch._dynamo.reset()

    def eager(query, key, value, top_k, offset):
        out = sparse_attn.topk_attention(
            query, key, value, top_k, is_causal=True, causal_offset=offset, backend=wing.name
        )
        last = key.shape[2] - query.shape[2]
        options = {"is_causal": True, "causal_offset": last, "window": 2, "backend": wing.name}
        return out + sparse_attn.topk_attention(query, key, value, top_k, **options)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    for top_k, offset, queries, keys in [(4, 7, 5, 9), (4, 3, 6, 11), (9, -2, 7, 8), (40, 5, 3, 20)]:
        inputs = [t.to(wing.device) for t in qkv(3, 4, 2, queries, keys, 8)]
        torch.testing.assert_close(compiled(*inputs, top_k, offset), eager(*inputs, top_k, offset))
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(wing):
    torch._dynamo.reset()
    eager = compiled_functions(wing)["staged"]
    compiled = torch.compile(eager, fullgraph=True)
    inputs = [t.to(wing.device) for t in qkv(2, 4, 2, 11, 11, 8)]
    ours, want = attention_and_gradients(compiled, *inputs), attention_and_gradients(eager, *inputs)
    for mine, true in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("dtype_of_context", [torch.bfloat16, torch.float16])
def test_autocast(wing, dtype_of_context):
    """Under autocast the ops run in its dtype, as SDPA does; gradients come back in the inputs' dtype."""
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 9, 9, 8)]
    with torch.autocast(wing.device, dtype=dtype_of_context):
        out, lse, indices = wing.topk_attention(*inputs, 4, return_lse=True, return_indices=True)
        staged = wing.gathered_attention(*inputs, indices)
        selected = wing.topk_select(*inputs[:2], 4)
    halves = [t.detach().to(dtype_of_context) for t in inputs]
    assert out.dtype == staged.dtype == dtype_of_context
    assert lse.dtype == torch.float32
    assert torch.equal(out, wing.topk_attention(*halves, 4))
    assert torch.equal(selected, wing.topk_select(*halves[:2], 4))
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    with torch.autocast(wing.device, enabled=False):
        assert wing.topk_attention(*inputs, 4).dtype == torch.float32


def test_autocast_does_not_reach_the_kernels(wing):
    """Float64 stays as it is under autocast, and the matrix products inside an op keep float32, backward too."""
    query, key, value = (t.requires_grad_() for t in qkv(2, 4, 2, 64, 64, 32, dtype=torch.bfloat16))
    out = wing.topk_attention(query, key, value, 9, share="kv", return_lse=True, return_indices=True)
    want = [*out, *torch.autograd.grad(out[0].sum(), (query, key, value))]
    with torch.autocast(wing.device, dtype=torch.bfloat16):
        out = wing.topk_attention(query, key, value, 9, share="kv", return_lse=True, return_indices=True)
        ours = [*out, *torch.autograd.grad(out[0].sum(), (query, key, value))]
    assert all(torch.equal(mine, true) for mine, true in zip(ours, want, strict=True))
    if torch.float64 in wing.dtypes:
        doubles = [t.detach().double() for t in (query, key, value)]
        want = wing.topk_attention(*doubles, 9)
        with torch.autocast(wing.device, dtype=torch.bfloat16):
            assert torch.equal(wing.topk_attention(*doubles, 9), want)


def test_compile_under_autocast(wing):
    torch._dynamo.reset()

    def eager(query, key, value):
        with torch.autocast(wing.device, dtype=torch.bfloat16):
            return sparse_attn.topk_attention(query, key, value, 4, is_causal=True, backend=wing.name)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    inputs = [t.to(wing.device) for t in qkv(2, 4, 2, 11, 11, 8)]
    for mine, true in zip(
        attention_and_gradients(compiled, *inputs), attention_and_gradients(eager, *inputs), strict=True
    ):
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true)


def test_autocast_joins_mixed_dtypes(wing):
    """A float32 query beside bfloat16 keys is an error outside autocast, and what autocast is for inside it."""
    query, key, value = qkv(1, 4, 2, 9, 9, 8)
    with torch.autocast(wing.device, dtype=torch.bfloat16):
        assert wing.topk_attention(query, key.bfloat16(), value, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_without_values(wing, dtype, mode, share):
    """On the meta device and with fake tensors: shapes and dtypes, forward and backward, and nothing is read."""
    if mode == "meta" and wing.name != "reference":
        with pytest.raises(ValueError, match="meta"):
            sparse_attn.topk_attention(*(t.to("meta") for t in qkv(1, 2, 1, 3, 3, 4)), 2, backend=wing.name)
        return
    device = "meta" if mode == "meta" else wing.device
    real = qkv(2, 4, 2, 6, 9, 8, 5, dtype=dtype)
    options = {"attn_mask": torch.ones(2, 4, 6, 9, dtype=torch.bool), "key_lengths": torch.tensor([9, 7])}
    want = wing.topk_attention(*real, 4, share=share, return_lse=True, return_indices=True, **options)
    with FakeTensorMode(allow_non_fake_inputs=False) if mode == "fake" else torch.device("meta"):
        inputs = [torch.empty(t.shape, dtype=dtype, device=device, requires_grad=True) for t in real]
        options = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in options.items()}
        results = sparse_attn.topk_attention(
            *inputs, 4, share=share, return_lse=True, return_indices=True, backend=wing.name, **options
        )
        results[0].sum().backward()
    for ours, true in zip(results, want, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (true.shape, true.dtype, true.stride())
    assert all(t.grad.shape == t.shape for t in inputs)


def test_activation_checkpointing(wing):
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 9, 9, 8)]
    plain = wing.topk_attention(*inputs, 4, is_causal=True)
    kept = checkpoint(lambda *qkv: wing.topk_attention(*qkv, 4, is_causal=True), *inputs, use_reentrant=False)
    for ours, want in zip(
        torch.autograd.grad(kept.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
    ):
        assert torch.equal(ours, want)


def test_saved_tensors_that_were_changed_are_noticed(wing):
    """Writing to an input between forward and backward is PyTorch's usual error, not a wrong gradient."""
    query, key, value = qkv(1, 2, 2, 5, 5, 4)
    leaf = query.clone().requires_grad_()
    used = leaf * 1
    out = wing.topk_attention(used, key, value, 2)
    used.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
