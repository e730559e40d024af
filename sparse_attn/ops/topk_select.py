"""`topk_select`: for each query the keys of the largest scores, as indices.

One op with two options: scores of rounded queries and keys (`quantized_select`), and the keys of some blocks alone
(`refine_blocks`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops import key_index as key_indices
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Op
from sparse_attn.ops.key_index import KeyIndex
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import PackedRule, Rule, selection_shape


def fake(query, key, top_k, rule: PackedRule, *options) -> Tensor:
    return query.new_empty(selection_shape(query, key, top_k, rule), dtype=torch.int32)


OP = Op(
    "topk_select",
    f"(Tensor query, Tensor key, SymInt top_k, {rules.SCHEMA}, bool rounded, Tensor? blocks, SymInt block_size, "
    "SymInt query_tile) -> Tensor",
    fake,
    batch="query key blocks out",
)


class Among(NamedTuple):
    """Blocks of keys, one row of them for each tile of queries: the only keys that may be chosen."""

    blocks: Tensor  # int [B, G, N, M]
    block_size: int
    query_tile: int


@shardable("query:BHTD key:BHSD rule among", "BGTK")
def select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: Rule,
    *,
    rounded: bool = False,
    among: Among | None = None,
    key_index: KeyIndex | None = None,
    backend: str | None = None,
    function: str = "topk_select",
) -> Tensor:  # int32 [B, G, Tq, K]
    """What the three public functions do; `function` is the name by which errors call it."""
    query, key = autocast(query, key)
    checks.query_key(query, key)
    sizes = sizes_of(query)
    if rounded:
        sizes["rounded_scores"] = 1
    if among is not None:
        sizes["blocks"] = 1
        block_size = checks.integer("block_size", among.block_size, 1)
        query_tile = checks.integer("query_tile", among.query_tile, 1)
        blocks = checks.blocks_of(among.blocks, query, key, query_tile)
    top_k = checks.top_k_of(top_k)
    packed = rule.packed(query, key, top_k)
    index = key_index if key_indices.serves(key_index, query, key, packed) else None
    if index is not None:
        sizes["key_index"] = 1
    options: tuple[bool, Tensor | None, int, int] = (rounded, None, 1, 1)
    if among is not None:
        blocks = _of_groups(blocks, -(-key.shape[2] // block_size), packed.groups, rule.share)
        options = (rounded, blocks, block_size, query_tile)
    wing = OP.choose(query, backend, rule=rule, function=function, sizes=sizes)
    if index is not None and key_indices.OP.has(wing):
        return key_indices.OP.on(wing)(query, key, top_k, *packed.parts(), *index.tensors())
    return OP.on(wing)(query, key, top_k, *packed.parts(), *options)


def _of_groups(blocks: Tensor, count: int, groups: int, share: str) -> Tensor:
    """blocks [B, G', N, M] → [B, G, N, M], ascending, each once, −1 last."""
    if groups % blocks.shape[1]:
        raise ValueError(
            f"share={share!r} makes {groups} selections, got {blocks.shape[1]} rows of blocks for them"
        )
    blocks = ascending(torch.where(blocks < count, blocks, -1))
    blocks = torch.where(pad(blocks[..., 1:] == blocks[..., :-1], (1, 0)), -1, blocks)
    return blocks.repeat_interleave(groups // blocks.shape[1], dim=1)


def ascending(numbers: Tensor) -> Tensor:
    """Rows sorted, −1 last."""
    top = torch.iinfo(numbers.dtype).max
    numbers = torch.where(numbers < 0, top, numbers).sort(-1).values
    return torch.where(numbers == top, -1, numbers)


def topk_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    key_index: KeyIndex | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Selects for each query the `top_k` keys of the largest :math:`q \cdot k`, exactly, without a [Tq, Tk] matrix.

    With ``share="kv"`` or ``"all"`` the query heads that share get one selection: a key's rank is its attention
    mass, the softmax probability over all visible keys summed over the sharing heads,
    :math:`\sum_h \exp(s_{hj} - \mathrm{LSE}_h)`. Nothing is differentiated.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv (GQA, MQA).
        top_k: keys per query, the whole budget (window and sinks count toward it), at least 1.
        is_causal: query i sees keys 0 … i + causal_offset.
        causal_offset: offset of the diagonal; must be given when Tq ≠ Tk (Tk − Tq: the queries are the last). A tensor,
            int32 or int64 [B] or [B, Tq], gives each sequence, or query, its own.
        attn_mask: boolean, True = may attend, broadcastable to [B, Hq, Tq, Tk]; the same for heads that share.
        key_lengths: int32 or int64 [B]; keys at and past it do not exist.
        scale: factor of q·k, default 1/√D.
        window: always keep the last `window` visible positions up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        key_starts: int32 or int64 [B] or [B, Tq]; keys before it do not exist for that sequence, or that query, and
            `sinks` counts from there. Indices stay what they are. Values below 0 count as 0; Tk hides every key.
        softcap, sink_logits: those of the attention, as in :func:`gathered_attention`. Where heads share, their
            probabilities are of capped scores, with the sink in the denominator; a selection per head is by the
            uncapped q·k, bit for bit what it is without them (the cap is monotone).
        key_index: the :class:`sparse_attn.KeyIndex` of these keys: the same result, in decoding for fewer bytes.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        int32 [B, G, Tq, min(top_k, Tk)], G = Hq, Hkv or 1 by `share`: unique, ascending, empty slots −1 at the
        end. Ties go to the smaller key index. A query with fewer visible keys than top_k keeps them all.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Sources: exact top-k attention is Gupta et al., "Memory-efficient Transformers via Top-k Attention" (2021);
    always-kept first keys ("sinks") are Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (2023).

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(1, 8, 128, 64), torch.randn(1, 2, 128, 64)
        >>> sparse_attn.topk_select(q, k, 16, is_causal=True, share="kv").shape
        torch.Size([1, 2, 128, 16])
    """
    scoring = scale, softcap, sink_logits
    rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, window, sinks, share, *scoring, key_starts)
    return select(query, key, top_k, rule, key_index=key_index, backend=backend)


def quantized_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:
    r"""Selects as :func:`topk_select` does, by scores of queries and keys that are rounded to 8 bits.

    Each row x of `query` and of `key` becomes whole numbers times its scale:

    .. math:: s = \max_d |x_d| / 127, \qquad \hat x_d = s \cdot \mathrm{round}(x_d / s)

    and keys are ranked by :math:`\hat q \cdot \hat k`. Nothing has to be trained or fitted. On CPUs that multiply
    bytes (AVX-512 VNNI) the scores cost a quarter of float32's; elsewhere they cost the same.

    Args and Returns: those of :func:`topk_select`. A row that holds NaN or an infinity has only NaN scores, which
    rank first.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: row-wise ("vector-wise") scales are Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale" (2022).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> indices = sparse_attn.quantized_select(q, k, 8, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 2, 64, 16])
    """
    scoring = scale, softcap, sink_logits
    rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, window, sinks, share, *scoring, key_starts)
    return select(query, key, top_k, rule, rounded=True, backend=backend, function="quantized_select")


def refine_blocks(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    blocks: Tensor,  # int32 [B, G, N, M]
    top_k: int,
    *,
    block_size: int = 64,
    query_tile: int = 64,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:
    """Selects for each query the `top_k` best keys by q·k among those of its tile's blocks: indices of tokens.

    It is :func:`topk_select` under a mask of the blocks, without the mask: heads that share a selection rank keys by
    their mass among these keys. Nothing is differentiated. The CPU wing scores these keys alone.

    Args:
        query, key, top_k, is_causal, causal_offset, key_lengths, scale, share, key_starts, softcap, sink_logits,
            backend: as in :func:`topk_select`.
            :func:`topk_select`.
        blocks, block_size, query_tile: what :func:`block_select` gave, and what it was given. Its G must divide the
            number of selections that `share` asks for. Numbers out of range are empty slots.
        window, sinks: always kept, in the blocks or not.

    Returns:
        int32 [B, G', Tq, min(top_k, Tk)], G' by `share`, for :func:`gathered_attention`: unique, ascending, empty slots
        −1 at the end. Ties go to the smaller key index.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
        >>> blocks = sparse_attn.block_select(q, k, 4, is_causal=True)
        >>> indices = sparse_attn.refine_blocks(q, k, blocks, 32, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 2, 512, 16])
    """
    scoring = scale, softcap, sink_logits
    rule = Rule(is_causal, causal_offset, None, key_lengths, window, sinks, share, *scoring, key_starts)
    among = Among(blocks, block_size, query_tile)
    return select(query, key, top_k, rule, among=among, backend=backend, function="refine_blocks")
