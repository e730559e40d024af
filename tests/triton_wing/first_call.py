"""What the first call of each op compiles, and for how long: PYTHONPATH=.:tests python -m triton_wing.first_call

The ops run as on a GPU, forward and backward, on CPU tensors, with one thing replaced: a launch compiles its kernel for
sm_90 and runs nothing. The cache is empty, and kernels are compiled one after the other, as in a first call.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

import sparse_attn
from sparse_attn.ops.key_index import WRITE
from sparse_attn.wings import triton as triton_wing
from triton_wing import aot

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "sanitize_overflow")


def as_case(kernel, values: tuple, named: dict) -> aot.Case:
    """The launch kernel[grid](*values, **named) as something to compile."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    if kernel.debug:
        options["debug"] = True
    arguments = dict(zip((p.name for p in kernel.params), values, strict=False)) | named
    arguments = {n: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    return aot.Case(kernel.__name__, kernel, arguments, warps, stages, options=options)


@contextmanager
def launches(found: list[aot.Case]) -> Iterator[None]:
    """Inside, the wing takes CPU tensors, and what it would launch is appended to `found` instead."""
    from triton.runtime.jit import JITFunction

    def run(kernel, *values, grid, warmup, **named):
        found.append(as_case(kernel, values, named))

    with mock.patch.object(triton_wing, "interpreted", True), mock.patch.object(JITFunction, "run", run):
        yield


Step = tuple[str, Callable[[], torch.Tensor | None]]


def attention(heads: int, kv_heads: int, groups: int) -> Iterator[Step]:
    """gathered_attention, bf16, D 128, K 256."""
    query = torch.zeros(1, heads, 512, 128, dtype=torch.bfloat16, requires_grad=True)
    key, value = torch.zeros(2, 1, kv_heads, 512, 128, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    indices = torch.zeros(1, groups, 512, 256, dtype=torch.int32)
    out = []
    yield (
        "forward",
        lambda: out.append(sparse_attn.gathered_attention(query, key, value, indices, backend="triton")),
    )
    yield "backward", lambda: out[0].sum().backward()


def select_and_attend(share: str, tail: str = "none") -> Iterator[Step]:
    """topk_attention, bf16, D 128, K 64, causal."""
    inputs = torch.zeros(3, 1, 16, 512, 128, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    out = []
    options = {"is_causal": True, "share": share, "tail": tail, "backend": "triton"}
    yield "forward", lambda: out.append(sparse_attn.topk_attention(*inputs, 64, **options))
    yield "backward", lambda: out[0].sum().backward()


def whole_blocks() -> Iterator[Step]:
    """block_attention, 16 heads in 4 groups, bf16, D 128, causal."""
    query = torch.zeros(1, 16, 512, 128, dtype=torch.bfloat16, requires_grad=True)
    key, value = torch.zeros(2, 1, 4, 512, 128, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    blocks, out = torch.zeros(1, 4, 8, 4, dtype=torch.int32), []
    yield (
        "forward",
        lambda: out.append(sparse_attn.block_attention(query, key, value, blocks, is_causal=True, backend="triton")),
    )  # fmt: skip
    yield "backward", lambda: out[0].sum().backward()


def packed() -> Iterator[Step]:
    """varlen_topk_attention, 16 heads, bf16, D 128, K 64, causal, two documents."""
    inputs = torch.zeros(3, 512, 16, 128, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    where, out = (torch.tensor([0, 200, 512]), None, 312, 312, 64), []
    yield (
        "forward",
        lambda: out.append(sparse_attn.varlen_topk_attention(*inputs, *where, is_causal=True, backend="triton")),
    )  # fmt: skip
    yield "backward", lambda: out[0].sum().backward()


def step(share: str) -> Iterator[Step]:
    """A token each of 16 sequences in pages of 64, 32 heads in 8 groups, bf16, D 128, K 64."""
    query = torch.zeros(16, 32, 128, dtype=torch.bfloat16)
    key = torch.zeros(1, 64, 8, 128, dtype=torch.bfloat16).expand(64, -1, -1, -1)
    table, used = torch.arange(64, dtype=torch.int32).view(16, 4), torch.full((16,), 256)
    where = torch.arange(17), None, 1, 256, 64
    options = {
        "seqused_k": used,
        "block_table": table,
        "is_causal": True,
        "share": share,
        "backend": "triton",
    }
    yield "forward", lambda: sparse_attn.varlen_topk_attention(query, key, key, *where, **options)


def cheap(name: str) -> Iterator[Step]:
    """indexer_select of 32 heads, quantized_select and refine_blocks, bf16, D 64 and 128, K 64, causal."""
    query, key = torch.zeros(2, 1, 16, 512, 128, dtype=torch.bfloat16).unbind(0)
    small = torch.zeros(1, 32, 512, 64, dtype=torch.bfloat16)
    options = {"is_causal": True, "backend": "triton"}
    calls = {
        "indexer_select": lambda: sparse_attn.indexer_select(
            small, small[:, :1], torch.zeros(1, 32, 512), 64, **options
        ),
        "quantized_select": lambda: sparse_attn.quantized_select(query, key, 64, **options),
        "refine_blocks": lambda: sparse_attn.refine_blocks(
            query, key, torch.zeros(1, 16, 8, 4, dtype=torch.int32), 64, **options
        ),
    }
    yield "forward", calls[name]


def bands(op: str) -> Iterator[Step]:
    """Widths 512, 128 and 32 of a vocabulary of 50,257, bf16, 1,024 tokens."""
    rows, widths = (2000, 8000, 40257), (512, 128, 32)
    tables = [
        torch.zeros(n, w, dtype=torch.bfloat16, requires_grad=True) for n, w in zip(rows, widths, strict=True)
    ]
    projections = [None] + [torch.zeros(512, w, dtype=torch.bfloat16, requires_grad=True) for w in widths[1:]]
    maps = (
        torch.arange(3, dtype=torch.int32).repeat_interleave(torch.tensor(rows)),
        torch.cat([torch.arange(n, dtype=torch.int32) for n in rows]),
    )
    ids, out = torch.zeros(1024, dtype=torch.int64), []
    hidden = torch.zeros(1024, 512, dtype=torch.bfloat16, requires_grad=True)
    shared = (tables, projections, *maps)
    if op == "embedding":
        call = lambda: sparse_attn.variable_width_embedding(ids, *shared, backend="triton")  # noqa: E731
    else:
        call = lambda: sparse_attn.variable_width_cross_entropy(  # noqa: E731
            hidden, ids, *shared, backend="triton"
        )
    yield "forward", lambda: out.append(call())
    yield "backward", lambda: out[0].sum().backward()


def indexed() -> Iterator[Step]:
    """A decoding step with a key index, 32 heads in 8 groups, bf16, D 128, K 64, and a key that is added to it."""
    query = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
    key = torch.zeros(1, 8, 1024, 128, dtype=torch.bfloat16)
    index = sparse_attn.KeyIndex.of(key)

    def call() -> None:
        WRITE.on("triton")(key[:, :, :1], *index.tensors(), 0)
        sparse_attn.topk_attention(query, key, key, 64, key_index=index, backend="triton")

    yield "forward", call


CALLS = {
    "gathered_attention, 16 heads share": lambda: attention(16, 1, 1),
    "gathered_attention, heads alone": lambda: attention(16, 16, 16),
    "topk_attention, share none": lambda: select_and_attend("none"),
    "topk_attention, share all": lambda: select_and_attend("all"),
    "topk_attention, tail of blocks": lambda: select_and_attend("none", "blocks"),
    "topk_attention, tail of the mean": lambda: select_and_attend("none", "mean"),
    "topk_attention with a key index": indexed,
    "block_attention": whole_blocks,
    "varlen_topk_attention": packed,
    "varlen_topk_attention in pages": lambda: step("none"),
    "the same, share kv": lambda: step("kv"),
    **{name: partial(cheap, name) for name in ("indexer_select", "quantized_select", "refine_blocks")},
    "variable_width_embedding": lambda: bands("embedding"),
    "variable_width_cross_entropy": lambda: bands("loss"),
}


def measure(target: str) -> Iterator[tuple[str, str, int, float, aot.Resources]]:
    """(call, direction, kernels compiled, seconds, the slowest of them); a call finds what the ones before left."""
    known = set()
    for name, steps in CALLS.items():
        for direction, step in steps():
            found: list[aot.Case] = []
            with launches(found):
                step()
            compiled = []
            for case in found:
                source = case.source()
                key = source.hash(), case.num_warps, case.num_stages, str(case.options)
                if key not in known:
                    known.add(key)
                    compiled.append(aot.compile_one("", case, target))
            errors = [r.error for r in compiled if r.error]
            if errors:
                raise RuntimeError(errors[0])
            slowest = max(compiled, key=lambda r: r.seconds, default=aot.Resources("", "–", target))
            yield name, direction, len(compiled), sum(r.seconds for r in compiled), slowest


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        start = time.perf_counter()
        print(f"{'first call':<37}{'direction':<10}{'kernels':>8}{'seconds':>9}  slowest kernel")
        total = 0.0
        for name, direction, count, seconds, slowest in measure(aot.MAIN_TARGET):
            total += seconds
            print(
                f"{name:<37}{direction:<10}{count:>8}{seconds:>9.1f}  {slowest.case} {slowest.seconds:.1f} s"
            )
        print(
            f"all: {total:.1f} s of compiling for {aot.MAIN_TARGET}, {time.perf_counter() - start:.1f} s in all"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
