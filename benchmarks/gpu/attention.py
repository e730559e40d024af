"""The GPU benchmarks of the attention ops: against SDPA, FlexAttention and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_attn
from benchmarks.gpu.timing import Contender, Device, compare, wings_of
from sparse_attn.bench import correctness
from sparse_attn.bench.attention import AttentionCase
from sparse_attn.bench.contenders import causal_blocks
from sparse_attn.bench.registry import Work

SCORE = 2**-10  # of a selected score: float32 sums of exact products


def tensors(device: Device, heads: int, kv_heads: int, length: int, dim: int, seed: int = 0) -> list[Tensor]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D], bfloat16."""
    generator = torch.Generator(device.name).manual_seed(seed)
    shapes = [(1, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, device=device.name, generator=generator).bfloat16() for s in shapes]


def described(query: Tensor, key: Tensor, direction: str = "forward") -> AttentionCase:
    """The registry's words for these tensors: what its checks take."""
    return AttentionCase(
        "topk_attention",
        key.shape[2],
        str(query.dtype).removeprefix("torch."),
        direction,
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
    )


# ---- what is right --------------------------------------------------------------------------------------------


def check_attention(
    inputs: list[Tensor], indices: Tensor | None, gradients: bool, forward: Callable[..., Tensor]
) -> None:
    """Sampled outputs, and the gradients of a loss of those alone, against float64."""
    case = described(*inputs[:2], "both" if gradients else "forward")
    correctness.check_attention("it", case, Work(forward, tuple(inputs)), indices)


def check_selection(query: Tensor, key: Tensor, select: Callable[..., Tensor], *_leaves) -> None:
    """The selected scores of sampled queries are the largest visible ones."""
    indices = select(query, key)
    correctness.check_selection("it", described(query, key), indices, (query, key), SCORE)


def check_topk(inputs: list[Tensor], top_k: int, forward: Callable[..., Tensor], *, wing: str) -> None:
    options = {"is_causal": True, "return_indices": True, "backend": wing}
    check_selection(
        *inputs[:2], lambda q, k: sparse_attn.topk_attention(q, k, inputs[2], top_k, **options)[1]
    )
    indices = sparse_attn.topk_attention(*inputs, top_k, **options)[1]
    check_attention(inputs, indices, False, forward)


# ---- what a user would pick instead ---------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )

    return attend


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(device: Device, length: int) -> Callable[..., Tensor]:
    """Dense causal FlexAttention: a mask of the top-k keys of each query is no mask of blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = causal_blocks(length, length, device.name)
    run = flex_attention if device.dry else _flex()
    return lambda query, key, value: run(
        query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1]
    )


def plain_select(query: Tensor, key: Tensor, top_k: int, chunk: int = 1024) -> Tensor:
    """matmul + torch.topk, in chunks of queries so that it fits: int64 [1, Hq, T, K], hidden keys −1."""
    found = []
    place = torch.arange(key.shape[2], device=key.device)
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT
    for first in range(0, query.shape[2], chunk):
        rows = place[first : first + chunk].unsqueeze(1)
        scores = (query[:, :, first : first + chunk] @ keys).masked_fill(place > rows, -torch.inf)
        best, index = scores.topk(min(top_k, key.shape[2]), dim=-1)
        found.append(index.masked_fill(best == -torch.inf, -1))
    return torch.cat(found, dim=2)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, top_k: int, chunk: int = 256) -> Tensor:
    """Select, gather and attend in plain PyTorch, in chunks of queries."""
    found = []
    heads = torch.arange(query.shape[1], device=query.device).view(-1, 1, 1)
    keys, values = (t[0].repeat_interleave(query.shape[1] // t.shape[1], dim=0) for t in (key, value))
    indices = plain_select(query, key, top_k)[0]
    for first in range(0, query.shape[2], chunk):
        index = indices[:, first : first + chunk]
        rows = heads, index.clamp(min=0)
        scores = torch.einsum("hqd,hqkd->hqk", query[0, :, first : first + chunk], keys[rows])
        scores = (scores * query.shape[3] ** -0.5).masked_fill(index < 0, -torch.inf)
        found.append(torch.einsum("hqk,hqkd->hqd", scores.softmax(-1), values[rows]))
    return torch.cat(found, dim=1).unsqueeze(0)


# ---- sections ---------------------------------------------------------------------------------------------------


def dense(device: Device, inputs: list[Tensor], gradients: bool) -> dict[str, Contender]:
    """SDPA and FlexAttention over all visible keys."""
    leaves, check = tuple(inputs), partial(check_attention, inputs, None, gradients)
    kernels = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
    if device.dry:
        kernels = {"sdpa_math": SDPBackend.MATH}
    found = {name: Contender(partial(sdpa, backend), leaves, check) for name, backend in kernels.items()}
    if device.dry and inputs[0].shape[1] != 2:
        return found  # compiled on a CPU FlexAttention has no backward, and as it is it takes its time: once will do
    found["flex_dense"] = Contender(partial(flex, device, inputs[0].shape[2]), leaves, check)
    return found


def topk_attention(device: Device) -> Iterator[dict]:
    heads, length, dim = (2, 12, 16) if device.dry else (16, 16384, 128)
    for top_k in (4,) if device.dry else (64, 128, 256, 512):
        inputs = tensors(device, heads, heads, length, dim)

        wings = wings_of("topk_attention", device)

        def ours(query, key, value, wing=wings["ours"], top_k=top_k, share="none"):
            return sparse_attn.topk_attention(
                query, key, value, top_k, is_causal=True, share=share, backend=wing
            )

        def plain(query, key, value, top_k=top_k):
            return plain_attention(query, key, value, top_k)

        contenders = {
            **{
                name: Contender(
                    lambda ours=ours, wing=wing: partial(ours, wing=wing),
                    tuple(inputs),
                    partial(check_topk, inputs, top_k, wing=wing),
                )
                for name, wing in wings.items()
            },
            "ours_share_all": Contender(lambda ours=ours: partial(ours, share="all"), tuple(inputs)),
            **dense(device, inputs, False),
            "plain_topk_gather": Contender(lambda plain=plain: plain, tuple(inputs)),
        }
        yield from compare("topk_attention", f"H{heads} D{dim} T{length} K{top_k}", contenders, device)


def topk_select(device: Device) -> Iterator[dict]:
    heads, length, dim = (2, 12, 16) if device.dry else (16, 16384, 128)
    query, key, _ = tensors(device, heads, heads, length, dim)
    for top_k in (4,) if device.dry else (64, 128, 256, 512):
        ours = {
            name: partial(sparse_attn.topk_select, top_k=top_k, is_causal=True, backend=wing)
            for name, wing in wings_of("topk_select", device).items()
        }
        plain = partial(plain_select, top_k=top_k)
        contenders = {
            name: Contender(lambda run=run: run, (query, key), partial(check_selection, query, key))
            for name, run in {**ours, "plain_matmul_topk": plain}.items()
        }
        if not device.dry:  # plain PyTorch rounds its scores to bfloat16 before it chooses
            contenders["plain_matmul_topk"].check = None
        yield from compare("topk_select", f"H{heads} D{dim} T{length} K{top_k}", contenders, device)


def selections(device: Device, length: int, top_k: int, pattern: str, chunk: int = 1024) -> Tensor:
    """int32 [1, 1, T, K], causal: keys anywhere, or in runs of 32 neighbours as real heads have them."""
    generator = torch.Generator(device.name).manual_seed(3)
    run = 1 if pattern == "random" else min(32, top_k)
    found = []
    for first in range(0, length, chunk):
        rows = torch.arange(first, min(first + chunk, length), device=device.name).unsqueeze(1)
        blocks = torch.arange(0, length, run, device=device.name)
        draw = torch.rand(len(rows), len(blocks), device=device.name, generator=generator)
        draw = draw.masked_fill(blocks > rows, -1.0)
        best, block = draw.topk(min(top_k // run, len(blocks)), dim=-1)
        index = (block * run).unsqueeze(-1) + torch.arange(run, device=device.name)
        seen = (best >= 0).unsqueeze(-1) & (index <= rows.unsqueeze(-1))
        index = index.masked_fill(~seen, length).flatten(1).sort(-1).values
        found.append(index.masked_fill(index == length, -1).int())
    return torch.cat(found).view(1, 1, length, -1)


def gathered_attention(device: Device) -> Iterator[dict]:
    few = (4, 7, 16, 5) if device.dry else (16, 32768, 128, 512)
    many = (8, 7, 16, 5) if device.dry else (64, 16384, 128, 2048)
    for (heads, length, dim, top_k), kv_heads, pattern in (
        (few, 1, "random"),
        (few, 1, "runs"),
        (few, few[0], "random"),
        (many, 1, "random"),
    ):
        inputs = tensors(device, heads, kv_heads, length, dim)
        indices = selections(device, length, top_k, pattern)

        def ours(query, key, value, wing, indices=indices):
            return sparse_attn.gathered_attention(query, key, value, indices, backend=wing)

        check = partial(check_attention, inputs, indices, True)
        ours_of = {
            name: Contender(lambda ours=ours, wing=wing: partial(ours, wing=wing), tuple(inputs), check)
            for name, wing in wings_of("gathered_attention", device).items()
        }
        contenders = {**ours_of, **dense(device, inputs, False)}
        case = f"H{heads}/{kv_heads} D{dim} T{length} K{top_k} {pattern}"
        directions = ("forward", "backward", "both")
        products = heads * dim * int((indices >= 0).sum())  # of one product, in multiply-adds
        for row in compare("gathered_attention", case, contenders, device, directions):
            if row.get("ms") and row["contender"] in ours_of:
                count = {"forward": 2, "backward": 5, "both": 7}[row["direction"]]
                row["teraflops"] = 2 * count * products / row["ms"] / 1e9
            yield row


def block_attention(device: Device) -> Iterator[dict]:
    """Attention to whole blocks, and to a selection with a tail: the means of blocks, or one of all the others."""
    heads, kv_heads, length, dim, top_k = (2, 1, 66, 16, 4) if device.dry else (16, 4, 16384, 128, 64)
    slots = 2 if device.dry else 16
    inputs = tensors(device, heads, kv_heads, length, dim)
    wing = {"backend": wings_of("block_attention", device)["ours"]}
    blocks = sparse_attn.block_select(*inputs[:2], slots, is_causal=True, share="kv", **wing)

    def in_blocks(*qkv: Tensor) -> Tensor:
        return sparse_attn.block_attention(*qkv, blocks, is_causal=True, **wing)

    def with_tail(*qkv: Tensor, tail: str) -> Tensor:
        return sparse_attn.topk_attention(*qkv, top_k, is_causal=True, tail=tail, **wing)

    def as_the_reference(call: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], None]:
        def check(forward: Callable[..., Tensor]) -> None:
            some = [t[:, :, :256] for t in inputs]
            chosen = blocks[:, :, : -(-some[0].shape[2] // 64)]
            found = [call(some, chosen, backend).float() for backend in (wing["backend"], "reference")]
            torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)

        return check

    checks = {
        "whole": lambda qkv, chosen, backend: sparse_attn.block_attention(
            *qkv, chosen, is_causal=True, backend=backend
        ),
        **{
            tail: lambda qkv, chosen, backend, tail=tail: sparse_attn.topk_attention(
                *qkv, top_k, is_causal=True, tail=tail, backend=backend
            )
            for tail in ("mean", "blocks")
        },
    }
    case = f"H{heads}/{kv_heads} D{dim} T{length}"
    for name, call, what in (
        ("whole", in_blocks, f"{slots} blocks of 64"),
        ("blocks", partial(with_tail, tail="blocks"), f"K{top_k} with means of blocks"),
        ("mean", partial(with_tail, tail="mean"), f"K{top_k} with the mean of the others"),
    ):
        ours = Contender(lambda call=call: call, tuple(inputs), as_the_reference(checks[name]))
        contenders = {"ours": ours, **({} if device.dry else dense(device, inputs, False))}
        yield from compare("block_attention", f"{case} {what}", contenders, device, ("forward", "both"))


def cheap_selection(device: Device) -> Iterator[dict]:
    """By an indexer, by rounded rows and among blocks: what chooses keys for less than exact products."""
    heads, length, dim, top_k = (1, 66, 16, 4) if device.dry else (16, 16384, 128, 256)
    query, key, _ = tensors(device, heads, heads, length, dim)
    small = tensors(device, 4 * heads, 1, length, 16 if device.dry else 64, seed=1)[:2]
    weights = torch.ones(1, 4 * heads, length, device=device.name)
    wing = {"is_causal": True, "backend": wings_of("indexer_select", device)["ours"]}
    blocks = sparse_attn.block_select(query, key, 2 if device.dry else 16, **wing)
    calls = {
        "indexer": lambda q, k: sparse_attn.indexer_select(*small, weights, top_k, **wing),
        "indexer, 8 bits": lambda q, k: sparse_attn.indexer_select(*small, weights, top_k, int8=True, **wing),
        "rounded": lambda q, k: sparse_attn.quantized_select(q, k, top_k, **wing),
        "refined blocks": lambda q, k: sparse_attn.refine_blocks(q, k, blocks, top_k, **wing),
    }
    plain = partial(plain_select, top_k=top_k)
    for name, call in calls.items():
        contenders = {"ours": Contender(lambda call=call: call, (query, key))}
        if name == "indexer" and not device.dry:
            contenders["plain_matmul_topk"] = Contender(lambda: plain, (query, key))
        yield from compare("cheap_selection", f"{name} T{length} K{top_k}", contenders, device)


def memory(device: Device) -> Iterator[dict]:
    """What topk_attention allocates, forward and backward, beside one [Tq, Tk] matrix of one head in bfloat16."""
    heads, length, dim, top_k = (2, 12, 16, 4) if device.dry else (8, 32768, 64, 64)
    inputs = [t.requires_grad_() for t in tensors(device, heads, heads, length, dim)]
    options = {"is_causal": True, "backend": wings_of("topk_attention", device)["ours"]}

    def forward() -> Tensor:
        with torch.no_grad():
            return sparse_attn.topk_attention(*inputs, top_k, **options)

    def both() -> object:
        out = sparse_attn.topk_attention(*inputs, top_k, **options)
        return torch.autograd.grad(out.sum(), inputs)

    matrix = 2 * length * length
    row = {"section": "memory", "case": f"H{heads} D{dim} T{length} K{top_k}", "contender": "ours"}
    for direction, call in (("forward", forward), ("both", both)):
        peak = device.peak_bytes(call)
        verdict = None if peak is None else peak < matrix
        yield {
            **row, "direction": direction, "peak_bytes": peak, "one_matrix_bytes": matrix,
            "all_matrices_bytes": heads * matrix, "no_matrix": verdict,
        }  # fmt: skip
