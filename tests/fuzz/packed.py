"""Cases of the packed calls: varlen_topk_select, varlen_topk_attention and varlen_gathered_attention."""

from __future__ import annotations

import torch
from helpers.inputs import index_rows
from torch import Tensor

import sparse_attn
from fuzz.attention import check_attention, check_indices, draw_gradients, leaves_of, scoring_of, sink_leaf
from fuzz.bounds import Attention, attention_to
from fuzz.case import Case, Draw, Fuzzed, bits, draw_kinds, fuzzed, generator, run, tensor
from fuzz.rules import OPTIONS, SCORING, draw_rule, rule_of

_SIZES = (1, 2, 3, 4, 7, 8, 16, 64)
_ONE_CALL = ("causal_offset", "attn_mask", "key_lengths", "key_starts")  # what a packed call says otherwise


def draw_sequences(draw: Draw, *, value: bool) -> Case:
    """How many queries and keys each sequence has, tokens behind the last, and the other sizes."""
    kv_heads = draw.choice((1, 1, 2, 3))
    case = {"Hkv": kv_heads, "Hq": kv_heads * draw.choice((1, 1, 2, 3)), "B": 1}
    count, longest = (draw.randint(2, 9), 90) if draw.large else (draw.randint(0, 5), 34)
    case["lengths_q"] = [draw.size(longest) for _ in range(count)]
    same = draw.random() < 0.5
    case["lengths_k"] = case["lengths_q"] if same else [draw.size(2 * longest) for _ in range(count)]
    case |= {"cu_dtype": draw.choice(("int32", "int64")), "more": draw.choice((0, 0, 3, 1000))}
    case |= {"behind_q": draw.choice((0, 0, 4)), "used": draw.random() < 0.3}
    case["behind_k"] = case["behind_q"] if same else draw.choice((0, 5))
    case["one_cu_seq"] = same and draw.random() < 0.5
    case |= {"Tq": sum(case["lengths_q"]) + case["behind_q"]}
    case |= {"Tk": sum(case["lengths_k"]) + case["behind_k"]}
    case |= {name: draw.size(64, 1) for name in (("D", "Dv") if value else ("D",))}
    return case


def cu_seq(lengths: list[int], dtype: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(getattr(torch, dtype))


class Packed(Fuzzed):
    """`where`: the arguments between the tensors and the options; `alone`: each sequence's places."""

    def where(self, case: Case) -> tuple[tuple, dict]:
        of_queries, of_keys = (cu_seq(case[n], case["cu_dtype"]) for n in ("lengths_q", "lengths_k"))
        longest = [max(case[n], default=0) + case["more"] for n in ("lengths_q", "lengths_k")]
        used = {"seqused_k": self.used(case).to(of_keys.dtype)} if case["used"] else {}
        return (of_queries, None if case["one_cu_seq"] else of_keys, *longest), used

    def used(self, case: Case) -> Tensor:
        """How many keys of each sequence exist."""
        lengths = torch.tensor(case["lengths_k"], dtype=torch.int64)
        if not case["used"]:
            return lengths
        return (torch.rand(len(lengths), generator=generator(case, "used")) * (lengths + 1)).long()

    def alone(self, case: Case) -> list[tuple[slice, slice]]:
        """The queries and the keys of each sequence."""
        found, at_q, at_k = [], 0, 0
        for queries, keys, used in zip(
            case["lengths_q"], case["lengths_k"], self.used(case).tolist(), strict=True
        ):
            found.append((slice(at_q, at_q + queries), slice(at_k, at_k + used)))
            at_q, at_k = at_q + queries, at_k + keys
        return found

    def tensors(self, case: Case, value: bool) -> list[Tensor]:
        """[1, H, T, D] each; a packed call gets views [T, H, D] of them."""
        sizes = [("query", case["Hq"], case["Tq"], case["D"]), ("key", case["Hkv"], case["Tk"], case["D"])]
        sizes += [("value", case["Hkv"], case["Tk"], case["Dv"])] if value else []
        return [tensor(case, name, 1, *shape) for name, *shape in sizes]

    def of_pack(self, case: Case, indices: Tensor) -> Tensor:
        """[T, G, K] of each sequence's own keys → [1, G, T, K] of keys of the pack."""
        found = torch.full_like(indices, -1, dtype=torch.int64)
        for queries, keys in self.alone(case):
            own = indices[queries].long()
            inside = (own >= 0) & (own < keys.stop - keys.start)
            found[queries] = torch.where(inside, own + keys.start, -1)
        return found.transpose(0, 1)[None]

    def check_selection(self, case: Case, indices: Tensor, query: Tensor, key: Tensor, rule: Case) -> None:
        """Of each sequence the contract; the CPU wing's bits are those of a call of the sequence alone."""
        width = min(case["top_k"], max(case["lengths_k"], default=0) + case["more"], case["Tk"])
        assert indices.dtype == torch.int32
        assert indices.shape[0] == case["Tq"]
        assert indices.shape[2] == width, f"{indices.shape[2]} slots, want {width}"
        assert bool((indices[sum(case["lengths_q"]) :] == -1).all()), "a query of no sequence chooses a key"
        for queries, keys in self.alone(case):
            own = indices[queries].transpose(0, 1)[None].contiguous()
            kept = min(case["top_k"], keys.stop - keys.start)
            assert bool((own[..., kept:] == -1).all())
            parts, more = self.of_one(query, key, queries, keys, rule)
            own = own[..., :kept].contiguous()
            check_indices(case, own, *parts, case["top_k"], rule | more)
            if case["wing"] == "cpu":
                options = rule | more | {"backend": "cpu"}
                found = sparse_attn.topk_select(*parts, case["top_k"], **options)
                assert torch.equal(found, own), "a sequence alone has another selection"

    def of_one(self, query: Tensor, key: Tensor, queries: slice, keys: slice, rule: Case) -> tuple:
        """(query, key) of one sequence, and what more its rule says."""
        query, key = query[:, :, queries], key[:, :, keys]
        more = {"causal_offset": key.shape[2] - query.shape[2]} if rule.get("is_causal") else {}
        return (query, key), more


def views(*tensors: Tensor) -> list[Tensor]:
    """[1, H, T, D] → [T, H, D]."""
    return [t[0].transpose(0, 1) for t in tensors]


@fuzzed
class VarlenSelect(Packed):
    name = "varlen_topk_select"
    weight = 2

    def draw(self, draw: Draw) -> Case:
        case = draw_sequences(draw, value=False)
        case |= draw_kinds(draw, "query", "key") | {"top_k": draw.choice((draw.size(40, 1), 2**40))}
        return draw_rule(draw, case, *_ONE_CALL)

    def check(self, case: Case) -> None:
        query, key = self.tensors(case, value=False)
        (where, used), rule = self.where(case), rule_of(case)
        indices = run(case, "varlen_topk_select", *views(query, key), *where, case["top_k"], **used, **rule)
        self.check_selection(case, indices, query, key, rule)


@fuzzed
class VarlenAttention(Packed):
    name = "varlen_topk_attention"

    def draw(self, draw: Draw) -> Case:
        case = draw_sequences(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value") | draw_gradients(draw)
        case |= {"top_k": draw.choice((draw.size(40, 1), 2**40))}
        return draw_rule(draw, case, *_ONE_CALL)

    def check(self, case: Case) -> None:
        leaves = leaves_of(case, *self.tensors(case, value=True))
        (where, used), rule = self.where(case), rule_of(case)
        sinks = sink_leaf(case, rule)
        out, lse, indices = run(
            case, "varlen_topk_attention", *views(*leaves), *where, case["top_k"], **used, return_lse=True,
            return_indices=True, **rule,
        )  # fmt: skip
        rule |= scoring_of(rule)
        query, key, value = (t.detach() for t in leaves)
        self.check_selection(case, indices, query, key, rule)
        if case["wing"] == "cpu":
            for queries, keys in self.alone(case):
                parts, more = self.of_one(query, key, queries, keys, rule)
                options = rule | more | {"backend": "cpu", "return_lse": True}
                found = sparse_attn.topk_attention(*parts, value[:, :, keys], case["top_k"], **options)
                for one, other in zip(found, (out, lse), strict=True):
                    mine = other.detach()[queries].transpose(0, 1)[None]
                    assert torch.equal(bits(one), bits(mine)), "a sequence alone gives other bits"
        exact = attention_to(query, key, value, self.of_pack(case, indices), **scoring_of(rule))
        out, lse = out.transpose(0, 1)[None], lse.T[None]
        check_attention(case, out, lse, [*leaves, *sinks], exact)


@fuzzed
class VarlenGathered(Packed):
    name = "varlen_gathered_attention"
    weight = 2

    def draw(self, draw: Draw) -> Case:
        case = draw_sequences(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value") | draw_gradients(draw)
        case |= {
            "G": draw.choice((1, case["Hkv"], case["Hq"])),
            "K": draw.size(40),
            "wide": draw.random() < 0.3,
        }
        case["garbage"] = draw.random() < 0.4
        drawn = {name: OPTIONS[name](draw, case) for name in SCORING}
        return case | {name: value for name, value in drawn.items() if value is not None}

    def check(self, case: Case) -> None:
        leaves = leaves_of(case, *self.tensors(case, value=True))
        (where, used), scoring = self.where(case), rule_of(case)
        sinks = sink_leaf(case, scoring)
        longest = max(case["lengths_k"], default=0)
        shape = (case["Tq"], case["G"], case["K"])
        indices = torch.zeros(shape, dtype=torch.int32)
        if case["K"]:
            indices = index_rows(shape, longest, seed=case["seed"], garbage=case["garbage"])
        indices = indices.long() if case["wide"] else indices
        out, lse = run(
            case, "varlen_gathered_attention", *views(*leaves), indices, *where, **used, return_lse=True, **scoring
        )  # fmt: skip
        query, key, value = (t.detach() for t in leaves)
        exact = attention_to(query, key, value, self.of_pack(case, indices), **scoring_of(scoring))
        check_attention(case, out.transpose(0, 1)[None], lse.T[None], [*leaves, *sinks], exact)


@fuzzed
class VarlenBlocks(Packed):
    """Choice and attention in one case: a choice that is drawn would seldom be one of a pack's."""

    name = "varlen_block_attention"

    def draw(self, draw: Draw) -> Case:
        case = draw_sequences(draw, value=True)
        case |= {
            "lengths_k": case["lengths_q"],
            "behind_k": case["behind_q"],
            "Tk": case["Tq"],
            "used": False,
        }
        case |= draw_kinds(draw, "query", "key", "value") | draw_gradients(draw)
        case |= {"block_size": draw.choice(_SIZES), "query_tile": draw.choice(_SIZES), "more": 0}
        case |= {"pool": draw.choice(("mean", "bound")), "top_blocks": draw.size(5)}
        for name in ("is_causal", "share", *SCORING):
            value = OPTIONS[name](draw, case)
            if value is not None:
                case[name] = abs(value) if name == "scale" else value
        return case

    def check(self, case: Case) -> None:
        leaves = leaves_of(case, *self.tensors(case, value=True))
        (where, _), rule = self.where(case), rule_of(case)
        sizes = {"block_size": case["block_size"], "query_tile": case["query_tile"]}
        own = (case["query_tile"] - 2) // case["block_size"] + 2 if rule.get("is_causal") else 0
        budget, share = 1 + max(1, own) + case["top_blocks"], {"share": rule.pop("share", "none")}
        query, key, value = (t.detach() for t in leaves)
        choice = {**sizes, **share, "pool": case["pool"]}
        scores = scoring_of(rule)
        seen = {"is_causal": True} if rule.get("is_causal") else {}
        blocks = run(
            case, "varlen_block_select", *views(query, key), *where, budget, **choice, **scores, **seen
        )
        sinks = sink_leaf(case, rule)
        out, lse = run(
            case, "varlen_block_attention", *views(*leaves), blocks, *where, **sizes, **rule, return_lse=True
        )  # fmt: skip
        counts = torch.zeros(1, case["Hq"], case["Tq"], case["Tk"], dtype=torch.float64)
        first = 0
        for queries, keys in self.alone(case):
            parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            length = queries.stop - queries.start
            tiles = -(-length // max(1, min(case["query_tile"], case["Tq"])))
            mine = blocks[first : first + tiles].transpose(0, 1)[None]
            first += tiles
            if not length:
                continue
            at = torch.arange(length)
            near = mine[:, :, at // case["query_tile"]].unsqueeze(-1) == at // case["block_size"]
            each = near.sum(-2).double().repeat_interleave(case["Hq"] // mine.shape[1], dim=1)
            counts[:, :, queries, keys] = each * (at <= at[:, None]) if seen else each
            if case["wing"] != "cpu":
                continue
            found = sparse_attn.block_select(*parts[:2], budget, backend="cpu", **choice, **scores, **seen)
            width = found.shape[-1]
            assert torch.equal(mine[..., :width], found), "a sequence alone has other blocks"
            assert bool((mine[..., width:] == -1).all())
            options = {**sizes, **scores, **seen, "backend": "cpu", "return_lse": True}
            alone = sparse_attn.block_attention(*parts, found, **options)
            for one, other in zip(alone, (out, lse), strict=True):
                packed = other.detach()[queries].transpose(0, 1)[None]
                equal = (one == packed) | (one.isnan() & packed.isnan())  # a NaN may have either sign
                assert bool(equal.all()), "a sequence alone gives other numbers"
        assert bool((blocks[first:] == -1).all()), "a tile of no sequence has blocks"
        exact = Attention(query, key, value, counts, **scores)
        check_attention(case, out.transpose(0, 1)[None], lse.T[None], [*leaves, *sinks], exact)
