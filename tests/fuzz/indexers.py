"""Cases of indexer_select, indexer_loss and KeySelector."""

from __future__ import annotations

import math

import torch
from helpers import oracle
from helpers.compare import accumulation, assert_highest, assert_well_formed
from torch import Tensor

import sparse_attn
from fuzz.attention import draw_budget, draw_sizes, query_key, rows
from fuzz.case import (
    DTYPES,
    EXTREME,
    SPECIAL,
    Case,
    Draw,
    Fuzzed,
    among,
    call,
    draw_kinds,
    fuzzed,
    generator,
    is_exact,
    run,
    tensor,
)
from fuzz.rules import draw_rule, rule_of


def draw_indexer(draw: Draw) -> Case:
    case = draw_sizes(draw, value=False)
    return case | draw_kinds(draw, "query", "key", "weights") | {"top_k": draw_budget(draw, case)}


def weights_of(case: Case) -> Tensor:
    """[B, G·Hi, Tq]."""
    return tensor(case, "weights", case["B"], case["Hq"], case["Tq"], 1)[..., 0]


@fuzzed
class IndexerSelect(Fuzzed):
    name = "indexer_select"

    def draw(self, draw: Draw) -> Case:
        case = draw_rule(draw, draw_indexer(draw), "scale", "share", "softcap", "sink_logits")
        return case | {"int8": draw.random() < 0.3}

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        weights = weights_of(case)
        rule, top_k = rule_of(case, heads=case["Hkv"]), case["top_k"]
        indices = run(case, "indexer_select", query, key, weights, top_k, int8=case["int8"], **rule)
        one_head = query[:, : key.shape[1]]  # for the contract the heads of a group are one
        assert_well_formed(indices, one_head, key, top_k, **rule)
        names = ("query", "key", "weights")
        if indices.numel() == 0 or among(case, SPECIAL + EXTREME, *names):
            return
        unit = accumulation(query.dtype) * 2
        if case["int8"]:
            query, key = oracle.rounded(query), oracle.rounded(key)
        rank = oracle.indexer_scores(query, key, weights)
        seen, kept = oracle.visible(one_head, key, **rule), oracle.forced(one_head, key, **rule)
        if is_exact(case, *names) and not case["int8"]:
            wanted = oracle.select(rank, seen, kept, top_k)
            assert torch.equal(indices, wanted), "other keys than those of the exact scores"
            return
        sizes = oracle.scores(query.abs(), key.abs(), 1.0) * weights.double().abs().unsqueeze(-1)
        sizes = sizes.unflatten(1, (key.shape[1], -1)).sum(2)
        error = (query.shape[3] + query.shape[1] + 4) * unit * sizes
        assert_highest(indices, rank, error, seen, kept)


@fuzzed
class IndexerLoss(Fuzzed):
    name = "indexer_loss"
    weight = 1
    wings = ("reference",)
    dtypes = ("float32", "float64")

    def draw(self, draw: Draw) -> Case:
        case = draw_indexer(draw)
        case |= {f"{n}_values": "normal" for n in ("query", "key", "weights")}
        case |= {"G": draw.choice((1, case["Hkv"])), "Hi": draw.randint(1, 3), "Di": draw.size(17, 1)}
        if draw.random() < 0.3:
            return case | {"indices": draw.size(20), "garbage": False}
        return draw_rule(draw, case, "window", "sinks", "share", "softcap", "sink_logits")

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        size = {"Hq": case["G"] * case["Hi"], "Hkv": case["G"], "D": case["Di"], "seed": case["seed"] + 1}
        index_query, index_key = query_key(case | size)
        weights = weights_of(case | size)
        leaves = [t.contiguous().requires_grad_() for t in (index_query, index_key, weights)]
        if "indices" in case:
            rule = {"indices": rows(case, (case["B"], case["G"], case["Tq"], case["indices"]), case["Tk"])}
            seen = (
                oracle.multiplicity(
                    index_key.new_empty(case["B"], case["G"], case["Tq"], 1), index_key, rule["indices"]
                )
                > 0
            )
        else:
            rule = rule_of(case, heads=case["G"])
            seen = oracle.visible(index_query[:, : case["G"]], index_key, **rule)
        loss = call(case, sparse_attn.indexer_loss, *leaves, query, key, **rule)
        found = torch.autograd.grad(loss, leaves)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        wanted = self.formula(*exact, query.double(), key.double(), seen, rule.get("scale"))
        true = (
            torch.autograd.grad(wanted, exact)
            if wanted.requires_grad
            else [torch.zeros_like(t) for t in exact]
        )
        size = (
            float(oracle.scores(query.abs(), key.abs(), rule.get("scale")).abs().amax())
            if query.numel() * key.numel()
            else 0.0
        )
        guess = oracle.indexer_scores(*(t.detach().abs() for t in leaves))
        size += float(guess.amax()) if guess.numel() else 0.0
        unit = accumulation(loss.dtype)
        for got, want, name in zip(
            (loss.detach(), *found),
            (wanted.detach(), *true),
            ("loss", "query", "key", "weights"),
            strict=True,
        ):
            assert got.shape == want.shape
            if not want.numel():
                continue
            assert bool(got.isfinite().all()), f"{name} is not finite"
            allowed = unit * (64 + 8 * size * (case["D"] + case["Di"])) * (1 + float(want.abs().max()) + size)
            error = float((got.double() - want).abs().max())
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    def formula(self, index_query, index_key, weights, query, key, seen, scale) -> Tensor:
        guess = oracle.indexer_scores(index_query, index_key, weights)
        alive = seen.any(-1)
        if not bool(alive.any()):
            return guess.new_zeros(())
        each = oracle.scores(query, key, scale).unflatten(1, (index_key.shape[1], -1))
        mass = each.masked_fill(~seen.unsqueeze(2), -math.inf).softmax(-1).nan_to_num(0).mean(2)
        lse = guess.masked_fill(~seen, -math.inf).logsumexp(-1, keepdim=True)
        terms = torch.xlogy(mass, mass) - mass * (guess - lse.where(alive.unsqueeze(-1), 0.0))
        return terms.where(seen, 0.0).sum() / alive.sum()


@fuzzed
class KeySelector(Fuzzed):
    name = "KeySelector"
    weight = 1
    dtypes = ("float32",)

    def draw(self, draw: Draw) -> Case:
        case = {
            "B": draw.size(2),
            "Hq": draw.randint(1, 3),
            "Tq": draw.size(20),
            "Tk": draw.size(40),
            "D": draw.size(17, 1),
        }
        case |= draw_kinds(draw, "query") | {"query_values": "normal", "hidden": draw.size(17, 1)}
        case |= {"top_k": draw.size(40, 1), "relative": draw.random() < 0.4}
        if case["relative"]:
            case["Tk"] = max(case["Tk"], case["Tq"])
        case |= {"causal_offset": draw.randint(0, max(0, case["Tk"] - case["Tq"]))}
        return case | {"is_causal": case["relative"] or draw.random() < 0.5, "longer": draw.size(5)}

    def check(self, case: Case) -> None:
        query = tensor(case, "query", case["B"], case["Hq"], case["Tq"], case["D"])
        length = max(1, case["Tk"] + case["longer"])
        selector = sparse_attn.nn.KeySelector(
            case["D"],
            length,
            case["top_k"],
            num_heads=case["Hq"],
            hidden=case["hidden"],
            relative=case["relative"],
        )
        with torch.no_grad():
            for number, parameter in enumerate(selector.parameters()):
                source = generator(case, f"parameter {number}")
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
        offset = case["causal_offset"] if case["is_causal"] else None
        options = {"is_causal": case["is_causal"], "causal_offset": offset}
        indices = call(case, selector.select, query, key_length=case["Tk"], backend=case["wing"], **options)
        with torch.no_grad():
            rank = selector(query, **options)[..., : case["Tk"]].double()
            features = selector._features(query).double().abs()
            sizes = (
                features @ selector.positions.weight.double().abs()
                + selector.positions.bias.double().abs().unsqueeze(1)
            )
        seen = oracle.visible(
            query,
            query.new_empty(case["B"], case["Hq"], case["Tk"], 1),
            **{**options, "causal_offset": offset},
        )
        assert DTYPES[case["dtype"]] == torch.float32
        key = query.new_empty(case["B"], case["Hq"], case["Tk"], 1)
        assert_well_formed(indices, query, key, case["top_k"], **options)
        if indices.numel():
            error = (case["hidden"] + 8) * 2.0**-23 * (sizes.amax(-1, keepdim=True))
            assert_highest(indices, rank, error.expand(rank.shape), seen, oracle.forced(query, key))
