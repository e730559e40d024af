"""The demo's Muon is PyTorch's but for the precision of its matrix steps."""

import pytest
import torch

from sparse_attn.demo.optimizers import Muon, orthogonalized

SHAPES = ((24, 8), (8, 8), (8, 32))


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.0}, {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}],
)
def test_the_update_is_that_of_pytorch_but_for_rounding(options):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    steps = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    moved = []
    for optimizer_class in (Muon, torch.optim.Muon):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = optimizer_class(parameters, lr=0.03, **options)
        for gradients in steps:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        moved.append([(p.detach() - tensor) for p, tensor in zip(parameters, start, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    result = orthogonalized(torch.randn(shape), (3.4445, -4.7750, 2.0315), 5)
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
