"""`block_attention`: attention of tiles of queries to whole blocks of keys, with gradients."""

from __future__ import annotations

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.gathered_attention import fake as fake_attention
from sparse_attn.ops.registry import define, differentiate
from sparse_attn.wings.base import choose, overload

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor? key_lengths, SymInt block_size, "
    "SymInt query_tile, bool is_causal, SymInt causal_offset, float scale"
)


def fake(query, key, value, blocks, *options) -> tuple[Tensor, Tensor]:
    return fake_attention(query, key, value, blocks, 1.0)


def fake_backward(grad_out, grad_lse, lse, query, key, value, *options):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


define("block_attention", f"({_PROBLEM}) -> (Tensor out, Tensor lse)", fake)
define(
    "block_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor lse, {_PROBLEM}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.options = inputs[5:]
    ctx.shape = output[0].shape
    ctx.set_materialize_grads(False)


def _backward_of(wing: str):
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = saved[1].new_zeros(ctx.shape)
        grads = overload("block_attention_backward", wing)(grad_out, grad_lse, *saved, *ctx.options)
        return *grads, *(None,) * 7

    return backward


differentiate("block_attention", _setup_context, _backward_of)


def block_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    blocks: Tensor,  # int32 [B, G, N, M]
    *,
    block_size: int = 64,
    query_tile: int = 64,
    is_causal: bool = False,
    causal_offset: int | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each tile of queries to the blocks of keys that it chose, in matrix products.

    Queries n·query_tile … (n+1)·query_tile − 1 are tile n; block m holds the keys m·block_size …
    (m+1)·block_size − 1. A query attends to the keys of its tile's blocks that it sees:

    .. math:: S_i = \{ j : \lfloor j / \mathrm{block} \rfloor \in \mathrm{blocks}_{\lfloor i / \mathrm{tile} \rfloor},
              j \text{ visible to } i \}, \qquad
              \mathrm{out}_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j

    The cost is M·block_size keys per query, however long the context. Differentiable in query, key and value; the
    gradient is the same for any number of threads.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv.
        value: [B, Hkv, Tk, Dv]; Dv may differ from D.
        blocks: int32 (or int64) [B, G, N, M], G one of 1, Hkv, Hq, N = ⌈Tq / query_tile⌉: such as
            :func:`block_select` gives. A number < 0 or past the last block is an empty slot; one given twice
            counts twice.
        block_size: keys per block.
        query_tile: queries that share a row of `blocks`.
        is_causal, causal_offset, key_lengths: as in :func:`topk_select`.
        scale: factor of q·k, default 1/√D.
        return_lse: also return the log-sum-exp of the attended scores (differentiable).
        backend: force one wing; None chooses.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with return_lse (out, lse float32 [B, Hq, Tq]). A query that sees
        no key has out 0, lse −inf and gradient 0.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: blocks chosen by mean keys, for attention in whole blocks, are Lu et al., "MoBA: Mixture of Block
    Attention for Long-Context LLMs" (2025) and Yuan et al., "Native Sparse Attention" (2025).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
        >>> blocks = sparse_attn.block_select(q, k, 4, is_causal=True)
        >>> sparse_attn.block_attention(q, k, v, blocks, is_causal=True).shape
        torch.Size([1, 2, 512, 16])
    """
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    blocks = checks.blocks_of(blocks, query, key, query_tile)
    is_causal = checks.boolean("is_causal", is_causal)
    return_lse = checks.boolean("return_lse", return_lse)
    options = (
        checks.lengths_of(key_lengths, key),
        block_size,
        query_tile,
        is_causal,
        checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2]),
        checks.softmax_scale(scale, query.shape[3]),
    )
    wing = choose("block_attention", query, backend, **sizes_of(query, value))
    out, lse = overload("block_attention", wing)(query, key, value, blocks, *options)
    return (out, lse) if return_lse else out
