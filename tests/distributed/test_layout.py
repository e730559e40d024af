"""Layouts and the cost model, in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from sparse_attn import WidthPlan
from sparse_attn.analysis import Shape
from sparse_attn.distributed import Layout, context_costs, split_plan


@pytest.mark.parametrize("length", [0, 1, 7, 16, 33])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_position_is_on_one_rank(length, ranks):
    for layout in (Layout.even(length, ranks), Layout.zigzag(length, ranks)):
        assert (layout.ranks, layout.length) == (ranks, length)
        whole = torch.arange(3 * length).view(3, length)
        parts = [layout.local(whole, rank, 1) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            positions = layout.positions(rank)
            assert torch.equal(part[0], positions)
            assert len(positions) == layout.lengths[rank]
            assert torch.equal(positions, positions.sort().values)
        assert torch.equal(layout.whole(parts, 1), whole)


def test_even_is_as_torch_cuts():
    for length in range(12):
        for ranks in (1, 2, 3, 5):
            chunks = [len(c) for c in torch.arange(length).chunk(ranks)] if length else []
            assert Layout.even(length, ranks).lengths == chunks + [0] * (ranks - len(chunks))


def test_zigzag_balances_causal_work():
    layout = Layout.zigzag(64, 4)
    assert len({int(layout.positions(rank).sum()) for rank in range(4)}) == 1


@pytest.mark.parametrize(
    ("ranges", "sentence"),
    [
        ((((0, 2),), ((3, 4),)), "position 2 is missing"),
        ((((0, 3),), ((2, 4),)), "position 2 is there twice"),
        ((((2, 4), (0, 2)),), "the ranges of a rank must ascend"),
    ],
)
def test_bad_layouts(ranges, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layout(ranges)
    with pytest.raises(ValueError, match="each of lengths must be at least 0, got -1"):
        Layout.contiguous([3, -1])


def test_costs():
    """What the page says of them: the ring's bytes, and which way is for what."""
    shape = Shape(131072, 32, 128, 8, itemsize=2)
    prefill, decoding = context_costs(shape, 8, 2048), context_costs(shape, 8, 2048, queries=1)
    ring = 7 * (131072 // 8) * 8 * 2 * 128 * 2
    assert prefill["ring"].forward_bytes == prefill["gather"].forward_bytes == ring
    assert prefill["ring"].backward_bytes == 2 * prefill["gather"].backward_bytes
    assert prefill["gather"].forward_bytes < prefill["merge"].forward_bytes
    assert decoding["merge"].forward_bytes < decoding["gather"].forward_bytes / 10


def test_split_plans_hold_everything_once():
    plan = WidthPlan.from_cutoffs(1000, 16, cutoffs=[3, 100], widths=[16, 8, 2])
    projections = 16 * (8 + 2)
    for ranks in (1, 2, 3, 8):
        held = split_plan(plan, ranks)
        assert sum(held) - (ranks - 1) * projections == plan.num_parameters()
