"""`nn.HeadApproximator`: its formula, empty slots, GQA, gradients, learning, arguments."""

import pytest
import torch

import sparse_attn
from sparse_attn.nn import HeadApproximator

B, H, T, D, K = 2, 4, 19, 6, 3


def make(**options) -> HeadApproximator:
    torch.manual_seed(1)
    return HeadApproximator(**({"head_dim": D, "top_k": K, "num_heads": H, "hidden": 16} | options))


def values(heads: int = H, length: int = T, **options) -> torch.Tensor:
    return torch.randn(B, heads, length, D, **options)


def chosen(heads: int = H, length: int = T, top_k: int = K) -> torch.Tensor:
    query = torch.randn(B, heads, length, D)
    return sparse_attn.topk_select(query, query, top_k, is_causal=True)


def by_hand(approximator: HeadApproximator, value, indices):
    """The formula, row by row."""
    heads, length = approximator.num_heads, value.shape[2]
    out = value.new_zeros(*value.shape[:1], heads, indices.shape[2], D)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        row = sorted(j for j in indices[b, h // (heads // indices.shape[1]), i].tolist() if 0 <= j < length)[
            ::-1
        ]
        row += [-1] * (approximator.top_k - len(row))
        head = value[b, h // (heads // value.shape[1])]
        x = torch.cat([head[j] if j >= 0 else torch.zeros(D, dtype=value.dtype) for j in row])
        x = torch.nn.functional.gelu(x @ approximator.inner.weight[h] + approximator.inner.bias[h])
        out[b, h, i] = x @ approximator.outer.weight[h] + approximator.outer.bias[h]
    return out


@pytest.mark.parametrize(("kv_heads", "groups"), [(H, H), (H, 1), (2, H), (2, 2), (1, 1)])
def test_it_follows_the_formula(kv_heads, groups):
    approximator = make().double()
    value, indices = values(kv_heads, dtype=torch.float64), chosen(groups)
    torch.testing.assert_close(approximator(value, indices), by_hand(approximator, value, indices))


@pytest.mark.parametrize("slots", [0, 1, K])
@pytest.mark.parametrize("length", [0, 1, 2, T])
def test_fewer_slots_and_short_sequences(slots, length):
    approximator = make().double()
    value, indices = values(length=length, dtype=torch.float64), chosen(length=length)[..., :slots]
    torch.testing.assert_close(approximator(value, indices), by_hand(approximator, value, indices))


def test_empty_slots_are_never_read():
    """−1 and indices past the end are zeros, and a NaN that nobody chose leaks nowhere."""
    approximator, value = make(), values()
    value[:, :, [0, T - 1]] = torch.nan
    indices = torch.randint(1, T - 1, (B, H, T, K), dtype=torch.int32)
    indices[..., 1] = torch.tensor([-1, T, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(T)[:T]
    torch.testing.assert_close(approximator(value, indices), by_hand(approximator, value, indices))


def test_the_order_of_the_indices_does_not_matter():
    approximator, value, indices = make(), values(), chosen()
    shuffled = indices[..., [2, 0, 1]]
    assert torch.equal(approximator(value, indices), approximator(value, shuffled))


def test_blocks_of_queries_change_nothing(monkeypatch):
    approximator, value, indices = make(), values(), chosen()
    whole = approximator(value, indices)
    monkeypatch.setattr("sparse_attn.wings.reference.chunks._ELEMENTS", 5 * B * H * K * D)
    torch.testing.assert_close(approximator(value, indices), whole)


def test_it_is_causal():
    approximator, value, indices = make(), values(), chosen()
    changed = value.clone()
    changed[:, :, 10:] += 1.0
    before, after = approximator(value, indices), approximator(changed, indices)
    torch.testing.assert_close(before[:, :, :10], after[:, :, :10])
    assert (before - after).abs().max() > 1e-2


def test_gradients():
    approximator, indices = make().double(), chosen()
    value = values(2, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(by_hand(approximator, value, indices).square().sum(), value)[0]
    approximator(value, indices).square().sum().backward()
    torch.testing.assert_close(value.grad, want)
    for name, parameter in approximator.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


@pytest.mark.torch_defaults
def test_it_learns_a_weighted_sum_of_its_slots():
    approximator, indices = make(hidden=64), chosen()
    weights = torch.tensor([0.6, 0.3, 0.1])
    optimizer = torch.optim.Adam(approximator.parameters(), lr=3e-3)
    losses = []
    for _ in range(400):
        value = values()
        rows = torch.nn.functional.pad(value, (0, 0, 0, 1))  # index −1 is the last row, zeros
        newest_first = indices.sort(-1, descending=True).values.long()
        slots = torch.stack([rows[b, h][newest_first[b, h]] for b in range(B) for h in range(H)])
        want = (slots.unflatten(0, (B, H)) * weights[:, None]).sum(-2)
        loss = (approximator(value, indices) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.torch_defaults
def test_compiles_in_one_graph():
    approximator, value, indices = make(), values(2), chosen(1)
    compiled = torch.compile(approximator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, indices), approximator(value, indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    value, indices = values(), chosen()
    with torch.autocast("cpu", dtype):
        mixed = make()(value, indices)
    half = make(dtype=dtype)(value.to(dtype), indices)
    assert mixed.dtype == half.dtype == dtype
    torch.testing.assert_close(mixed.float(), make()(value, indices), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"head_dim": "6"}, TypeError, "head_dim must be an int, got '6'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"num_heads": -1}, ValueError, "num_heads must be at least 1, got -1"),
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options, error, sentence):
    with pytest.raises(error, match=sentence):
        make(**options)


@pytest.mark.parametrize(
    ("value", "indices", "error", "sentence"),
    [
        (None, chosen(), TypeError, r"value must be a tensor of shape \[B, Hkv, Tk, 6\], got None"),
        (torch.zeros(B, H, T, D + 1), chosen(), ValueError, r"value must have shape \[B, Hkv, Tk, 6\], got .*19, 7"),
        (values(3), chosen(), ValueError, "the heads of value must divide num_heads = 4, got .*2, 3, 19, 6"),
        (values(), None, ValueError, r"indices must have shape \[B, G, Tq, K\] or .* got None"),
        (values(), chosen().float(), TypeError, "indices must be int32"),
        (values(), chosen(3), ValueError, "indices must have shape .* with G one of 1, Hkv, Hq"),
        (values(), chosen(top_k=4), ValueError, "indices must have at most top_k = 3 slots, got .*19, 4"),
        (values().double(), chosen(), TypeError, "dtype torch.float32, got a float64 tensor"),
    ],
)  # fmt: skip
def test_bad_input(value, indices, error, sentence):
    with pytest.raises(error, match=sentence):
        make()(value, indices)
