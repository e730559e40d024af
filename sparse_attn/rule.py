"""The rule of a selection: who may see whom, what is always kept, who shares, and the scale of the scores.

One object from the public function to the kernel. `Rule` is what a caller says; `Rule.packed` checks it against the
tensors, once, and gives the `PackedRule` that crosses the ops' schemas (`SCHEMA`) in its parts. The ops put it
together again for Python wings; in C++ it is csrc/common/rule.h, which reads the numbers in the order of `_NUMBERS`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks

# SymInt, so that under torch.compile an offset made of sizes (a KV cache that grows) needs no new graph per size.
SCHEMA = (
    "Tensor? attn_mask, Tensor? key_lengths, Tensor? key_starts, Tensor? causal_offsets, SymInt[] rule, float scale, "
    "float softcap, Tensor? sink_logits"
)
PARTS = 8
# For torch.func.vmap: those of its tensors whose first dimension is the batch, and the others.
BATCH, SHARED = "attn_mask key_lengths key_starts causal_offsets", "sink_logits"
# The parts that the kernels of every compiled wing know. A new part is not among them: a wing without it is not chosen
# for a call that says it.
EVERYWHERE = frozenset(
    (
        "is_causal",
        "causal_offset",
        "attn_mask",
        "key_lengths",
        "window",
        "sinks",
        "share",
        "scale",
        "key_starts",
        "softcap",
        "sink_logits",
    )
)
OFFSETS = "causal_offsets"  # what a causal_offset is called that each query has of its own


@dataclass(frozen=True, eq=False)
class Rule:
    """Which keys each query may see and which of them it always keeps, as :func:`sparse_attn.topk_select` takes it.

    Args:
        is_causal: query i sees keys 0 … i + causal_offset.
        causal_offset: offset of the diagonal; must be given when Tq ≠ Tk (Tk − Tq: the queries are the last). A tensor,
            int32 or int64 [B] or [B, Tq], gives each sequence, or query, its own.
        attn_mask: boolean, True = may attend, broadcastable to [B, Hq, Tq, Tk]; the same for heads that share.
        key_lengths: int32 or int64 [B]; keys at and past it do not exist.
        window: always keep the last `window` visible positions up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys, from key_starts on.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        scale: factor of q·k, default 1/√D.
        softcap: if given, a score is softcap · tanh(scale · q·k / softcap); positive.
        sink_logits: float [Hq]; one more logit per query head in the softmax's denominator, without a value.
        key_starts: int32 or int64 [B] or [B, Tq]; keys before it do not exist for that sequence, or query.

    Nothing is checked before the rule meets tensors: whatever takes it raises TypeError or ValueError then.

    Example:
        >>> import torch
        >>> from sparse_attn.selection import Exact, Rule
        >>> q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16)
        >>> rule = Rule(is_causal=True, window=4, sinks=1, share="kv")
        >>> Exact().select(q, k, 8, rule).indices.shape
        torch.Size([1, 2, 32, 8])
    """

    is_causal: bool = False
    causal_offset: int | Tensor | None = None
    attn_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    window: int = 0
    sinks: int = 0
    share: str = "none"
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    key_starts: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """The rule in the keywords of the public functions."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def said(self) -> frozenset[str]:
        """The names of the parts that say something: those that differ from their defaults."""
        said = []
        for name, default in _DEFAULTS:
            value = getattr(self, name)
            if value is not default and (isinstance(value, Tensor) or value != default):
                said.append(OFFSETS if name == "causal_offset" and isinstance(value, Tensor) else name)
        return frozenset(said)

    def only(self, what: str, *known: str) -> None:
        """Refuses a rule that says more than `what`, such as a selector, can keep: the parts `known`.

        Raises:
            ValueError: the rule says something else, too.
        """
        others = sorted(self.said().difference(known))
        if others:
            names = ", ".join(
                name for name in known if name != OFFSETS
            )  # which is a causal_offset to the caller
            raise ValueError(f"{what} know of a rule only {names}; got {' and '.join(others)}")

    def visibility(self) -> Rule:
        """The same without what only a selection needs: what is always kept, and who shares."""
        return replace(self, window=0, sinks=0, share="none")

    def packed(
        self,
        query: Tensor,  # [B, Hq, Tq, D]
        key: Tensor,  # [B, Hkv, Tk, D]
        top_k: int | None = None,
        *,
        per_group: bool = False,
    ) -> PackedRule:
        """The rule for these tensors, which are checked already; `top_k` must hold what is always kept.

        `per_group`: each key head is a group of its own, and the mask is given per group, not per query head.

        Raises:
            TypeError, ValueError: a part of the rule is wrong, or does not fit the tensors or the budget.
        """
        is_causal = checks.boolean("is_causal", self.is_causal)
        window, sinks = checks.kept(self.window, self.sinks, is_causal, top_k)
        _, heads, query_length, head_dim = query.shape
        _, kv_heads, key_length, _ = key.shape
        groups = kv_heads if per_group else checks.groups_of(self.share, heads, kv_heads)
        given = self.causal_offset
        offsets = None
        if isinstance(given, Tensor):
            offset, offsets = 0, checks.offsets_of(is_causal, given, query)
        else:
            offset = checks.causal_offset_of(is_causal, given, query_length, key_length)
        return PackedRule(
            None
            if self.attn_mask is None
            else checks.mask_of(self.attn_mask, query, key, groups, per_group=per_group),
            None if self.key_lengths is None else checks.lengths_of(self.key_lengths, key),
            is_causal,
            offset,
            window,
            sinks,
            groups,
            checks.softmax_scale(self.scale, head_dim),
            0.0 if self.softcap is None else checks.soft_cap(self.softcap),
            None if self.sink_logits is None else checks.sink_logits_of(self.sink_logits, query),
            None if self.key_starts is None else checks.starts_of(self.key_starts, query),
            offsets,
        )


_DEFAULTS = tuple((field.name, field.default) for field in fields(Rule))
EVERY_PART = frozenset((*(name for name, _ in _DEFAULTS), OFFSETS))


class PackedRule(NamedTuple):
    """A checked rule: every part has its value, and fits the tensors that it was packed for."""

    attn_mask: Tensor | None  # bool [B, G, Tq, Tk], True = may attend
    key_lengths: Tensor | None  # int [B]
    is_causal: bool
    causal_offset: int  # 0 without is_causal, and where there are causal_offsets
    window: int
    sinks: int
    groups: int  # G: 1, Hkv or Hq
    scale: float
    softcap: float = 0.0  # 0: none
    sink_logits: Tensor | None = None  # float32 (of float64 queries float64) [Hq]
    key_starts: Tensor | None = None  # int [B, Tq], any values
    causal_offsets: Tensor | None = None  # int [B, Tq], any values

    def first_kept(self, key_length: int) -> int:
        """How many of the first keys are always kept."""
        return min(self.sinks, key_length)

    def parts(self) -> tuple[Any, ...]:
        """What `SCHEMA` names."""
        numbers = [int(self.is_causal), self.causal_offset, self.window, self.sinks, self.groups]
        visible = self.attn_mask, self.key_lengths, self.key_starts, self.causal_offsets
        return *visible, numbers, self.scale, self.softcap, self.sink_logits

    @classmethod
    def of_parts(
        cls,
        attn_mask: Tensor | None,
        key_lengths: Tensor | None,
        key_starts: Tensor | None,
        causal_offsets: Tensor | None,
        numbers: list[Any],
        scale: float,
        softcap: float,
        sink_logits: Tensor | None,
    ) -> PackedRule:
        is_causal, causal_offset, window, sinks, groups = numbers
        of_numbers = bool(is_causal), causal_offset, window, sinks, groups
        return cls(
            attn_mask, key_lengths, *of_numbers, scale, softcap, sink_logits, key_starts, causal_offsets
        )


def selection_shape(query: Tensor, key: Tensor, top_k: int, rule: PackedRule) -> tuple[int, int, int, Any]:
    """[B, G, Tq, K], K = min(top_k, Tk)."""
    return query.shape[0], rule.groups, query.shape[2], torch.sym_min(top_k, key.shape[2])


def check_budget(rule: Rule, top_k: int) -> int:
    """`top_k`, which must hold what the rule always keeps."""
    return checks.budget(top_k, rule.window, rule.sinks, rule.is_causal)


def check_kept(rule: Rule) -> None:
    """What the rule always keeps fits the rest of it."""
    checks.kept(rule.window, rule.sinks, rule.is_causal)


def first_keys(rule: PackedRule, length: int, device: torch.device) -> Tensor:  # bool [B or 1, Tk]
    """Which keys some query always keeps for being the first that it may see."""
    if rule.key_starts is None:
        return (torch.arange(length, device=device) < rule.sinks)[None]
    starts = rule.key_starts.to(torch.int64).clamp(0, length)
    ends = (starts + rule.sinks).clamp(max=length)
    step = torch.zeros((len(starts), length + 1), dtype=torch.int64, device=device)
    step.scatter_add_(1, starts, torch.ones_like(starts))
    step.scatter_add_(1, ends, -torch.ones_like(ends))
    return step.cumsum(1)[:, :length] > 0


def always_kept(
    rule: Rule,
    first: Tensor,  # int64 […, 1]: the first key that a query sees
    last: Tensor,  # int64 […, 1]: the last
    own: Tensor,  # int64 […, 1]: where its window ends, seen or not
    nothing: int,  # no key's number
) -> Tensor:  # int64 […, sinks + window]
    """The keys that a rule always keeps, each once, `nothing` in empty places: known from positions alone."""
    sinks = first + torch.arange(rule.sinks, device=first.device)
    window = own - torch.arange(rule.window, device=first.device)
    inside = (window >= first + rule.sinks) & (window <= last)
    return torch.cat((torch.where(sinks <= last, sinks, nothing), torch.where(inside, window, nothing)), -1)


def keeps(rule: Rule, keys: Tensor, first: Tensor, own: Tensor) -> Tensor:
    """bool: which of the visible `keys` are among those."""
    return (keys < first + rule.sinks) | (keys > own - rule.window)
