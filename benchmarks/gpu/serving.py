"""The GPU benchmarks of serving: packed prompts, and steps over caches in pages, against torch's varlen_attn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks.gpu.timing import Contender, Device, compare

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
Leaves = tuple[Tensor, ...]  # query, key, value


def as_the_reference(call: Callable[[str], Tensor]) -> Callable[[Callable[..., Tensor]], None]:
    """`call(backend)` of a part that plain PyTorch can do."""

    def check(_forward: Callable[..., Tensor]) -> None:
        found, want = (call(backend).float() for backend in ("triton", "reference"))
        torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)

    return check


def bounds(lengths: list[int], device: Device) -> Tensor:  # int32 [S + 1]
    return torch.tensor([0, *lengths], device=device.name).cumsum(0).int()


def tensors(device: Device, query: tuple[int, ...], key: tuple[int, ...]) -> Leaves:
    """query, key and value, bfloat16."""
    generator = torch.Generator(device.name).manual_seed(0)
    shapes = query, key, key
    return tuple(torch.randn(s, device=device.name, generator=generator).bfloat16() for s in shapes)


def varlen(where: tuple, **options) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    return lambda *qkv: varlen_attn(*qkv, *where, window_size=(-1, 0), enable_gqa=True, **options)


def packed_prompts(device: Device) -> Iterator[dict]:
    """Documents of Zipf lengths end to end."""
    count, total, sizes = (3, 20, (2, 1, 16)) if device.dry else (64, 32768, (HEADS, KV_HEADS, DIM))
    heads, kv_heads, dim = sizes
    weight = [1 / (n + 1) for n in range(count)]
    lengths = [max(1, int(total * w / sum(weight))) for w in weight]
    inputs = tensors(device, (sum(lengths), heads, dim), (sum(lengths), kv_heads, dim))
    few = lengths[-2:]  # the shortest two, for the check
    for top_k in (4,) if device.dry else (64, 256):

        def call(documents: list[int], qkv: Leaves, backend: str, top_k: int = top_k) -> Tensor:
            where = bounds(documents, device), None, max(documents), max(documents)
            return sparse_attn.varlen_topk_attention(*qkv, *where, top_k, is_causal=True, backend=backend)

        some = tuple(t[: sum(few)] for t in inputs)
        check = as_the_reference(partial(call, few, some))
        ours = Contender(lambda call=call: lambda *qkv: call(lengths, qkv, "triton"), inputs, check)
        contenders = {"ours": ours}
        if not device.dry:
            where = bounds(lengths, device), bounds(lengths, device), max(lengths), max(lengths)
            contenders["varlen_attn"] = Contender(partial(varlen, where), inputs)
        case = f"packed H{heads}/{kv_heads} D{dim} {count} documents, {sum(lengths)} tokens K{top_k}"
        yield from compare("serving", case, contenders, device, ("forward", "both"))


def step(device: Device, count: int, used: int, queries: int, share: str) -> Iterator[dict]:
    """One token each of some sequences, or a draft of some; their caches in pages, shuffled."""
    heads, kv_heads, dim, page = (4, 2, 16, 16) if device.dry else (HEADS, KV_HEADS, DIM, PAGE)
    top_k, pages = 4 if device.dry else 256, count * used // page
    inputs = tensors(device, (count * queries, heads, dim), (pages, page, kv_heads, dim))
    table = torch.randperm(pages, device=device.name).int().view(count, -1)
    lengths = torch.full((count,), used, device=device.name, dtype=torch.int32)

    def call(sequences: int, qkv: Leaves, backend: str) -> Tensor:
        where = bounds([queries] * sequences, device), None, queries, used
        held = {"seqused_k": lengths[:sequences], "block_table": table[:sequences]}
        return sparse_attn.varlen_topk_attention(
            *qkv, *where, top_k, is_causal=True, share=share, backend=backend, **held
        )

    one = inputs[0][:queries], *inputs[1:]
    check = as_the_reference(partial(call, 1, one))
    contenders = {"ours": Contender(lambda: lambda *qkv: call(count, qkv, "triton"), inputs, check)}
    if not device.dry and share == "none":
        where = bounds([queries] * count, device), None, queries, used
        held = {"seqused_k": lengths, "block_table": table}
        contenders["varlen_attn"] = Contender(partial(varlen, where, **held), inputs)
        contenders["sdpa_end_to_end"] = Contender(partial(end_to_end, count, queries, used), inputs)
    case = f"{queries} of each of {count}, {used} keys in pages of {page}"
    case += f" H{heads}/{kv_heads} K{top_k} share {share}"
    yield from compare("serving", case, contenders, device)


def end_to_end(count: int, queries: int, used: int) -> Callable[..., Tensor]:
    """Dense attention to the same cache as if it were no pages: rows of each sequence side by side."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.unflatten(0, (count, queries)).transpose(1, 2)
        k, v = (t.flatten(0, 1).unflatten(0, (count, used)).transpose(1, 2) for t in (key, value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def with_index(device: Device, used: int, dtype: torch.dtype) -> Iterator[dict]:
    """One token beside one cache, with 8-bit keys beside it and without: the same bits."""
    heads, kv_heads, dim, top_k = (2, 1, 16, 4) if device.dry else (HEADS, KV_HEADS, DIM, 256)
    inputs = tuple(t.to(dtype) for t in tensors(device, (1, heads, 1, dim), (1, kv_heads, used, dim)))
    index = sparse_attn.KeyIndex.of(inputs[1])

    def call(*qkv: Tensor, key_index: sparse_attn.KeyIndex | None = index) -> Tensor:
        return sparse_attn.topk_attention(*qkv, top_k, key_index=key_index, backend="triton")

    def check(forward: Callable[..., Tensor]) -> None:
        assert torch.equal(forward(*inputs), call(*inputs, key_index=None))

    contenders = {
        "ours": Contender(lambda: call, inputs, check),
        "ours_without_index": Contender(lambda: partial(call, key_index=None), inputs),
    }
    if not device.dry:
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
        contenders["sdpa"] = Contender(lambda: sdpa, inputs)
    kind = str(dtype).removeprefix("torch.")
    yield from compare(
        "serving", f"key index, {used} keys {kind} H{heads}/{kv_heads} K{top_k}", contenders, device
    )


def serving(device: Device) -> Iterator[dict]:
    shapes = ((2, 32, 1),) if device.dry else ((1, 131072, 1), (16, 8192, 1), (16, 8192, 4), (64, 8192, 1))
    with torch.no_grad():
        for shape in shapes:
            for share in ("none", "kv"):
                yield from step(device, *shape, share)
        for dtype in (torch.bfloat16,) if device.dry else (torch.bfloat16, torch.float32):
            yield from with_index(device, 160 if device.dry else 131072, dtype)
    yield from packed_prompts(device)
