"""`train_indexers`: what it learns, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from sparse_attn.demo.model import GPT
from sparse_attn.distillation import observe, train_indexers


def teacher():
    torch.manual_seed(0)
    return GPT(vocabulary=50, context=32, top_k=None)


def stream(count=1):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (2, 32), generator=generator) for _ in range(count)]


@pytest.mark.torch_defaults
@pytest.mark.parametrize(("share", "groups"), [("all", 1), ("kv", 4)])
def test_it_learns_the_teacher(share, groups):
    model = teacher()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def loss(indexers):
        layers = observe(model, stream()[0]).layers
        return sum(float(indexers[n].loss(h.hidden, h.query, h.key)) for n, h in layers.items())

    losses = []
    for steps in (1, 60):
        torch.manual_seed(2)
        indexers = train_indexers(model, stream(1) * steps, head_dim=8, share=share)
        assert {indexer.groups for indexer in indexers.values()} == {groups}
        losses.append(loss(indexers))
    assert losses[1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_errors():
    with pytest.raises(ValueError, match="share must be 'all' or 'kv' for indexers, got 'none'"):
        train_indexers(teacher(), stream(), share="none")
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        train_indexers(teacher(), stream(), num_heads=0)
    with pytest.raises(ValueError, match="stream must have at least one batch, got none"):
        train_indexers(teacher(), [])
    with pytest.raises(TypeError, match=r"stream must hold token ids, int64 \[B, T\], got a float32 tensor"):
        train_indexers(teacher(), [torch.randn(2, 8)])
