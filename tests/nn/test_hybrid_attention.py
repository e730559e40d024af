"""`nn.HybridAttention`: TopKAttention without approximated heads, its parts with them; causal, trainable."""

import copy

import pytest
import torch

import sparse_attn
from sparse_attn.nn import HybridAttention, TopKAttention

B, T, C, H = 2, 21, 24, 4
D = C // H


def make(wing=None, top_k=None, heads=(1, 2), **options) -> HybridAttention:
    torch.manual_seed(1)
    place = {"backend": wing.name, "device": wing.device} if wing else {}
    settings = {"approximated_heads": heads, "max_length": 32, "approximated_top_k": 5, "hidden": 16}
    return HybridAttention(C, H, top_k, **(place | settings | options))


def hidden_of(wing=None, *shape) -> torch.Tensor:
    return torch.randn(*(shape or (B, T, C)), device=wing.device if wing else "cpu")


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "bias": True}, {"num_kv_heads": 2, "share": "kv"}]
)
def test_without_approximated_heads_it_is_topk_attention(wing, top_k, options):
    exact = TopKAttention(C, H, top_k, backend=wing.name, device=wing.device, **options)
    hybrid, hidden = HybridAttention.from_attention(exact, approximated_heads=()), hidden_of(wing)
    assert torch.equal(hybrid(hidden), exact(hidden))
    assert sorted(hybrid.state_dict()) == sorted(exact.state_dict())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("heads", [(1,), (0, 1), (2, 3), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("approximate_output", [True, False])
def test_each_head_is_what_it_should_be(wing, heads, top_k, kv_heads, approximate_output):
    hybrid = make(wing, top_k, heads, num_kv_heads=kv_heads, approximate_output=approximate_output)
    query, key, value = hybrid.split_heads(hybrid.qkv(hidden_of(wing)))
    out = hybrid.attend(query, key, value)
    exact = TopKAttention.attend(hybrid, query, key, value)
    wide_key, wide_value = (x.repeat_interleave(H // kv_heads, dim=1) for x in (key, value))
    indices = hybrid.selector.select(query[:, list(heads)])
    for place, head in enumerate(heads):
        one = [x[:, head : head + 1] for x in (query, wide_key, wide_value)]
        if approximate_output:
            values = wide_value[:, list(heads)]
            want = hybrid.approximator(values, indices)[:, place]
        else:
            want = sparse_attn.gathered_attention(*one, indices[:, place : place + 1])[:, 0]
        torch.testing.assert_close(out[:, head], want, rtol=1e-4, atol=1e-5)
    rest = [head for head in range(H) if head not in heads]
    torch.testing.assert_close(out[:, rest], exact[:, rest], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", ["kv", "all"])
def test_the_rest_share_among_themselves(share):
    hybrid = make(None, 3, (2, 3), num_kv_heads=2, share=share)
    query, key, value = hybrid.split_heads(hybrid.qkv(hidden_of()))
    want = sparse_attn.topk_attention(query[:, :2], key[:, :1], value[:, :1], 3, is_causal=True, share=share)
    torch.testing.assert_close(hybrid.attend(query, key, value)[:, :2], want)


@pytest.mark.parametrize("approximate_output", [True, False])
def test_it_is_causal(wing, approximate_output):
    hybrid, hidden = make(wing, 4, approximate_output=approximate_output), hidden_of(wing)
    changed = hidden.clone()
    changed[:, 12:] += 1.0
    before, after = hybrid(hidden), hybrid(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(B, T, C), (1, 1, C), (3, 2, C), (0, T, C)])
def test_shape(wing, shape):
    assert make(wing, 4)(hidden_of(wing, *shape)).shape == shape


def test_with_all_keys_the_selector_alone_changes_nothing(wing):
    hybrid, hidden = make(wing, None, approximate_output=False, approximated_top_k=T), hidden_of(wing)
    exact = TopKAttention(C, H, None, device=wing.device)
    exact.load_state_dict({k: v for k, v in hybrid.state_dict().items() if "selector" not in k})
    torch.testing.assert_close(hybrid(hidden), exact(hidden), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_but_the_selectors(wing):
    hybrid, hidden = make(wing, 4, bias=True), hidden_of(wing).requires_grad_()
    hybrid(hidden).square().sum().backward()
    for name, parameter in hybrid.named_parameters():
        if name.startswith("selector"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    assert hidden.grad.abs().max() > 0


def test_from_attention_keeps_weights_and_settings():
    exact = TopKAttention(C, H, 6, num_kv_heads=2, bias=True, dropout=0.25, window=2, sinks=1).eval()
    before = copy.deepcopy(exact.state_dict())
    hybrid = HybridAttention.from_attention(exact, approximated_heads=[3, 1], max_length=32)
    settings = ("top_k", "num_kv_heads", "window", "sinks", "share", "backend", "training")
    assert [getattr(hybrid, s) for s in settings] == [getattr(exact, s) for s in settings]
    assert hybrid.dropout.p == 0.25
    assert hybrid.approximated_heads == (1, 3)
    for name, tensor in before.items():
        assert torch.equal(hybrid.state_dict()[name], tensor)
    with torch.no_grad():
        hybrid.qkv.query.weight.zero_()
    assert torch.equal(exact.qkv.query.weight, before["qkv.query.weight"])
    assert HybridAttention.from_attention(exact, approximated_heads=(), top_k=9, dropout=0.0).top_k == 9


def test_state_copy_and_repr():
    hybrid, other = make(), copy.deepcopy(make())
    with torch.no_grad():
        other.approximator.outer.bias.add_(1.0)
    other.load_state_dict(hybrid.state_dict())
    hidden = hidden_of()
    assert torch.equal(other(hidden), hybrid(hidden))
    assert "approximated_heads=(1, 2)" in repr(hybrid)


@pytest.mark.torch_defaults
@pytest.mark.parametrize("approximate_output", [True, False])
def test_compiles_in_one_graph(approximate_output):
    hybrid, hidden = make(None, 4, num_kv_heads=2, approximate_output=approximate_output), hidden_of()
    compiled = torch.compile(hybrid, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), hybrid(hidden))


def test_autocast():
    hybrid, hidden = make(), hidden_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(hybrid(hidden)).all()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"approximated_heads": 2}, TypeError, "approximated_heads must be a sequence of ints, got 2"),
        ({"approximated_heads": "01"}, TypeError, "approximated_heads must be a sequence of ints, got '01'"),
        ({"approximated_heads": [4]}, ValueError, "each of approximated_heads must be at most 3, got 4"),
        ({"approximated_heads": [-1]}, ValueError, "each of approximated_heads must be at least 0, got -1"),
        ({"approximated_heads": [0.5]}, TypeError, "each of approximated_heads must be an int, got 0.5"),
        ({"approximated_heads": [1, 1]}, ValueError, r"must name each head once, got \[1, 1\]"),
        ({"max_length": None}, ValueError, "max_length must be given where heads are approximated, got None"),
        ({"approximated_top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"approximate_output": 1}, TypeError, "approximate_output must be True or False, got 1"),
        ({"num_kv_heads": 2, "share": "kv"}, ValueError, r"whole groups .* \(2 heads each\), got \[1, 2\]"),
    ],
)
def test_bad_arguments(options, error, sentence):
    settings = {"top_k": 4, "heads": options.pop("approximated_heads", (1, 2))}
    with pytest.raises(error, match=sentence):
        make(None, **settings, **options)


def test_bad_input():
    with pytest.raises(ValueError, match="at most max_length = 32, got 33"):
        make()(torch.zeros(1, 33, C))
    with pytest.raises(ValueError, match=r"hidden must have shape \[B, T, 24\]"):
        make()(torch.zeros(1, 3, C + 1))
    with pytest.raises(TypeError, match=r"attention must be a TopKAttention, got Linear"):
        HybridAttention.from_attention(torch.nn.Linear(2, 2), approximated_heads=())
