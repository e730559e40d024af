"""Cases of packed calls whose keys lie in pages, and of varlen_indexer_select: each against the call without."""

from __future__ import annotations

import math

import torch
from helpers.compare import assert_well_formed
from torch import Tensor

import sparse_attn
from fuzz.case import Case, Draw, bits, draw_kinds, fuzzed, generator, run
from fuzz.packed import Packed, cu_seq, draw_sequences, views
from fuzz.rules import SCORING, draw_rule, rule_of

_ONE_CALL = ("causal_offset", "attn_mask", "key_lengths", "key_starts")


class InPages(Packed):
    """The keys of `cu_seq_k` are laid into pages here and there; whatever else the pages hold is no number."""

    wings = ("cpu", "reference")

    def draw_pages(self, draw: Draw, *, value: bool) -> Case:
        case = draw_sequences(draw, value=value) | {"used": False, "one_cu_seq": False, "behind_k": 0}
        case["Tk"] = sum(case["lengths_k"])
        case |= {"page_size": draw.choice((1, 16, 16, 32, 48)), "spare": draw.randint(0, 3)}
        return case | {"wide": draw.random() < 0.3, "apart": draw.random() < 0.3}

    def laid(self, case: Case, *packs: Tensor) -> tuple[list[Tensor], Tensor]:
        """([P, page size, H, D] of each [T, H, D], block_table [S, pages])."""
        size, lengths = case["page_size"], case["lengths_k"]
        needed = [-(-n // size) for n in lengths]
        count = sum(needed) + case["spare"]
        order = torch.randperm(count, generator=generator(case, "pages"))
        table = torch.full((len(lengths), max(needed, default=0) + case["spare"]), -1)
        caches = [
            t.new_full((count, size, t.shape[1] * (2 if case["apart"] else 1), t.shape[2]), math.nan)
            for t in packs
        ]
        caches = [c[:, :, : t.shape[1]] for c, t in zip(caches, packs, strict=True)]
        at = first = 0
        for s, (length, pages) in enumerate(zip(lengths, needed, strict=True)):
            table[s, :pages] = order[first : first + pages]
            for token in range(length):
                page = order[first + token // size]
                for pages_of, pack in zip(caches, packs, strict=True):
                    pages_of[page, token % size] = pack[at + token]
            at, first = at + length, first + pages
        return caches, table.to(torch.int64 if case["wide"] else torch.int32)

    def check_paged(
        self, case: Case, found: Tensor, wanted: Tensor, tensors: list[Tensor], rule: Case
    ) -> None:
        """On the CPU wing the selection of the pack, to the bit; plain PyTorch's products round by their shapes."""
        width = wanted.shape[-1]  # pages may have room for more keys, in slots that stay empty
        assert bool((found[..., width:] == -1).all())
        found = found[..., :width].contiguous()
        if case["wing"] == "cpu":
            assert torch.equal(found, wanted), "pages change the selection"
        self.check_selection(case, found, *tensors[:2], rule)

    def calls(self, case: Case, tensors: list[Tensor]) -> tuple[tuple, tuple, dict]:
        """(arguments with keys end to end, with keys in pages, what the pages need more)."""
        query, *packs = views(*tensors)
        of_queries, of_keys = (cu_seq(case[n], case["cu_dtype"]) for n in ("lengths_q", "lengths_k"))
        longest = [max(case[n], default=0) + case["more"] for n in ("lengths_q", "lengths_k")]
        caches, table = self.laid(case, *packs)
        used = {"block_table": table, "seqused_k": torch.tensor(case["lengths_k"], dtype=of_keys.dtype)}
        return (
            (query, *packs, of_queries, of_keys, *longest),
            (query, *caches, of_queries, None, *longest),
            used,
        )


@fuzzed
class PagedSelect(InPages):
    name = "paged_select"
    weight = 1

    def draw(self, draw: Draw) -> Case:
        case = self.draw_pages(draw, value=False)
        case |= draw_kinds(draw, "query", "key") | {"top_k": draw.choice((draw.size(40, 1), 2**40))}
        return draw_rule(draw, case, *_ONE_CALL)

    def check(self, case: Case) -> None:
        tensors, rule = self.tensors(case, value=False), rule_of(case)
        packed, paged, used = self.calls(case, tensors)
        with torch.no_grad():
            found = run(case, "varlen_topk_select", *paged, case["top_k"], **used, **rule)
            wanted = run(case, "varlen_topk_select", *packed, case["top_k"], **rule)
        self.check_paged(case, found, wanted, tensors, rule)


@fuzzed
class PagedAttention(InPages):
    name = "paged_attention"
    weight = 2

    def draw(self, draw: Draw) -> Case:
        case = self.draw_pages(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value")
        case |= {"top_k": draw.choice((draw.size(40, 1), 2**40))}
        return draw_rule(draw, case, *_ONE_CALL)

    def check(self, case: Case) -> None:
        tensors, rule = self.tensors(case, value=True), rule_of(case)
        packed, paged, used = self.calls(case, tensors)
        options = {**rule, "return_lse": True, "return_indices": True}
        with torch.no_grad():
            out, lse, indices = run(case, "varlen_topk_attention", *paged, case["top_k"], **used, **options)
            wanted = run(case, "varlen_topk_attention", *packed, case["top_k"], **options)
            self.check_paged(case, indices, wanted[2], tensors, rule)
            for one, other in zip((out, lse), wanted, strict=False):
                if case["wing"] == "cpu":
                    equal = (one == other) | (one.isnan() & other.isnan())
                    assert bool(equal.all()), "pages change the result"
            # And attention to those keys, where they lie.
            scoring = {n: v for n, v in options.items() if n in (*SCORING, "return_lse")}
            again = run(case, "varlen_gathered_attention", *paged[:3], indices, *paged[3:], **used, **scoring)
            for one, other in zip(again, (out, lse), strict=True):
                close = torch.isclose(one.double(), other.double(), atol=0.05, rtol=0.05, equal_nan=True)
                assert bool(close.all()), "attention to the chosen keys is another"


@fuzzed
class VarlenIndexer(Packed):
    name = "varlen_indexer_select"
    weight = 1

    def draw(self, draw: Draw) -> Case:
        case = draw_sequences(draw, value=False)
        case |= draw_kinds(draw, "query", "key") | {"top_k": draw.choice((draw.size(40, 1), 2**40))}
        case = draw_rule(draw, case, *_ONE_CALL, "scale", "share", "softcap", "sink_logits")
        return case | {"int8": draw.random() < 0.3}

    def check(self, case: Case) -> None:
        query, key = self.tensors(case, value=False)
        (where, used), rule, top_k = self.where(case), rule_of(case), case["top_k"]
        weights = torch.randn(case["Tq"], case["Hq"], generator=generator(case, "weights")).to(query.dtype)
        rule["int8"] = case["int8"]
        indices = run(
            case, "varlen_indexer_select", *views(query, key), weights, *where, top_k, **used, **rule
        )
        assert bool((indices[sum(case["lengths_q"]) :] == -1).all()), "a query of no sequence chooses a key"
        for queries, keys in self.alone(case):
            parts, more = self.of_one(query, key, queries, keys, rule)
            own = indices[queries].transpose(0, 1)[None]
            kept = min(top_k, keys.stop - keys.start)
            assert bool((own[..., kept:] == -1).all())
            options = {n: v for n, v in (rule | more).items() if n != "int8"}
            assert_well_formed(
                own[..., :kept].contiguous(), parts[0][:, : case["Hkv"]], parts[1], top_k, **options
            )
            if case["wing"] == "cpu":
                alone = sparse_attn.indexer_select(
                    *parts, weights[queries].T[None], top_k, backend="cpu", **rule, **more
                )
                assert torch.equal(bits(alone), bits(own[..., :kept])), (
                    "a sequence alone has another selection"
                )
