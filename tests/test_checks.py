"""Bad input: each argument wrong in each way that a person gets it wrong.

Every case names the exception and what its one sentence must say: the argument, what came, what is accepted.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from helpers.inputs import qkv

import sparse_attn

QUERY, KEY, VALUE = qkv(2, 4, 2, 5, 7, 8, 6)
INDICES = torch.zeros(2, 4, 5, 3, dtype=torch.int32)
GOOD = {
    "topk_attention": {"query": QUERY, "key": KEY, "value": VALUE, "top_k": 3},
    "topk_select": {"query": QUERY, "key": KEY, "top_k": 3},
    "gathered_attention": {"query": QUERY, "key": KEY, "value": VALUE, "indices": INDICES},
    "explain": {"query": QUERY, "key": KEY, "value": VALUE, "top_k": 3},
}


def floats(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def bools(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def case(error, says, **wrong):
    """A call with good arguments but for `wrong`; `says` are the parts that the message must hold."""
    return pytest.param(error, says, wrong, id="_".join([*wrong, *says])[:90])


# (exception, what the message says, the wrong arguments); `causal` needs more than one argument to be wrong.
TENSORS = [
    case(TypeError, ["query", "tensor of shape [B, Hq, Tq, D]", "(NoneType)"], query=None),
    case(TypeError, ["query", "tensor", "(list)"], query=[[1.0]]),
    case(TypeError, ["query", "tensor", "... (list)"], query=[[1.0] * 1000] * 1000),
    case(TypeError, ["query", "tensor", "(ndarray)"], query=np.zeros((2, 4, 5, 8))),
    case(ValueError, ["query", "4 dimensions [B, Hq, Tq, D]", "shape [4, 5, 8]"], query=floats(4, 5, 8)),
    case(ValueError, ["query", "4 dimensions", "shape []"], query=floats()),
    case(ValueError, ["query", "4 dimensions", "shape [1, 2, 4, 5, 8]"], query=floats(1, 2, 4, 5, 8)),
    case(TypeError, ["query", "float32, float16, bfloat16 or float64", "int64"], query=QUERY.long()),
    case(TypeError, ["query", "float32", "a bool tensor"], query=QUERY.bool()),
    case(TypeError, ["query", "float32", "complex64"], query=QUERY.to(torch.complex64)),
    case(TypeError, ["query", "float32", "float8_e4m3fn"], query=QUERY.to(torch.float8_e4m3fn)),
    case(TypeError, ["query", "dense", "sparse_coo"], query=QUERY.to_sparse()),
    case(ValueError, ["query", "last dimension of at least 1", "[2, 4, 5, 0]"], query=floats(2, 4, 5, 0)),
    case(TypeError, ["key", "tensor of shape [B, Hkv, Tk, D]", "'k' (str)"], key="k"),
    case(ValueError, ["key", "4 dimensions [B, Hkv, Tk, D]", "[2, 7, 8]"], key=floats(2, 7, 8)),
    case(TypeError, ["query and key", "one dtype", "float32", "bfloat16"], key=KEY.bfloat16()),
    case(TypeError, ["query and key", "one dtype", "float32", "float64"], key=KEY.double()),
    case(ValueError, ["query and key", "one device", "cpu", "meta"], key=KEY.to("meta")),
    case(ValueError, ["one batch size", "[2, 4, 5, 8]", "[3, 2, 7, 8]"], key=floats(3, 2, 7, 8)),
    case(ValueError, ["one batch size", "[1, 2, 7, 8]"], key=floats(1, 2, 7, 8)),
    case(ValueError, ["one head dimension D", "[2, 4, 5, 8]", "[2, 2, 7, 9]"], key=floats(2, 2, 7, 9)),
    case(
        ValueError, ["multiple of the number of key heads", "4 query heads", "3 key"], key=floats(2, 3, 7, 8)
    ),
    case(ValueError, ["multiple of the number of key heads", "8 key heads"], key=floats(2, 8, 7, 8)),
    case(ValueError, ["multiple of the number of key heads", "0 key heads"], key=floats(2, 0, 7, 8)),
    case(ValueError, ["positive multiple", "0 query heads"], query=floats(2, 0, 5, 8)),
]
VALUES = [
    case(TypeError, ["value", "tensor of shape [B, Hkv, Tk, Dv]", "3 (int)"], value=3),
    case(ValueError, ["value", "4 dimensions [B, Hkv, Tk, Dv]", "[7, 6]"], value=floats(7, 6)),
    case(TypeError, ["key and value", "one dtype", "float32", "float16"], value=VALUE.half()),
    case(ValueError, ["key and value", "one device", "meta"], value=VALUE.to("meta")),
    case(ValueError, ["key and value", "batch, heads and length", "[2, 2, 8, 6]"], value=floats(2, 2, 8, 6)),
    case(ValueError, ["key and value", "[2, 4, 7, 6]"], value=floats(2, 4, 7, 6)),
    case(ValueError, ["key and value", "[1, 2, 7, 6]"], value=floats(1, 2, 7, 6)),
    case(ValueError, ["value", "last dimension of at least 1"], value=floats(2, 2, 7, 0)),
]
SELECTION = [
    case(TypeError, ["top_k", "int", "3.0 (float)"], top_k=3.0),
    case(TypeError, ["top_k", "int", "'3' (str)"], top_k="3"),
    case(TypeError, ["top_k", "int", "None"], top_k=None),
    case(TypeError, ["top_k", "int", "True (bool)"], top_k=True),
    case(TypeError, ["top_k", "int", "int64 tensor of shape []"], top_k=torch.tensor(3)),
    case(TypeError, ["top_k", "int", "float64"], top_k=np.float64(3)),
    case(ValueError, ["top_k", "at least 1", "got 0"], top_k=0),
    case(ValueError, ["top_k", "at least 1", "got -1"], top_k=-1),
    case(ValueError, ["top_k", "at most", str(2**63)], top_k=2**63),
    case(TypeError, ["is_causal", "True or False", "1 (int)"], is_causal=1),
    case(TypeError, ["is_causal", "True or False", "None"], is_causal=None),
    case(TypeError, ["is_causal", "True or False", "bool tensor"], is_causal=torch.tensor(True)),
    case(TypeError, ["is_causal", "True or False", "'left' (str)"], is_causal="left"),
    # 5 queries and 7 keys: which diagonal is meant must be said.
    case(ValueError, ["is_causal", "5 queries", "7 keys", "causal_offset", "2 if", "0 if"], is_causal=True),
    case(ValueError, ["causal_offset", "needs is_causal=True", "causal_offset=2"], causal_offset=2),
    case(ValueError, ["causal_offset", "needs is_causal=True", "0"], causal_offset=0),
    case(TypeError, ["causal_offset", "int", "2.0"], is_causal=True, causal_offset=2.0),
    case(TypeError, ["causal_offset", "int", "'last' (str)"], is_causal=True, causal_offset="last"),
    case(TypeError, ["causal_offset", "int", "True"], is_causal=True, causal_offset=True),
    case(ValueError, ["causal_offset", "at most"], is_causal=True, causal_offset=2**63),
    case(ValueError, ["causal_offset", "at least"], is_causal=True, causal_offset=-(2**63) - 1),
    case(TypeError, ["attn_mask", "boolean tensor or None", "(list)"], attn_mask=[True] * 7),
    case(TypeError, ["attn_mask", "boolean", "float32", "attn_mask == 0"], attn_mask=floats(5, 7)),
    case(TypeError, ["attn_mask", "boolean", "int64"], attn_mask=torch.ones(5, 7, dtype=torch.int64)),
    case(TypeError, ["attn_mask", "boolean", "uint8"], attn_mask=torch.ones(5, 7, dtype=torch.uint8)),
    case(ValueError, ["attn_mask", "broadcast", "[2, 4, 5, 7]", "[7, 5]"], attn_mask=bools(7, 5)),
    case(
        ValueError, ["attn_mask", "broadcast", "[2, 7]"], attn_mask=bools(2, 7)
    ),  # [B, Tk]: no axes for heads
    case(ValueError, ["attn_mask", "broadcast", "[2, 5, 7]"], attn_mask=bools(2, 5, 7)),
    case(ValueError, ["attn_mask", "broadcast", "[2, 2, 5, 7]"], attn_mask=bools(2, 2, 5, 7)),
    case(ValueError, ["attn_mask", "broadcast", "[1, 2, 4, 5, 7]"], attn_mask=bools(1, 2, 4, 5, 7)),
    case(ValueError, ["attn_mask", "device", "cpu", "meta"], attn_mask=bools(5, 7).to("meta")),
    case(TypeError, ["attn_mask", "dense", "sparse_coo"], attn_mask=bools(5, 7).to_sparse()),
    case(
        ValueError,
        ["attn_mask", "must not differ", "share", "2 heads"],
        share="kv",
        attn_mask=torch.arange(4).view(1, 4, 1, 1).expand(2, 4, 5, 7) > 0,
    ),
    case(
        ValueError,
        ["attn_mask", "must not differ", "4 heads"],
        share="all",
        attn_mask=torch.arange(4).view(1, 4, 1, 1).expand(2, 4, 5, 7) > 1,
    ),
    case(
        TypeError, ["key_lengths", "int32 or int64 tensor of shape [B]", "[7, 5] (list)"], key_lengths=[7, 5]
    ),
    case(TypeError, ["key_lengths", "tensor", "7 (int)"], key_lengths=7),
    case(TypeError, ["key_lengths", "int32 or int64", "float32"], key_lengths=floats(2)),
    case(TypeError, ["key_lengths", "int32 or int64", "bool"], key_lengths=bools(2)),
    case(ValueError, ["key_lengths", "[B] = [2]", "shape [3]"], key_lengths=torch.tensor([1, 2, 3])),
    case(ValueError, ["key_lengths", "[B] = [2]", "shape [2, 1]"], key_lengths=torch.tensor([[1], [2]])),
    case(ValueError, ["key_lengths", "[B] = [2]", "shape []"], key_lengths=torch.tensor(3)),
    case(ValueError, ["key_lengths", "[0, Tk] = [0, 7]", "from 3 to 8"], key_lengths=torch.tensor([3, 8])),
    case(ValueError, ["key_lengths", "[0, 7]", "from -1 to 7"], key_lengths=torch.tensor([7, -1])),
    case(
        ValueError,
        ["key_lengths", "device", "meta"],
        key_lengths=torch.ones(2, dtype=torch.int64, device="meta"),
    ),
    case(TypeError, ["key_starts", "int32 or int64 tensor of shape [B] or [B, Tq]", "3 (int)"], key_starts=3),
    case(TypeError, ["key_starts", "int32 or int64", "float32"], key_starts=floats(2)),
    case(TypeError, ["key_starts", "int32 or int64", "bool"], key_starts=bools(2, 5)),
    case(
        ValueError,
        ["key_starts", "[B] = [2] or [B, Tq] = [2, 5]", "shape [2, 7]"],
        key_starts=torch.zeros(2, 7, dtype=torch.int32),
    ),
    case(ValueError, ["key_starts", "[B] = [2]", "shape [5]"], key_starts=torch.zeros(5, dtype=torch.int64)),
    case(ValueError, ["key_starts", "[B] = [2]", "shape []"], key_starts=torch.tensor(3)),
    case(
        ValueError,
        ["key_starts", "device", "meta"],
        key_starts=torch.ones(2, dtype=torch.int64, device="meta"),
    ),
    case(TypeError, ["window", "int", "1.5 (float)"], is_causal=True, causal_offset=2, window=1.5),
    case(TypeError, ["window", "int", "(tuple)"], is_causal=True, causal_offset=2, window=(1, 0)),
    case(TypeError, ["window", "int", "None"], window=None),
    case(ValueError, ["window", "at least 0", "-1"], is_causal=True, causal_offset=2, window=-1),
    case(ValueError, ["window", "needs is_causal=True", "window=2"], window=2),
    case(TypeError, ["sinks", "int", "'1' (str)"], sinks="1"),
    case(ValueError, ["sinks", "at least 0", "-2"], sinks=-2),
    case(ValueError, ["whole budget", "top_k=3", "window=0", "sinks=4"], sinks=4),
    case(
        ValueError,
        ["window + sinks", "top_k=3", "window=2", "sinks=2"],
        is_causal=True,
        causal_offset=2,
        window=2,
        sinks=2,
    ),
    case(ValueError, ["share", "'none', 'kv', 'all'", "'head' (str)"], share="head"),
    case(ValueError, ["share", "'none', 'kv', 'all'", "None"], share=None),
    case(ValueError, ["share", "'none', 'kv', 'all'", "True"], share=True),
    case(ValueError, ["share", "'none', 'kv', 'all'", "float32 tensor"], share=floats(2)),
]
SCALES = [
    case(TypeError, ["scale", "float or None", "'1' (str)"], scale="1"),
    case(TypeError, ["scale", "float or None", "True"], scale=True),
    case(TypeError, ["scale", "float or None", "float32 tensor"], scale=floats(1)),
    case(TypeError, ["scale", "float or None", "(complex)"], scale=1j),
    case(ValueError, ["scale", "finite", "nan"], scale=math.nan),
    case(ValueError, ["scale", "finite", "inf"], scale=math.inf),
    case(ValueError, ["scale", "finite", "-inf"], scale=-math.inf),
    case(ValueError, ["scale", "finite"], scale=10**400),
    case(TypeError, ["softcap", "float or None", "'30' (str)"], softcap="30"),
    case(TypeError, ["softcap", "float or None", "True"], softcap=True),
    case(ValueError, ["softcap", "positive", "got 0.0"], softcap=0),
    case(ValueError, ["softcap", "positive", "got -30.0"], softcap=-30.0),
    case(ValueError, ["softcap", "1e-30 to 1e30", "1e-40"], softcap=1e-40),
    case(ValueError, ["softcap", "finite", "inf"], softcap=math.inf),
    case(ValueError, ["softcap", "finite", "nan"], softcap=math.nan),
    case(TypeError, ["sink_logits", "tensor of shape [Hq] or None", "(list)"], sink_logits=[1.0] * 4),
    case(TypeError, ["sink_logits", "float32", "int64"], sink_logits=torch.ones(4).long()),
    case(TypeError, ["sink_logits", "dense", "sparse_coo"], sink_logits=floats(4).to_sparse()),
    case(ValueError, ["sink_logits", "[Hq] = [4]", "shape [2]"], sink_logits=floats(2)),
    case(ValueError, ["sink_logits", "[Hq] = [4]", "shape [1, 4]"], sink_logits=floats(1, 4)),
    case(ValueError, ["sink_logits", "device", "cpu", "meta"], sink_logits=floats(4, device="meta")),
]
KEY_INDEXES = [
    case(TypeError, ["key_index", "sparse_attn.KeyIndex", "3 (int)"], key_index=3),
    case(TypeError, ["key_index", "tensor of shape [2, 2]"], key_index=torch.zeros(2, 2)),
    case(
        ValueError, ["key_index", "it knows 1", "key has"], key_index=sparse_attn.KeyIndex.of(KEY[:, :, :1])
    ),
    case(
        TypeError, ["key_index", "torch.float64 keys", "torch.float32"],
        key_index=sparse_attn.KeyIndex.of(KEY.double()),
    ),
]  # fmt: skip
TAILS = [
    case(ValueError, ["tail", "'none'", "'mean'", "'blocks'", "'sum'"], tail="sum"),
    case(ValueError, ["tail", "'none'", "True"], tail=True),
    case(ValueError, ["means", "attn_mask"], tail="mean", attn_mask=torch.ones(5, 7, dtype=torch.bool)),
]
BACKENDS = [
    case(ValueError, ["backend", "'cpu'", "'reference'", "None", "'cuda:0'"], backend="cuda:0"),
    case(ValueError, ["backend", "'CPU'"], backend="CPU"),
    case(ValueError, ["backend", "''"], backend=""),
    case(ValueError, ["backend", "device(type='cpu')"], backend=torch.device("cpu")),
    case(ValueError, ["backend", "['cpu']"], backend=["cpu"]),
    case(ValueError, ["backend", "1"], backend=1),
]
LSE_FLAG = [
    case(TypeError, ["return_lse", "True or False", "1 (int)"], return_lse=1),
    case(TypeError, ["return_lse", "True or False", "'yes' (str)"], return_lse="yes"),
]
INDEX_FLAG = [case(TypeError, ["return_indices", "True or False", "None"], return_indices=None)]
SLOTS = [
    case(TypeError, ["indices", "int32 tensor of shape [B, G, Tq, K]", "(list)"], indices=[0, 1]),
    case(TypeError, ["indices", "int32", "None"], indices=None),
    case(TypeError, ["indices", "int32 (or int64)", "float32"], indices=INDICES.float()),
    case(TypeError, ["indices", "int32 (or int64)", "int16"], indices=INDICES.short()),
    case(TypeError, ["indices", "int32 (or int64)", "bool"], indices=INDICES.bool()),
    case(TypeError, ["indices", "dense", "sparse_coo"], indices=INDICES.to_sparse()),
    case(ValueError, ["indices", "device", "meta"], indices=INDICES.to("meta")),
    case(
        ValueError,
        ["indices", "G one of 1, Hkv, Hq", "[2, 3, 5, 3]", "Hkv=2", "Hq=4"],
        indices=INDICES[:, :3],
    ),
    case(ValueError, ["indices", "B=2", "[1, 4, 5, 3]"], indices=INDICES[:1]),
    case(ValueError, ["indices", "Tq=5", "[2, 4, 4, 3]"], indices=INDICES[:, :, :4]),
    case(ValueError, ["indices", "[5, 3]"], indices=INDICES[0, 0]),
    case(ValueError, ["indices", "[1, 2, 4, 5, 3]"], indices=INDICES[None]),
    case(ValueError, ["indices", "[2, 0, 5, 3]"], indices=INDICES[:, :0]),
]
MEASURE = [
    case(TypeError, ["measure", "True or False", "1 (int)"], measure=1),
    case(TypeError, ["measure", "True or False", "None"], measure=None),
]

CASES = {
    "topk_attention": [
        *TENSORS,
        *VALUES,
        *SELECTION,
        *SCALES,
        *KEY_INDEXES,
        *TAILS,
        *BACKENDS,
        *LSE_FLAG,
        *INDEX_FLAG,
    ],
    "topk_select": [*TENSORS, *SELECTION, *SCALES, *KEY_INDEXES, *BACKENDS],
    "gathered_attention": [*TENSORS, *VALUES, *SLOTS, *SCALES, *BACKENDS, *LSE_FLAG],
    "explain": [*TENSORS, *VALUES, *SELECTION, *SCALES, *KEY_INDEXES, *TAILS, *BACKENDS, *MEASURE],
}


def check(op, error, says, wrong):
    with pytest.raises(error) as caught:
        getattr(sparse_attn, op)(**(GOOD[op] | wrong))
    message = str(caught.value)
    assert type(caught.value) is error
    assert all(part in message for part in says), message
    assert "\n" not in message, "more than a sentence"
    assert len(message) < 300, message


@pytest.mark.parametrize(("error", "says", "wrong"), CASES["topk_attention"])
def test_topk_attention(error, says, wrong):
    check("topk_attention", error, says, wrong)


@pytest.mark.parametrize(("error", "says", "wrong"), CASES["topk_select"])
def test_topk_select(error, says, wrong):
    check("topk_select", error, says, wrong)


@pytest.mark.parametrize(("error", "says", "wrong"), CASES["gathered_attention"])
def test_gathered_attention(error, says, wrong):
    check("gathered_attention", error, says, wrong)


@pytest.mark.parametrize(("error", "says", "wrong"), CASES["explain"])
def test_explain(error, says, wrong):
    check("explain", error, says, wrong)


@pytest.mark.parametrize("name", ["gpu", "Reference", "", 3, ["cpu"], torch.device("cpu")], ids=str)
def test_use_backend(name):
    with pytest.raises(
        ValueError, match="backend must be one of 'cpu', 'cuda', 'triton', 'reference'"
    ) as caught:
        sparse_attn.use_backend(name).__enter__()
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("op", GOOD)
def test_every_argument_is_tried(op):
    """A new argument must come with its wrong values."""
    tried = {name for param in CASES[op] for name in param.values[2]}
    arguments = set(inspect.signature(getattr(sparse_attn, op)).parameters)
    if op == "explain":
        arguments -= {"return_lse", "return_indices"}  # they do not change which wing runs
    assert tried == arguments


@pytest.mark.parametrize("op", GOOD)
def test_arguments_after_the_tensors_are_by_name(op):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(sparse_attn, op)(*GOOD[op].values(), True)


@pytest.mark.parametrize("op", GOOD)
def test_unknown_and_missing_arguments(op):
    with pytest.raises(TypeError, match="dropout_p"):
        getattr(sparse_attn, op)(**GOOD[op], dropout_p=0.1)
    for name in GOOD[op]:
        with pytest.raises(TypeError, match=f"'{name}'"):
            getattr(sparse_attn, op)(**{k: v for k, v in GOOD[op].items() if k != name})
