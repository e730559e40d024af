"""Attention to what a selector chose."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops import block_attention, gathered_attention
from sparse_attn.ops import tail as tails
from sparse_attn.rule import Rule
from sparse_attn.selection.selection import Selection, Selector, check_rule, check_selector


def attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    selection: Selection,
    *,
    rule: Rule | None = None,
    scale: float | None = None,
    tail: str = "none",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each query to the keys of a selection, differentiable in query, key and value.

    With S_i the selected keys of query i (of whole blocks those that the rule lets it see):

    .. math:: \mathrm{out}_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv.
        value: [B, Hkv, Tk, Dv]; Dv may differ from D.
        selection: what a selector returned: tokens, or blocks of keys.
        rule: who sees whom; needed for blocks (a block's keys are not all visible) and for a tail. Selected tokens
            are attended to as they are; of its parts the scale, the soft cap and the sink logits count for them.
        scale: factor of q·k; None takes the rule's, and without one 1/√D.
        tail: "none", "mean" or "blocks", as in :func:`sparse_attn.topk_attention`: what becomes of the visible keys
            that were not selected (tokens only). With "mean" of the selection count keys that the rule lets the query
            see, each once.
        return_lse: also return the log-sum-exp of the attended scores, float32 [B, Hq, Tq] (differentiable); with
            a tail of what it adds, too.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with return_lse (out, lse).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: a second derivative is asked for in reverse mode.

    Example:
        >>> import torch
        >>> from sparse_attn.selection import Blocks, Rule, attend
        >>> q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
        >>> rule = Rule(is_causal=True)
        >>> attend(q, k, v, Blocks().select(q, k, 256, rule), rule=rule).shape
        torch.Size([1, 2, 512, 16])
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a sparse_attn.selection.Selection, got {checks.describe(selection)}"
        )
    tail = checks.tail_of(tail)
    return_lse = checks.boolean("return_lse", return_lse)
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule must be a sparse_attn.selection.Rule or None, got {checks.describe(rule)}")
    if scale is None and rule is not None:
        scale = rule.scale
    if selection.block_size is not None:
        out, lse = _to_blocks(query, key, value, selection, rule, scale, tail, backend)
    else:
        if tail != "none":
            rule = replace(_rule_of_tail(rule, tail), scale=scale)
            indices = checks.indices_of(selection.indices, query, key)
        if rule is not None and tail == "mean":
            out, lse = tails.attend(query, key, value, indices, rule, backend=backend)
            return (out, lse) if return_lse else out
        softcap, sink_logits = (None, None) if rule is None else (rule.softcap, rule.sink_logits)
        out, lse = gathered_attention.attend(
            query, key, value, selection.indices, scale=scale, softcap=softcap, sink_logits=sink_logits,
            backend=backend,
        )  # fmt: skip
        if rule is not None and tail == "blocks":
            out, lse = tails.with_blocks(query, key, value, out, lse, indices, rule, backend=backend)
    return (out, lse) if return_lse else out


def _to_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    rule: Rule | None,
    scale: float | None,
    tail: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if rule is None or selection.block_size is None:
        raise ValueError("a selection of blocks needs the rule: not every query sees all keys of a block")
    if tail != "none":
        raise ValueError(
            f"tail={tail!r} needs a selection of tokens, got blocks of {selection.block_size} keys"
        )
    visible = replace(rule.visibility(), scale=scale)
    sizes = selection.block_size, selection.query_tile
    return block_attention.attend(query, key, value, selection.indices, *sizes, visible, backend=backend)


def _rule_of_tail(rule: Rule | None, tail: str) -> Rule:
    """The rule, where a tail can be had."""
    if rule is None:
        raise ValueError(f"tail={tail!r} needs the rule: which keys are left out depends on who sees whom")
    tails.check_rule(rule)
    return rule


def select_and_attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    selector: Selector,
    rule: Rule,
    *,
    tail: str = "none",
    backend: str | None = None,
) -> Tensor:
    """`attend` to what `selector` chooses: out [B, Hq, Tq, Dv]; both stages in one op where the selector has one.

    Args and Raises: as in :func:`attend`; `top_k` and `rule` are the selector's.

    Example:
        >>> import torch
        >>> from sparse_attn.selection import Exact, Rule, select_and_attend
        >>> q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> select_and_attend(q, k, v, 8, Exact(), Rule(is_causal=True)).shape
        torch.Size([1, 2, 64, 16])
    """
    check_selector(selector)
    check_rule(rule)
    fused = getattr(selector, "attend", None)
    if tail == "none" and fused is not None:
        return fused(query, key, value, top_k, rule)[0]
    selection = selector.select(query, key, top_k, rule)
    out = attend(query, key, value, selection, rule=rule, tail=tail, backend=backend)
    assert isinstance(out, Tensor)  # without return_lse
    return out
