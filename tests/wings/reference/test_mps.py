"""Every aten op that the reference wing uses has an MPS kernel: it is the path on Apple's GPUs.

The ops are recorded on the meta device, where the code takes the accelerator's branches, and on the CPU.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.embeddings import make_ids, make_tables
from helpers.inputs import OPTIONS, index_rows, mask, normal, options_for, qkv
from helpers.native_functions import has_kernel, native_functions, parse
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference import REFERENCE_WING

RUN = REFERENCE_WING.implementations


class Recorder(TorchDispatchMode):
    """The aten ops that were called, and the dtypes of what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            overload = "" if func._overloadname == "default" else f".{func._overloadname}"
            self.ops.add(func._schema.name.removeprefix("aten::") + overload)
        leaves = result if isinstance(result, (tuple, list)) else [result]
        self.dtypes |= {t.dtype for t in leaves if isinstance(t, torch.Tensor)}
        return result


@cache
def record(device: str, dtype: torch.dtype) -> Recorder:
    """Runs every function of the wing with every option, the gradient formulas included."""
    query, key, value = (t.to(device) for t in qkv(2, 4, 2, 9, 13, 8, 5, dtype=dtype))
    recorder, logits = Recorder(), normal(4).to(device)
    for name in OPTIONS:
        for groups in (4, 2, 1):
            options = options_for(name, query, key)
            seen, lengths = options.get("attn_mask"), options.get("key_lengths")
            seen = None if seen is None else seen.to(device).expand(2, groups, 9, 13)
            lengths = None if lengths is None else lengths.to(device)
            causal, offset = options.get("is_causal", False), options.get("causal_offset", 0)
            window, sinks = options.get("window", 0), options.get("sinks", 0)
            scale = options.get("scale", 0.3)
            starts = options.get("key_starts")
            starts = None if starts is None else starts.to(device).view(2, -1).expand(2, 9)
            scoring = (scale, 1.5, logits) if name == "everything" else (scale, 0.0, None)
            rule = PackedRule(seen, lengths, causal, offset, window, sinks, groups, *scoring, starts)
            with recorder:
                RUN["topk_select"](query, key, 5, rule, False, None, 1, 1)
                RUN["topk_attention"](query, key, value, 5, rule)
    for groups in (4, 2, 1):
        indices = index_rows((2, groups, 9, 5), 13, garbage=True).to(device)
        with recorder:
            out, lse = RUN["gathered_attention"](query, key, value, indices, 0.3, 1.5, logits)
            for grad_lse in (None, lse):
                inputs = (query, key, value, indices, out, lse)
                RUN["gathered_attention_backward"](out, grad_lse, *inputs, 0.3, 1.5, logits, False)
    return recorder


def record_public(device: str, dtype: torch.dtype) -> Recorder:
    """What runs around the wing: the checks, the gradients' glue, int64 indices, masks that are shared."""
    recorder = Recorder()
    inputs = [t.to(device).requires_grad_() for t in qkv(2, 4, 2, 9, 13, 8, 5, dtype=dtype)]
    seen, lengths = mask(2, 4, 9, 13).to(device), torch.tensor([13, 5]).to(device)
    with recorder, sparse_attn.use_backend("reference"):
        results = sparse_attn.topk_attention(
            *inputs,
            4,
            attn_mask=seen[:, :1],
            key_lengths=lengths,
            share="kv",
            softcap=2.0,
            sink_logits=torch.ones(4, device=device, requires_grad=True),
            return_lse=True,
            return_indices=True,
        )
        results[1].sum().backward()
        staged = sparse_attn.gathered_attention(*inputs, results[2].long())
        staged.sum().backward()
        sparse_attn.topk_select(*inputs[:2], 4, attn_mask=seen)
    return recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("what", [record, record_public])
def test_every_op_has_an_mps_kernel(what, device, dtype):
    recorder = what(device, dtype)
    # The CPU alone adds rows in one thread, in order; the public checks read lengths on the CPU alone.
    ops = recorder.ops - ({"scatter_add_", "aminmax"} if device == "cpu" else set())
    assert ops, "nothing was recorded"
    missing = sorted(op for op in ops if not has_kernel(op, "MPS"))
    assert not missing, f"no MPS kernel for {', '.join(missing)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_becomes_float64(dtype):
    """MPS has no float64."""
    assert torch.float64 not in record("meta", dtype).dtypes


def test_the_recorder_sees_the_kernels():
    ops = record("meta", torch.float32).ops
    assert {"sort.stable", "gather", "bmm", "index_put_", "logsumexp", "where.self", "_softmax"} <= ops


SAMPLE = """
- func: own(Tensor self) -> Tensor
  dispatch:
    CPU, CUDA: own_native
    MPS: own_mps   # a comment: with a colon
  tags: core

- func: elsewhere(Tensor self) -> Tensor
  variants: function
  dispatch: # a comment
    CPU, CUDA: elsewhere
    SparseMPS: elsewhere_sparse

- func: structured(Tensor self) -> Tensor
  structured_delegate: structured.out

- func: structured.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
  structured: True
  dispatch:
    CPU, CUDA, MPS: structured_out

- func: half_structured(Tensor self) -> Tensor
  structured_delegate: half_structured.out
  dispatch:
    SparseCPU: half_structured_sparse

- func: half_structured.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
  structured: True
  dispatch:
    CPU, CUDA: half_structured_out

- func: implicit(Tensor self) -> Tensor
  variants: method

- func: explicit(Tensor self) -> Tensor
  dispatch:
    CompositeExplicitAutograd: explicit

- func: nowhere(Tensor self) -> Tensor
  dispatch: {}
"""


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("own", True),
        ("elsewhere", False),  # SparseMPS is not MPS
        ("structured", True),  # the kernel stands at the out variant
        ("structured.out", True),
        ("half_structured", False),
        ("implicit", True),
        ("explicit", True),
        ("nowhere", False),
    ],
)
def test_the_checker(op, expected):
    assert has_kernel(op, "MPS", parse(SAMPLE)) is expected


def test_the_checker_on_the_real_file():
    functions = native_functions()
    assert len(functions) > 2000
    for op in ("sort.stable", "mm", "index_put_", "new_zeros", "matmul", "view"):
        assert has_kernel(op, "MPS"), op
    absent = {op for op in functions if has_kernel(op, "CUDA") and not has_kernel(op, "MPS")}
    assert {"linalg_eig", "geqrf"} & absent, "no known gap of MPS is seen as one"
    assert len(absent) > 50
    with pytest.raises(KeyError):
        has_kernel("no_such_op", "MPS")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_embedding_has_mps_kernels(device):
    e, recorder = make_tables(), Recorder()
    tables = [t.to(device) for t in e.tables]
    projections = [torch.empty((0, 0) if p is None else p.shape, device=device) for p in e.projections]
    arguments = (
        make_ids("zipf", 200, 20).to(device),
        tables,
        projections,
        e.token_band.to(device),
        e.token_row.to(device),
        3,
    )
    with recorder:
        out = RUN["variable_width_embedding"](*arguments, False)
        # The sizes of sparse gradients depend on the ids, which meta tensors do not have.
        for sparse in (False, True) if device == "cpu" else (False,):
            RUN["variable_width_embedding_backward"](out, *arguments, sparse, True, True)
    assert recorder.ops
    assert torch.float64 not in recorder.dtypes
    assert not [op for op in sorted(recorder.ops) if not has_kernel(op, "MPS")]
