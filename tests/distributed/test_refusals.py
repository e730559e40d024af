"""Wrong arguments over ranks: one sentence each, on the rank where it is wrong, before anything is sent."""

from __future__ import annotations

import pytest
import torch

import sparse_attn

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

from sparse_attn import distributed  # noqa: E402
from sparse_attn.distributed import Layout  # noqa: E402
from sparse_attn.selection import Rule  # noqa: E402

T = 12
QUERY, KEY, VALUE = torch.ones(1, 4, T, 8), torch.ones(1, 2, T, 8), torch.ones(1, 2, T, 6)
MASK = torch.ones(T, T, dtype=torch.bool)
INDICES = torch.zeros(1, 4, T, 3, dtype=torch.int32)
PLAN = sparse_attn.WidthPlan.from_cutoffs(100, 8, cutoffs=[10], widths=[8, 2])
EMBEDDING = sparse_attn.nn.VariableWidthEmbedding(PLAN)
IDS = torch.arange(5)
BANDS = {
    "tables": list(EMBEDDING.tables),
    "projections": EMBEDDING.projection_list(),
    "token_band": EMBEDDING.token_band,
    "token_row": EMBEDDING.token_row,
}


@pytest.fixture(autouse=True)
def world():
    """One process is a world of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def attention(**wrong):
    good = {"query": QUERY, "key": KEY, "value": VALUE, "top_k": 3, "layout": Layout.even(T, 1)}
    return distributed.context_parallel_attention(**{**good, "is_causal": True, **wrong})


def to_indices(**wrong):
    good = {"query": QUERY, "key": KEY, "value": VALUE, "indices": INDICES, "layout": Layout.even(T, 1)}
    return distributed.context_parallel_gathered_attention(**{**good, **wrong})


def inside(layout=Layout.even(T, 1), **wrong):  # noqa: B008
    with distributed.context_parallel(layout, **wrong):
        return sparse_attn.topk_attention(QUERY, KEY, VALUE, 3, is_causal=True)


def embedding(**wrong):
    return distributed.vocab_parallel_embedding(**{"ids": IDS, **BANDS, **wrong})


def loss(**wrong):
    return distributed.vocab_parallel_cross_entropy(
        **{"hidden": torch.ones(5, 8), "targets": IDS, **BANDS, **wrong}
    )


def across(top_k=3, rule=Rule(True, share="all"), **options):  # noqa: B008
    return distributed.AcrossRanks(**options).select(QUERY, KEY, top_k, rule)


def split(model=None, mesh=None, **options):
    model = sparse_attn.nn.TopKAttention(16, 4, 3) if model is None else model
    return distributed.tensor_parallel(
        model, init_device_mesh("cpu", (1,)) if mesh is None else mesh, **options
    )


def layout(ranges):
    return Layout(ranges)


even, zigzag, contiguous = Layout.even, Layout.zigzag, Layout.contiguous


def local(whole=torch.zeros(T), rank=0, dim=0):  # noqa: B008
    return Layout.even(T, 1).local(whole, rank, dim)


def cu_seq(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


# (call, exception, what the message says, the wrong arguments)
CASES = [
    (attention, TypeError, ["layout must be a sparse_attn.distributed.Layout", "None"], {"layout": None}),
    (attention, TypeError, ["key_layout must be", "3 (int)"], {"key_layout": 3}),
    (attention, ValueError, ["the group's 1 ranks", "one of 2"], {"layout": Layout.even(T, 2)}),
    (attention, TypeError, ["group must be", "ProcessGroup", "3 (int)"], {"group": 3}),
    (attention, ValueError, ["way must be one of", "'gather', 'merge', 'index'", "'ring'"], {"way": "ring"}),
    (attention, ValueError, ["way must be one of", "[] (list)"], {"way": []}),
    (attention, TypeError, ["cu_seq must be", "[0, 12] (list)"], {"cu_seq": [0, T]}),
    (attention, TypeError, ["cu_seq must be int32 or int64", "float32"], {"cu_seq": torch.tensor([0.0, T])}),
    (attention, ValueError, ["cu_seq must have shape [S + 1]", "[1, 2]"], {"cu_seq": cu_seq(0, T)[None]}),
    (attention, ValueError, ["cu_seq must have shape [S + 1]", "[0]"], {"cu_seq": cu_seq()}),
    (attention, ValueError, ["cu_seq must rise from 0", "[0, 8, 4]"], {"cu_seq": cu_seq(0, 8, 4)}),
    (attention, ValueError, ["cu_seq must rise from 0", "[3, 12]"], {"cu_seq": cu_seq(3, T)}),
    (attention, ValueError, ["at most 12, the layout's positions", "[0, 40]"], {"cu_seq": cu_seq(0, 40)}),
    (attention, TypeError, ["query must be a tensor", "None"], {"query": None}),
    (attention, TypeError, ["query must be a tensor", "None"], {"query": None, "way": "merge"}),
    (attention, ValueError, ["key must have 4 dimensions", "[2, 12, 8]"], {"key": KEY[0], "way": "merge"}),
    (attention, ValueError, ["query must have the 12 positions", "got 5"], {"query": QUERY[:, :, :5]}),
    (attention, ValueError, ["key and value must agree"], {"value": VALUE[:, :, :5], "way": "merge"}),
    (attention, TypeError, ["context_parallel_attention takes no key_index"], {"key_index": None}),
    (attention, TypeError, ["takes no foo", "is_causal"], {"foo": 1}),
    (attention, TypeError, ["return_lse must be True or False"], {"return_lse": 1}),
    (attention, ValueError, ["backend must be one of", "'x'"], {"backend": "x", "way": "merge"}),
    (attention, NotImplementedError, ["way='merge' takes share='none'"], {"way": "merge", "share": "all"}),
    (
        attention,
        NotImplementedError,
        ["way='index' takes share='none'", "kv"],
        {"way": "index", "share": "kv"},
    ),
    (attention, ValueError, ["top_k must be at least 1", "0"], {"way": "index", "top_k": 0}),
    (attention, ValueError, ["at least window + sinks", "window=9"], {"way": "index", "window": 9}),
    (attention, ValueError, ["query must have the 12 positions"], {"way": "index", "query": QUERY[:, :, :5]}),
    (attention, ValueError, ["attn_mask must broadcast"], {"way": "index", "attn_mask": MASK[:, :5]}),
    (to_indices, TypeError, ["layout must be", "((0, 12),) (tuple)"], {"layout": ((0, T),)}),
    (to_indices, ValueError, ["way must be one of 'fetch', 'gather'", "'merge'"], {"way": "merge"}),
    (to_indices, TypeError, ["query must be a tensor", "None"], {"query": None}),
    (to_indices, TypeError, ["indices must be int32", "float32"], {"indices": INDICES.float()}),
    (to_indices, TypeError, ["indices must be an int32", "None"], {"indices": None}),
    (to_indices, ValueError, ["indices must have shape", "[1, 3, 12, 3]"], {"indices": INDICES[:, :3]}),
    (to_indices, ValueError, ["key and value must agree"], {"value": VALUE[:, :, :4]}),
    (inside, TypeError, ["layout must be", "None"], {"layout": None}),
    (inside, ValueError, ["the group's 1 ranks", "one of 3"], {"layout": Layout.even(T, 3)}),
    (inside, ValueError, ["13 positions", "got 12"], {"layout": Layout.even(13, 1)}),
    (inside, ValueError, ["way must be one of 'gather', 'merge', 'index', 'fetch'"], {"way": "x"}),
    (inside, TypeError, ["cu_seq must be", "(list)"], {"cu_seq": [0, T]}),
    (layout, TypeError, ["ranges must be a tuple", "None"], {"ranges": None}),
    (layout, TypeError, ["ranges must be a tuple", "(0, 12)"], {"ranges": (0, T)}),
    (layout, TypeError, ["ranges must be a tuple", "whole numbers"], {"ranges": (((0.0, 12.0),),)}),
    (even, ValueError, ["length must be at least 0", "-3"], {"length": -3, "ranks": 2}),
    (even, ValueError, ["ranks must be at least 1", "0"], {"length": T, "ranks": 0}),
    (even, TypeError, ["length must be an int", "True"], {"length": True, "ranks": 1}),
    (zigzag, TypeError, ["length must be an int", "'12'"], {"length": "12", "ranks": 2}),
    (zigzag, ValueError, ["ranks must be at least 1"], {"length": T, "ranks": 0}),
    (contiguous, TypeError, ["lengths must be a sequence", "3 (int)"], {"lengths": 3}),
    (local, ValueError, ["12 positions along dim=0", "shape [5]"], {"whole": torch.zeros(5)}),
    (local, ValueError, ["12 positions along dim=3"], {"dim": 3}),
    (local, ValueError, ["rank must be at most 0, got 1"], {"rank": 1}),
    (embedding, TypeError, ["ids must be", "None"], {"ids": None}),
    (embedding, TypeError, ["ids must be int32 or int64", "float32"], {"ids": IDS.float()}),
    (embedding, IndexError, ["ids must lie in [0, 100)", "got 100"], {"ids": IDS + 96}),
    (embedding, TypeError, ["tables must be a sequence", "None"], {"tables": None}),
    (embedding, ValueError, ["one entry per table", "0 projections"], {"projections": []}),
    (embedding, TypeError, ["token_band must be a tensor", "None"], {"token_band": None}),
    (embedding, ValueError, ["token_band must lie in [0, 2)", "-1"], {"token_band": BANDS["token_band"] - 1}),
    (embedding, ValueError, ["one length V", "100 and 50"], {"token_row": BANDS["token_row"][:50]}),
    (embedding, ValueError, ["token_row must lie in [0, 10)", "50"], {"token_row": BANDS["token_row"] + 50}),
    (embedding, ValueError, ["padding_idx must lie in [-100, 100)", "200"], {"padding_idx": 200}),
    (embedding, TypeError, ["padding_idx must be an int", "1.5"], {"padding_idx": 1.5}),
    (embedding, TypeError, ["reduce must be True or False", "'x'"], {"reduce": "x"}),
    (loss, TypeError, ["hidden must be a tensor", "None"], {"hidden": None}),
    (
        loss,
        ValueError,
        ["hidden must have shape [..., D] with D = 8", "[5, 7]"],
        {"hidden": torch.ones(5, 7)},
    ),
    (loss, TypeError, ["targets must be an int64 tensor", "None"], {"targets": None}),
    (loss, TypeError, ["tables must be a sequence", "3 (int)"], {"tables": 3}),
    (loss, TypeError, ["sum_gradients must be True or False", "None"], {"sum_gradients": None}),
    (across, ValueError, ["way must be one of", "'x'"], {"way": "x"}),
    (across, TypeError, ["source must be an int", "'a'"], {"way": "rank", "source": "a"}),
    (across, ValueError, ["source must be at most 0, got 7"], {"way": "rank", "source": 7}),
    (across, ValueError, ["source must be at least 0, got -1"], {"way": "rank", "source": -1}),
    (across, TypeError, ["top_k must be an int", "'3'"], {"top_k": "3"}),
    (across, TypeError, ["rule must be a sparse_attn.selection.Rule", "None"], {"rule": None}),
    (split, TypeError, ["mesh must be", "3 (int)"], {"mesh": 3}),
    (split, TypeError, ["model must be a torch.nn.Module", "3 (int)"], {"model": 3}),
    (split, ValueError, ["modules of class sparse_attn.nn.TopKAttention"], {"model": torch.nn.Linear(3, 3)}),
    (distributed.split_plan, TypeError, ["plan must be", "None"], {"plan": None, "ranks": 2}),
    (distributed.split_plan, ValueError, ["ranks must be at least 1"], {"plan": PLAN, "ranks": 0}),
]


@pytest.mark.parametrize(
    ("call", "error", "says", "wrong"), CASES, ids=[f"{c[0].__name__}-{c[2][0][:40]}-{n}" for n, c in enumerate(CASES)]
)  # fmt: skip
def test_wrong_arguments(call, error, says, wrong):
    with pytest.raises(error) as caught:
        call(**wrong)
    message = str(caught.value)
    assert all(words in message for words in says), message
    assert "\n" not in message
    # It left nothing behind.
    assert sparse_attn.topk_attention(QUERY, KEY, VALUE, 3, is_causal=True).shape == (1, 4, T, 6)


def test_the_right_arguments():
    """Or all of the above might be refused for something else."""
    wanted = sparse_attn.topk_attention(QUERY, KEY, VALUE, 3, is_causal=True)
    for way in ("gather", "merge", "index"):
        torch.testing.assert_close(attention(way=way, cu_seq=cu_seq(0, T)), wanted)
    torch.testing.assert_close(inside(), wanted)
    torch.testing.assert_close(to_indices(), sparse_attn.gathered_attention(QUERY, KEY, VALUE, INDICES))
    torch.testing.assert_close(embedding(padding_idx=-1), EMBEDDING(IDS))
    torch.testing.assert_close(
        loss(), sparse_attn.nn.VariableWidthHead(EMBEDDING).loss(torch.ones(5, 8), IDS)
    )
    assert across(way="rank").indices.shape == (1, 1, T, 3)
    assert local().shape == (T,)
