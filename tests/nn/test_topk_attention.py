"""`nn.TopKAttention`: shapes, equivalence with dense attention, gradients, arguments, state, torch.compile."""

import copy

import pytest
import torch

import sparse_attn
from sparse_attn.nn import TopKAttention

B, T, C, H = 2, 33, 24, 4


def make(wing, top_k, **options) -> TopKAttention:
    torch.manual_seed(1)
    return TopKAttention(
        C, H, top_k, backend=None if top_k is None else wing.name, device=wing.device, **options
    )


def hidden_of(wing, *shape) -> torch.Tensor:
    return torch.randn(*(shape or (B, T, C)), device=wing.device)


@pytest.mark.parametrize("shape", [(B, T, C), (1, 1, C), (3, 2, C), (0, T, C)])
def test_shape(wing, shape):
    assert make(wing, 5)(hidden_of(wing, *shape)).shape == shape


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_with_all_keys_it_is_dense_attention(wing, kv_heads, bias):
    """Output and every gradient, of the parameters and of the input."""
    results = []
    hidden = hidden_of(wing)
    for top_k in (None, T, 10 * T):
        attention, given = (
            make(wing, top_k, num_kv_heads=kv_heads, bias=bias),
            hidden.clone().requires_grad_(),
        )
        out = attention(given)
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
        results.append([out, given.grad, *(p.grad for p in attention.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({"num_kv_heads": 2}, {}),
        ({"num_kv_heads": 2, "share": "kv"}, {"share": "kv"}),
        ({"share": "all"}, {"share": "all"}),
        ({"window": 2, "sinks": 1}, {"window": 2, "sinks": 1}),
    ],
)
def test_it_is_the_op_between_two_projections(wing, options, call):
    """The layout of the fused projection: query heads, key heads, value heads."""
    attention, hidden = make(wing, 5, **options), hidden_of(wing)
    kv_heads = options.get("num_kv_heads", H)
    widths = [H * C // H, kv_heads * C // H, kv_heads * C // H]
    query, key, value = (
        (hidden @ weight.T).view(B, T, -1, C // H).transpose(1, 2)
        for weight in attention.qkv.weight.split(widths)
    )
    out = sparse_attn.topk_attention(query, key, value, 5, is_causal=True, backend=wing.name, **call)
    want = attention.out(out.transpose(1, 2).reshape(B, T, C))
    torch.testing.assert_close(attention(hidden), want, rtol=1e-4, atol=1e-5)


def test_it_is_causal(wing):
    attention, hidden = make(wing, 5), hidden_of(wing)
    changed = hidden.clone()
    changed[:, 20:] += 1.0
    before, after = attention(hidden), attention(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


def test_few_keys_differ_from_all_keys(wing):
    hidden = hidden_of(wing)
    few, dense = make(wing, 2)(hidden), make(wing, None)(hidden)
    torch.testing.assert_close(
        few[:, :2], dense[:, :2], rtol=1e-4, atol=1e-5
    )  # rows that see two keys at most
    assert (few[:, 2:] - dense[:, 2:]).abs().max() > 1e-3


def test_gradients_reach_every_parameter(wing):
    attention, hidden = make(wing, 5, num_kv_heads=2, bias=True), hidden_of(wing).requires_grad_()
    attention(hidden).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert hidden.grad.abs().max() > 0


def test_top_k_may_change_between_calls(wing):
    attention, hidden = make(wing, 5), hidden_of(wing)
    sparse = attention(hidden)
    attention.top_k = None
    torch.testing.assert_close(attention(hidden), make(wing, None)(hidden))
    attention.top_k = 5
    assert torch.equal(attention(hidden), sparse)


def test_state_dict_fits_every_top_k(wing):
    """top_k is no state: a dense model's parameters load into a top-k model."""
    dense, hidden = make(wing, None), hidden_of(wing)
    sparse = TopKAttention(C, H, T, device=wing.device)
    names = ["out.weight", "qkv.key.weight", "qkv.query.weight", "qkv.value.weight"]
    assert sorted(dense.state_dict()) == names
    sparse.load_state_dict(dense.state_dict())
    torch.testing.assert_close(sparse(hidden), dense(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_state_with_one_fused_projection_loads(wing, kv_heads):
    """As modules had it before their projections were separate: alone, and inside a model."""
    options = {"num_kv_heads": kv_heads, "bias": True, "device": wing.device}
    module, hidden = TopKAttention(C, H, 5, **options), hidden_of(wing)
    state = {f"out.{n}": p for n, p in module.out.state_dict().items()}
    state |= {"qkv.weight": module.qkv.weight, "qkv.bias": module.qkv.bias}
    kept = dict(state)
    for other, prefix in ((TopKAttention(C, H, 5, **options), ""), (TopKAttention(C, H, 5, **options), "0.")):
        model = torch.nn.Sequential(other) if prefix else other
        assert not any(model.load_state_dict({prefix + n: t for n, t in state.items()}))
        assert torch.equal(other(hidden), module(hidden))
    assert state == kept  # the caller's own is as it was
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"size mismatch for qkv.weight: the module has .* rows, the state"
    ):
        other.load_state_dict({**state, "qkv.weight": module.qkv.weight[1:]})
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_new_modules_start_from_the_numbers_of_a_fused_projection():
    torch.manual_seed(3)
    fused, out = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
    torch.manual_seed(3)
    module = TopKAttention(C, H, 5, bias=True)
    assert torch.equal(module.qkv.weight, fused.weight)
    assert torch.equal(module.qkv.bias, fused.bias)
    assert torch.equal(module.out.weight, out.weight)


def test_deepcopy_and_repr(wing):
    attention = copy.deepcopy(make(wing, 5, window=2))
    for part in (
        "embed_dim=24",
        "num_heads=4",
        "num_kv_heads=4",
        "top_k=5",
        "window=2",
        "sinks=0",
        "share='none'",
    ):
        assert part in repr(attention)


def test_dropout_works_in_training_only(wing):
    attention, hidden = make(wing, 5, dropout=0.5), hidden_of(wing)
    assert (attention(hidden) == 0).float().mean() > 0.3
    attention.eval()
    torch.testing.assert_close(attention(hidden), make(wing, 5)(hidden))


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
def test_half_types_and_autocast(wing, dtype):
    attention, hidden = make(wing, 5), hidden_of(wing)
    with torch.autocast(wing.device, dtype):
        mixed = attention(hidden)
    half = make(wing, 5, dtype=dtype)(hidden.to(dtype))
    assert mixed.dtype == half.dtype == dtype
    assert torch.isfinite(mixed).all()
    assert torch.isfinite(half).all()


@pytest.mark.torch_defaults
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "window": 2, "sinks": 1, "share": "kv"}])
def test_compiles_in_one_graph(wing, options):
    attention, hidden = make(wing, 5, **options), hidden_of(wing)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), attention(hidden))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(hidden).sum(), tuple(attention.parameters())),
        torch.autograd.grad(attention(hidden).sum(), tuple(attention.parameters())),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((24, 5, 4), ValueError, "embed_dim must be a multiple of num_heads, got 24 and 5"),
        ((0, 4, 4), ValueError, "embed_dim must be at least 1, got 0"),
        ((24, 0, 4), ValueError, "num_heads must be at least 1, got 0"),
        ((24.0, 4, 4), TypeError, "embed_dim must be an int, got 24.0"),
        ((24, 4, 0), ValueError, "top_k must be at least 1, got 0"),
        ((24, 4, "8"), TypeError, "top_k must be an int, got '8'"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        TopKAttention(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 8}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 8"),
        ({"window": 3, "sinks": 3}, ValueError, "at least window \\+ sinks, got top_k=5, window=3, sinks=3"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"share": "some"}, ValueError, "share must be one of 'none', 'kv', 'all', got 'some'"),
        ({"dropout": 1.5}, ValueError, "dropout probability"),
    ],
)
def test_bad_options(options, error, sentence):
    with pytest.raises(error, match=sentence):
        TopKAttention(C, H, 5, **options)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'abacus'"):
        TopKAttention(C, H, 5, backend="abacus")(torch.zeros(B, T, C))


def test_window_without_top_k():
    with pytest.raises(
        ValueError, match="window and sinks need a top_k, got window=2, sinks=0 with top_k=None"
    ):
        TopKAttention(C, H, None, window=2)


@pytest.mark.parametrize(
    "hidden", [torch.zeros(T, C), torch.zeros(B, T, C + 1), torch.zeros(B, H, T, C), None]
)
def test_bad_input(hidden):
    with pytest.raises((ValueError, TypeError), match=r"hidden must have shape \[B, T, 24\], got "):
        TopKAttention(C, H, 5)(hidden)


@pytest.mark.parametrize(
    "options", [{"softcap": 1.5}, {"sink_logits": True}, {"softcap": 1.5, "sink_logits": True}]
)
def test_a_soft_cap_and_learned_sinks(wing, options):
    """With all keys the formula; the sinks are a parameter, zeros at first, with a gradient, in the state."""
    hidden, results = hidden_of(wing), []
    for top_k in (None, T):
        attention = make(wing, top_k, num_kv_heads=2, **options)
        if attention.sink_logits is not None:
            assert torch.equal(attention.sink_logits, torch.zeros(H, device=wing.device))
            torch.nn.init.normal_(attention.sink_logits, std=2.0)
        out = attention(hidden)
        out.sum().backward()
        results.append([out, *(p.grad for p in attention.parameters())])
        assert all(p.grad.any() for p in attention.parameters())
    torch.testing.assert_close(*results)
    query, key, value = attention.split_heads(attention.qkv(hidden))
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = query @ key.mT / 6**0.5
    if attention.softcap:
        scores = 1.5 * (scores / 1.5).tanh()
    weights = scores.masked_fill(torch.ones(T, T, device=wing.device).triu(1).bool(), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if attention.sink_logits is not None:
        total = total + attention.sink_logits.exp().view(-1, 1, 1)
    want = attention.out((weights / total @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(results[1][0], want, rtol=1e-4, atol=1e-5)
    assert ("sink_logits" in attention.state_dict()) == ("sink_logits" in options)


def test_what_has_no_cap_refuses_it():
    from sparse_attn.distillation import observe

    attention = TopKAttention(C, H, 4, softcap=2.0)
    with pytest.raises(ValueError, match="must have a plain softmax, got one with softcap"):
        sparse_attn.nn.HybridAttention.from_attention(attention, approximated_heads=[0], max_length=8)
    model = torch.nn.Sequential(TopKAttention(C, H, 4, sink_logits=True))
    with pytest.raises(ValueError, match="must have a plain softmax, got 0 with softcap or sink_logits"):
        observe(model, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="softcap must be positive"):
        TopKAttention(C, H, 4, softcap=0.0)
