"""Runs one wing on tensors that touch memory nobody may read. Run as a program; a read beyond them kills it.

Each input lies between two protected pages, once with its end and once with its start at one of them, so that a
vector that is loaded past a row's end or an index that is followed out of range is a crash, not luck.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import torch

import sparse_attn
from helpers.inputs import index_rows, mask, normal, qkv

PROT_NONE = 0


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy whose last (or first) byte is a protected page's neighbour."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for first in (address, address + (pages + 1) * page):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), ctypes.c_size_t(page), PROT_NONE):
            raise OSError("mprotect failed")
    offset = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def guarded_every_second(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The same with a last stride of 2, its last (or first) element at the edge."""
    wide = tensor.repeat_interleave(2, dim=-1)
    return guarded(wide, at_end)[..., 1 if at_end else 0 :: 2]


SHAPES = [  # (B, Hq, Hkv, Tq, Tk, D, Dv), K
    ((1, 1, 1, 1, 1, 1, 1), 1),
    ((1, 2, 1, 3, 5, 7, 3), 4),
    ((2, 4, 2, 17, 33, 9, 15), 8),
    ((1, 2, 2, 5, 257, 72, 33), 64),
    ((1, 2, 1, 33, 100, 31, 65), 17),
    ((1, 1, 1, 6, 1000, 64, 64), 300),
    ((1, 2, 1, 40, 70, 128, 256), 33),
]


def run(wing: str, dtype: torch.dtype, sizes, top_k: int, at_end: bool, guard) -> None:
    inputs = [guard(t, at_end).requires_grad_() for t in qkv(*sizes, dtype=dtype)]
    batch, heads, kv_heads, queries, keys = sizes[:5]
    causal = {"is_causal": True, "causal_offset": keys - queries}
    lengths = torch.arange(batch, dtype=torch.int32).neg() + keys
    for share in ("none", "kv", "all"):
        for options in (
            {},
            causal | {"window": 1},
            {"attn_mask": guard(mask(batch, 1, queries, keys), at_end)},
            {"key_lengths": guarded(lengths, at_end)},
            causal
            | {"key_starts": guarded(torch.arange(batch * queries).view(batch, queries) % keys, at_end)},
        ):
            out = sparse_attn.topk_attention(*inputs, top_k, share=share, backend=wing, **options)
            out.sum().backward()
            if wing in ("cpu", "reference"):
                sparse_attn.quantized_select(*inputs[:2], top_k, share=share, backend=wing, **options)
    if wing in ("cpu", "reference"):
        weights = guard(normal(batch, heads, queries), at_end)
        for int8 in (False, True):
            sparse_attn.indexer_select(*inputs[:2], weights, top_k, int8=int8, backend=wing, **causal)
        for groups in (1, kv_heads, heads):
            tile, block = 7, 24
            rows = index_rows((batch, groups, -(-queries // tile), 3), -(-keys // block), garbage=True)
            shape = {"query_tile": tile, "block_size": block}
            out = sparse_attn.block_attention(*inputs, guard(rows, at_end), backend=wing, **shape, **causal)
            out.sum().backward()
            for share in ("none", "kv", "all")[
                : 1 if groups == heads > kv_heads else 3 if groups == 1 else 2
            ]:
                sparse_attn.refine_blocks(
                    *inputs[:2], rows, top_k, share=share, backend=wing, **shape, **causal
                )
    for groups in (1, kv_heads, heads):
        for garbage in (False, True):
            indices = guard(index_rows((batch, groups, queries, top_k), keys, garbage=garbage), at_end)
            out, lse = sparse_attn.gathered_attention(*inputs, indices, return_lse=True, backend=wing)
            grad, grad_lse = guard(torch.ones_like(out), at_end), guarded(torch.ones_like(lse), at_end)
            torch.autograd.grad((out, lse), inputs, (grad, grad_lse))


def main(wing: str, dtypes: list[str]) -> None:
    faulthandler.enable()
    torch.set_num_threads(2)
    for name in dtypes:
        for sizes, top_k in SHAPES:
            for at_end in (True, False):
                for guard in (guarded, guarded_every_second):
                    print(name, sizes, top_k, "end" if at_end else "start", guard.__name__, flush=True)
                    run(wing, getattr(torch, name), sizes, top_k, at_end, guard)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
