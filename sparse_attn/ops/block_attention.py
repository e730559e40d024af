"""`block_attention`: attention of tiles of queries to whole blocks of keys, with gradients."""

from __future__ import annotations

from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops import gathered_attention
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import PackedRule, Rule
from sparse_attn.wings.reference.block_attention import along

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor blocks"
_SIZES = f"SymInt block_size, SymInt query_tile, {rules.SCHEMA}"


def fake(query, key, value, blocks, *options) -> tuple[Tensor, Tensor]:
    return gathered_attention.fake(query, key, value)


BACKWARD = Op(
    "block_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_SIZES}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    gathered_attention.fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value blocks out lse grad_query grad_key grad_value",
)


def backward(call: Backward) -> dict[str, Tensor]:
    s, grad_out = call.saved, call.grads.out
    if grad_out is None:
        grad_out = s.query.new_zeros((*s.query.shape[:3], s.value.shape[3]))
    found = BACKWARD.on(call.wing)(
        grad_out, call.grads.lse, s.query, s.key, s.value, s.blocks, s.out, s.lse, s.block_size,
        s.query_tile, s.attn_mask, s.key_lengths, s.key_starts, s.causal_offsets, s.rule, s.scale, s.softcap,
        s.sink_logits,
    )  # fmt: skip
    of_sinks = {}
    if call.needs["sink_logits"]:
        of_sinks["sink_logits"] = gathered_attention.sink_gradient(
            s.sink_logits, s.out, s.lse, grad_out, call.grads.lse
        )
    return dict(zip(("query", "key", "value"), found, strict=True)) | of_sinks


def tangent(
    call: Forward, query, key, value, blocks, block_size, query_tile, rule: PackedRule
) -> dict[str, Tensor]:
    out, lse = along(query, key, value, blocks, block_size, query_tile, rule, call.tangents)
    return {"out": out, "lse": lse}


OP = Op(
    "block_attention",
    f"({_INPUTS}, {_SIZES}) -> (Tensor out, Tensor lse)",
    fake,
    saved="query key value blocks out lse block_size query_tile attn_mask key_lengths key_starts "
    "causal_offsets rule scale softcap sink_logits",
    backward=backward,
    tangent=tangent,
    batch="query key value blocks out lse",
)


@shardable("query:BHTD key:BHSD value:BHSD blocks:BGNM rule", "BHTD BHT")
def attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    blocks: Tensor,  # int32 [B, G, N, M]
    block_size: int,
    query_tile: int,
    rule: Rule,
    *,
    backend: str | None = None,
    function: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]); of the rule, causality, lengths, starts and what scores are."""
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    blocks = checks.blocks_of(blocks, query, key, query_tile)
    packed = rule.packed(query, key)._replace(groups=blocks.shape[1])
    known = "is_causal", "causal_offset", "key_lengths", "key_starts", "scale", "softcap", "sink_logits"
    rule.only("whole blocks", *known, rules.OFFSETS)
    wing = OP.choose(query, backend, rule=rule, function=function, sizes=sizes_of(query, value))
    return OP.on(wing)(query, key, value, blocks, block_size, query_tile, *packed.parts())


def block_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    blocks: Tensor,  # int32 [B, G, N, M]
    *,
    block_size: int = 64,
    query_tile: int = 64,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
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
        is_causal, causal_offset, key_lengths, key_starts: as in :func:`topk_select`.
        scale: factor of q·k, default 1/√D.
        return_lse: also return the log-sum-exp of the attended scores (differentiable).
        softcap, sink_logits: as in :func:`gathered_attention`.
        backend: force one wing; None chooses.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with return_lse (out, lse float32 [B, Hq, Tq]). A query that sees
        no key has out 0, lse −inf (with sink_logits the head's sink) and gradient 0.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for (docs/torch_func.md says what is there).

    Source: blocks chosen by mean keys, for attention in whole blocks, are Lu et al., "MoBA: Mixture of Block
    Attention for Long-Context LLMs" (2025) and Yuan et al., "Native Sparse Attention" (2025).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
        >>> blocks = sparse_attn.block_select(q, k, 4, is_causal=True)
        >>> sparse_attn.block_attention(q, k, v, blocks, is_causal=True).shape
        torch.Size([1, 2, 512, 16])
    """
    return_lse = checks.boolean("return_lse", return_lse)
    rule = Rule(
        is_causal, causal_offset, key_lengths=key_lengths, scale=scale, softcap=softcap, sink_logits=sink_logits,
        key_starts=key_starts,
    )  # fmt: skip
    out, lse = attend(query, key, value, blocks, block_size, query_tile, rule, backend=backend)
    return (out, lse) if return_lse else out
