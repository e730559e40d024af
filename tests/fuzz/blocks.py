"""Cases of block_select, block_attention and refine_blocks."""

from __future__ import annotations

import torch
from helpers import oracle
from torch import Tensor

from fuzz.attention import (
    check_attention,
    check_indices,
    draw_budget,
    draw_gradients,
    draw_sizes,
    leaves_of,
    query_key,
    rows,
    scoring_of,
    sink_leaf,
)
from fuzz.bounds import Attention
from fuzz.case import EXTREME, SPECIAL, Case, Draw, Fuzzed, among, draw_kinds, draw_view, fuzzed, run, tensor
from fuzz.rules import draw_rule, one_offset, rule_of


def draw_blocks(draw: Draw, case: Case) -> Case:
    sizes = (1, 2, 3, 4, 7, 8, 16, 17, 64, 2**40)
    return {"block_size": draw.choice(sizes), "query_tile": draw.choice(sizes)}


def sizes_of(case: Case) -> dict[str, int]:
    return {"block_size": case["block_size"], "query_tile": case["query_tile"]}


def tiles(case: Case) -> int:
    return -(-case["Tq"] // case["query_tile"])


def blocks_of(case: Case) -> Tensor:
    shape = (case["B"], case["G"], tiles(case), case["M"])
    return rows(case, shape, -(-case["Tk"] // case["block_size"]))


def times_named(case: Case, blocks: Tensor) -> Tensor:
    """How often each key's block stands in the row of the query's tile, float64 [B, G, Tq, Tk]."""
    own = torch.arange(case["Tk"]) // case["block_size"]
    tile = torch.arange(case["Tq"]) // case["query_tile"]
    return (blocks[:, :, tile].unsqueeze(-1) == own).sum(-2).double()


@fuzzed
class BlockAttention(Fuzzed):
    name = "block_attention"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value") | draw_gradients(draw) | draw_blocks(draw, case)
        case |= {
            "G": draw.choice((1, case["Hkv"], case["Hq"])),
            "M": draw.size(6),
            "garbage": draw.random() < 0.4,
        }
        draw_rule(draw, case, "attn_mask", "window", "sinks", "share")
        one_offset(case)
        return case | {"indices_view": draw_view(draw)}

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        value = tensor(case, "value", case["B"], case["Hkv"], case["Tk"], case["Dv"])
        rule, blocks = rule_of(case), blocks_of(case)
        leaves, sinks = leaves_of(case, query, key, value), sink_leaf(case, rule)
        out, lse = run(case, "block_attention", *leaves, blocks, return_lse=True, **sizes_of(case), **rule)
        query, key, value = (t.detach() for t in leaves)
        counts = times_named(case, blocks).repeat_interleave(case["Hq"] // case["G"], dim=1)
        counts = counts * oracle.visible(query, key, **rule)
        check_attention(
            case, out, lse, leaves + sinks, Attention(query, key, value, counts, **scoring_of(rule))
        )


@fuzzed
class RefineBlocks(Fuzzed):
    name = "refine_blocks"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=False)
        case |= (
            draw_kinds(draw, "query", "key") | draw_blocks(draw, case) | {"top_k": draw_budget(draw, case)}
        )
        draw_rule(draw, case, "attn_mask")
        groups = {"kv": (1, case["Hkv"]), "all": (1,)}.get(case.get("share"), (1, case["Hkv"], case["Hq"]))
        case |= {"G": draw.choice(groups), "M": draw.size(6), "garbage": draw.random() < 0.4}
        return case | {"indices_view": draw_view(draw)}

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        rule, blocks = rule_of(case), blocks_of(case)
        indices = run(case, "refine_blocks", query, key, blocks, case["top_k"], **sizes_of(case), **rule)
        seen = times_named(case, blocks) > 0
        seen = seen | oracle.forced(query, key, **rule)
        seen = seen.repeat_interleave(case["Hq"] // case["G"], dim=1)
        check_indices(case, indices, query, key, case["top_k"], rule | {"attn_mask": seen})


@fuzzed
class BlockSelect(Fuzzed):
    name = "block_select"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=False)
        case |= draw_kinds(draw, "query", "key") | draw_blocks(draw, case) | {"top_k": 2**40}
        case |= {"pool": draw.choice(("mean", "bound")), "more": draw.size(5)}
        draw_rule(draw, case, "attn_mask", "window", "sinks")
        one_offset(case)
        if case.get("scale", 0) < 0:
            case["scale"] = 0.7
        if "key_starts" in case:  # what a tile sees whose queries start apart is no query's own
            case["key_starts"] = case["key_starts"].replace("[B, Tq]", "[B]")
        return case

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        rule, pool = rule_of(case), case["pool"]
        block, tile = case["block_size"], case["query_tile"]
        # The blocks of a tile's own queries, at most, and the first block are always in.
        own = (tile - 2) // block + 2 if rule.get("is_causal") else 0
        budget = 1 + own + case["more"]
        chosen = run(case, "block_select", query, key, budget, pool=pool, **sizes_of(case), **rule)
        count = -(-case["Tk"] // block)
        groups = oracle.groups(query, key, rule.get("share", "none"))
        assert chosen.shape == (case["B"], groups, tiles(case), min(budget, count))
        if chosen.numel() == 0:
            return
        seen, kept = self.visible_blocks(case, query, key, rule)  # [B, 1, N, count]
        assert_rows(chosen, seen.expand(-1, groups, -1, -1), kept.expand(-1, groups, -1, -1))
        if among(case, SPECIAL + EXTREME, "query", "key"):
            return
        rank, error = self.ranks(case, query, key, rule)
        if groups < case["Hq"]:
            return  # masses of far blocks alone: their normaliser is not the oracle's business
        picked = taken(chosen, count)
        out = seen & ~picked
        best = (rank - error).masked_fill(~out, -torch.inf).amax(-1)
        worst = (rank + error).masked_fill(~(picked & ~kept), torch.inf).amin(-1)
        assert bool((best <= worst).all()), "a better block was left out"

    def visible_blocks(self, case: Case, query: Tensor, key: Tensor, rule: Case) -> tuple[Tensor, Tensor]:
        """Blocks that some query of a tile sees, and those that are always kept, bool [B, 1, N, blocks]."""
        block, tile = min(case["block_size"], case["Tk"]), min(case["query_tile"], case["Tq"])
        seen = oracle.visible(query, key, **rule)[:, :1]
        count, many = -(-case["Tk"] // block), -(-case["Tq"] // tile)
        whole = torch.zeros(case["B"], 1, many * tile, count * block, dtype=torch.bool)
        whole[:, :, : case["Tq"], : case["Tk"]] = seen
        blocks = whole.view(case["B"], 1, many, tile, count, block).any(5).any(3)
        kept = torch.zeros_like(blocks)
        start = oracle.first_keys(query, rule.get("key_starts"))[:, :, 0]  # [B, 1, 1]
        kept[:] = torch.arange(count) == (start // block).unsqueeze(-1)
        if rule.get("is_causal"):
            at = torch.arange(case["Tq"]) + (rule.get("causal_offset") or 0)
            for i, position in enumerate(at.tolist()):
                if 0 <= position < count * block:
                    kept[:, :, i // tile, position // block] = True
        return blocks, kept & blocks

    def ranks(self, case: Case, query: Tensor, key: Tensor, rule: Case) -> tuple[Tensor, Tensor]:
        """Scores of the pooled queries and keys, and how far they may lie off, [B, Hq, N, blocks]."""
        block, tile = min(case["block_size"], case["Tk"]), min(case["query_tile"], case["Tq"])
        lengths = rule.get("key_lengths", torch.full((case["B"],), case["Tk"]))
        there = torch.arange(case["Tk"]) < lengths.view(-1, 1)
        starts = oracle.first_keys(query, rule.get("key_starts"))[:, 0, 0]  # [B, 1]
        there = (there & (torch.arange(case["Tk"]) >= starts)).view(case["B"], 1, -1, 1)
        q = pooled(query.double(), tile, torch.ones(1, 1, case["Tq"], 1, dtype=torch.bool), "mean")
        share = case["Hq"] // case["Hkv"]
        sizes = pooled(query.double().abs(), tile, torch.ones(1, 1, case["Tq"], 1, dtype=torch.bool), "mean")
        key_sizes = pooled(key.double().abs(), block, there, "amax").repeat_interleave(share, 1)
        if case["pool"] == "mean":
            k = pooled(key.double(), block, there, "mean").repeat_interleave(share, 1)
            rank = q @ k.mT
        else:
            low, high = (
                pooled(key.double(), block, there, how).repeat_interleave(share, 1)
                for how in ("amin", "amax")
            )
            q = q.unsqueeze(3)
            rank = torch.maximum(q * low.unsqueeze(2), q * high.unsqueeze(2)).sum(-1)
        scale = rule.get("scale") if rule.get("scale") is not None else case["D"] ** -0.5
        unit = 2.0**-52 if case["dtype"] == "float64" else 2.0**-24
        error = (2 * case["D"] + tile + block + 8) * unit * (sizes @ key_sizes.mT) + 1e-30
        return rank * scale, error * abs(scale)


def taken(chosen: Tensor, count: int) -> Tensor:
    """bool [B, G, N, count]."""
    found = torch.zeros(*chosen.shape[:3], count + 1, dtype=torch.bool)
    return found.scatter_(-1, chosen.long().where(chosen >= 0, count), True)[..., :count]


def assert_rows(chosen: Tensor, seen: Tensor, kept: Tensor) -> None:
    """Rows of block numbers are unique, ascending, −1 last, visible, full, and hold what is always kept."""
    filled = chosen >= 0
    sizes, width = filled.sum(-1), chosen.shape[-1]
    assert chosen.dtype == torch.int32
    assert torch.equal(filled, torch.arange(width) < sizes.unsqueeze(-1)), "an empty slot is not last"
    assert bool((chosen.diff(dim=-1) > 0)[filled[..., 1:]].all()), "blocks are not ascending and unique"
    picked = taken(chosen, seen.shape[-1])
    assert not bool((picked & ~seen).any()), "a block that no query sees was chosen"
    assert not bool((kept & ~picked).any()), "a block that is always kept is missing"


def pooled(rows: Tensor, size: int, there: Tensor, how: str) -> Tensor:
    """[B, H, T, D] → [B, H, pieces, D] over what is there; 0 where nothing is."""
    fill = {"mean": 0.0, "amin": torch.inf, "amax": -torch.inf}[how]
    pad = (0, 0, 0, -rows.shape[2] % size)
    there = torch.nn.functional.pad(there.expand(rows.shape[0], 1, -1, 1), pad).unflatten(2, (-1, size))
    pieces = torch.nn.functional.pad(rows, pad).unflatten(2, (-1, size)).masked_fill(~there, fill)
    if how == "mean":
        return pieces.sum(3) / there.sum(3).clamp(min=1)
    return getattr(pieces, how)(3).masked_fill(~there.any(3), 0.0)
