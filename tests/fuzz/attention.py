"""Cases of topk_select, quantized_select, topk_attention, its residual, and gathered_attention."""

from __future__ import annotations

import math

import torch
from helpers import oracle
from helpers.compare import accumulation, assert_highest, assert_identical, assert_well_formed, rank_errors
from helpers.inputs import index_rows
from torch import Tensor

import sparse_attn
from fuzz.bounds import Attention, assert_bounded, attention_to
from fuzz.case import (
    DTYPES,
    EXTREME,
    SPECIAL,
    VIEWS,
    Case,
    Draw,
    Fuzzed,
    among,
    bits,
    call,
    draw_kinds,
    draw_view,
    fuzzed,
    generator,
    is_exact,
    run,
    tensor,
)
from fuzz.rules import OPTIONS, SCORING, draw_rule, one_offset, rule_of


def draw_sizes(draw: Draw, *, value: bool) -> Case:
    """B, Hq, Hkv, Tq, Tk, D and Dv, of a product that an oracle goes through quickly."""
    large = draw.large
    most = 2_000_000 if large else 12_000
    kv_heads = draw.choice((1, 1, 2, 3))
    case = {
        "B": draw.choice((1, 1, 1, 2, 3, 0)),
        "Hkv": kv_heads,
        "Hq": kv_heads * draw.choice((1, 1, 2, 3, 4)),
    }
    sizes = (20, 70, 30, 700, 16) if large else (0, 33, 0, 130, 1)
    case |= {"Tq": draw.size(sizes[1], sizes[0]), "Tk": draw.size(sizes[3], sizes[2])}
    case |= {name: draw.size(256, sizes[4]) for name in (("D", "Dv") if value else ("D",))}
    while case["B"] * case["Hq"] * case["Tq"] * case["Tk"] * max(case["D"], case.get("Dv", 1)) > most:
        name = draw.choice(("Tq", "Tk", "D", "Dv") if value else ("Tq", "Tk", "D"))
        case[name] = (case[name] + 1) // 2
    return case


def draw_budget(draw: Draw, case: Case) -> int:
    return draw.choice((draw.size(max(1, case["Tk"] + 3), 1), case["Tk"] or 1, draw.choice((1, 2**40))))


def query_key(case: Case) -> tuple[Tensor, Tensor]:
    query = tensor(case, "query", case["B"], case["Hq"], case["Tq"], case["D"])
    return query, tensor(case, "key", case["B"], case["Hkv"], case["Tk"], case["D"])


def check_indices(case: Case, indices: Tensor, query: Tensor, key: Tensor, top_k: int, rule: Case) -> None:
    """The contract, and what the scores say: the very indices where scores are exact, else none better left out."""
    per_head = indices.shape[1] == query.shape[1]
    names = ("query", "key")
    if is_exact(case, *names) and per_head and rule.get("scale") != 1e-3:
        return assert_identical(indices, query, key, top_k, **rule)
    assert_well_formed(indices, query, key, top_k, **rule)
    if indices.numel() == 0 or among(case, SPECIAL + EXTREME, *names):
        return None
    rank, error = oracle.ranks(query, key, **rule), rank_errors(query, key, **rule)
    seen = oracle.first_of_group(oracle.visible(query, key, **rule), indices.shape[1])
    return assert_highest(
        indices, rank, error * (1 + (case["dtype"] == "float64")), seen, oracle.forced(query, key, **rule)
    )


def draw_index(draw: Draw) -> Case:
    return draw.maybe(
        0.3, lambda: {"key_index": draw.choice(("of", "room", "appended", "cropped", "reordered"))}, {}
    )


def index_of(case: Case, key: Tensor) -> sparse_attn.KeyIndex:
    """Of the keys, made as the case says."""
    how, length = case["key_index"], key.shape[2]
    some = case["seed"] % (length + 1)
    if how == "room":
        return sparse_attn.KeyIndex.of(key, capacity=case["seed"] % 300)
    if how == "appended":
        index = sparse_attn.KeyIndex.of(key[:, :, :some])
        middle = (some + length) // 2
        return index.append(key[:, :, some:middle]).append(key[:, :, middle:])
    if how == "cropped":
        index = sparse_attn.KeyIndex.of(torch.cat((key, key[:, :, :some].flip(1) * 2), dim=2))
        index.crop(some)
        return index.append(key[:, :, some:])
    if how == "reordered" and key.shape[0]:
        order = torch.arange(key.shape[0]).flip(0)
        return sparse_attn.KeyIndex.of(key.flip(0)).reorder(order)
    return sparse_attn.KeyIndex.of(key)


@fuzzed
class TopkSelect(Fuzzed):
    name = "topk_select"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=False)
        case |= draw_kinds(draw, "query", "key") | {"top_k": draw_budget(draw, case)}
        return draw_rule(draw, case) | draw_index(draw)

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        rule = rule_of(case)
        indices = run(case, "topk_select", query, key, case["top_k"], **rule)
        check_indices(case, indices, query, key, case["top_k"], rule)
        if "key_index" in case:
            found = run(case, "topk_select", query, key, case["top_k"], key_index=index_of(case, key), **rule)
            assert torch.equal(found, indices), "an index of the keys changes the selection"


@fuzzed
class QuantizedSelect(TopkSelect):
    name = "quantized_select"

    def draw(self, draw: Draw) -> Case:
        return {name: value for name, value in super().draw(draw).items() if name != "key_index"}

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        rule, top_k = rule_of(case), case["top_k"]
        indices = run(case, "quantized_select", query, key, top_k, **rule)
        assert_well_formed(indices, query, key, top_k, **rule)
        if indices.numel() == 0 or among(case, SPECIAL + EXTREME, "query", "key"):
            return
        unit = accumulation(query.dtype) / accumulation(torch.float64)
        query, key = oracle.rounded(query), oracle.rounded(key)
        rank, error = oracle.ranks(query, key, **rule), rank_errors(query, key, **rule) * max(2, unit)
        seen = oracle.first_of_group(oracle.visible(query, key, **rule), indices.shape[1])
        assert_highest(indices, rank, error, seen, oracle.forced(query, key, **rule))


# ---- attention to a selection -----------------------------------------------------------------------------------


def draw_gradients(draw: Draw) -> Case:
    case = {"grads": draw.choice((None, None, "out", "lse", "both"))}
    return case | draw_kinds(draw, "grad_out")


def leaves_of(case: Case, *tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() if case["grads"] else t for t in tensors]


def scoring_of(rule: Case) -> Case:
    return {
        name: rule[name].detach() if name == "sink_logits" else rule[name] for name in SCORING if name in rule
    }


def sink_leaf(case: Case, rule: Case) -> list[Tensor]:
    """The rule's sink_logits, wanting a gradient where the others do."""
    return leaves_of(case, rule["sink_logits"]) if "sink_logits" in rule else []


def check_attention(case: Case, out: Tensor, lse: Tensor, leaves: list[Tensor], exact: Attention) -> None:
    """Out, lse and gradients of leaves (query, key, value and sink_logits, where there are any)."""
    assert out.dtype == leaves[0].dtype
    assert lse.dtype == torch.float32
    names, given = ["query", "key", "value"], [*leaves]
    if among(case, EXTREME, *names):
        if case["grads"]:
            torch.autograd.grad(out.float().sum() + lse.sum(), leaves)
        return
    for got, wanted, name in zip((out, lse), exact.forward(), ("out", "lse"), strict=True):
        assert_bounded(got.detach(), wanted, name)
    if not case["grads"]:
        return
    dead = exact.lse.squeeze(-1) == -math.inf
    outs, grads = [], []
    grad_out, grad_lse = torch.zeros_like(out), None
    if case["grads"] != "lse":
        grad_out = tensor(case, "grad_out", *out.shape)
        outs, grads = [out], [grad_out]
    if case["grads"] != "out":
        grad_lse = torch.randn(lse.shape, generator=generator(case, "grad_lse")).masked_fill(dead, 0.0)
        outs, grads = [*outs, lse], [*grads, grad_lse]
    found = call(case, lambda *g: torch.autograd.grad(outs, leaves, g, retain_graph=True), *grads)
    for got, leaf, name in zip(found, leaves, [*names, "sink_logits"][: len(leaves)], strict=True):
        assert got.dtype == leaf.dtype, f"gradient of {name}: {got.dtype}"
        assert got.shape == leaf.shape, f"gradient of {name}: shape {list(got.shape)}"
    if among(case, EXTREME, "grad_out"):
        return
    if (
        case["op"] in ("block_attention", "varlen_block_attention")
        and case["wing"] == "reference"
        and among(case, SPECIAL, *names, "grad_out")
    ):
        return  # it spoils the gradients of the whole tile
    if len(given) > 3 and not among(case, SPECIAL, *names, "grad_out"):
        assert_bounded(found[3], exact.sink_gradient(grad_out, grad_lse), "gradient of sink_logits")
    found = found[:3]
    for got, wanted, name in zip(found, exact.backward(grad_out, grad_lse), names, strict=True):
        assert_bounded(got, wanted, f"gradient of {name}")


@fuzzed
class TopkAttention(Fuzzed):
    name = "topk_attention"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=True)
        case |= (
            draw_kinds(draw, "query", "key", "value")
            | draw_gradients(draw)
            | {"top_k": draw_budget(draw, case)}
        )
        return draw_rule(draw, case) | draw_index(draw)

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        value = tensor(case, "value", case["B"], case["Hkv"], case["Tk"], case["Dv"])
        rule = rule_of(case)
        leaves, sinks = leaves_of(case, query, key, value), sink_leaf(case, rule)
        out, lse, indices = run(
            case, "topk_attention", *leaves, case["top_k"], return_lse=True, return_indices=True, **rule
        )
        leaves += sinks
        query, key, value = (t.detach() for t in leaves[:3])
        rule |= scoring_of(rule)
        check_indices(case, indices, query, key, case["top_k"], rule)
        check_attention(case, out, lse, leaves, attention_to(query, key, value, indices, **scoring_of(rule)))
        if "key_index" in case:
            index = index_of(case, key)
            found = run(
                case, "topk_attention", query, key, value, case["top_k"], return_lse=True, return_indices=True,
                key_index=index, **rule,
            )  # fmt: skip
            for one, other in zip(found, (out, lse, indices), strict=True):
                assert torch.equal(bits(one), bits(other)), "an index of the keys changes the result"


@fuzzed
class GatheredAttention(Fuzzed):
    name = "gathered_attention"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value") | draw_gradients(draw)
        case |= {
            "G": draw.choice((1, case["Hkv"], case["Hq"])),
            "K": draw.size(40),
            "garbage": draw.random() < 0.4,
        }
        case |= {"wide": draw.random() < 0.3}
        for name in SCORING:
            value = OPTIONS[name](draw, case)
            if value is not None:
                case[name] = value
        return case | {"indices_view": draw_view(draw)}

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        value = tensor(case, "value", case["B"], case["Hkv"], case["Tk"], case["Dv"])
        shape = (case["B"], case["G"], case["Tq"], case["K"])
        indices = rows(case, shape, case["Tk"])
        indices = indices.long() if case["wide"] else indices
        scoring = rule_of(case)
        leaves, sinks = leaves_of(case, query, key, value), sink_leaf(case, scoring)
        out, lse = run(case, "gathered_attention", *leaves, indices, return_lse=True, **scoring)
        exact = attention_to(*(t.detach() for t in leaves), indices, **scoring_of(scoring))
        check_attention(case, out, lse, leaves + sinks, exact)


def rows(case: Case, shape: tuple[int, ...], length: int) -> Tensor:
    """Rows of numbers below `length`, in the case's layout."""
    if shape[-1] == 0:
        return torch.zeros(shape, dtype=torch.int32)
    numbers = index_rows(shape, length, seed=case["seed"], garbage=case["garbage"])
    return VIEWS[case.get("indices_view", "contiguous")](numbers)


@fuzzed
class Residual(Fuzzed):
    name = "topk_attention_with_residual"

    def draw(self, draw: Draw) -> Case:
        case = draw_sizes(draw, value=True)
        case |= draw_kinds(draw, "query", "key", "value") | {"top_k": draw_budget(draw, case)}
        draw_rule(draw, case, "attn_mask")
        one_offset(case)
        return case

    def check(self, case: Case) -> None:
        query, key = query_key(case)
        value = tensor(case, "value", case["B"], case["Hkv"], case["Tk"], case["Dv"])
        rule, top_k = rule_of(case), case["top_k"]
        out = run(case, "topk_attention_with_residual", query, key, value, top_k, **rule)
        assert out.dtype == DTYPES[case["dtype"]]
        assert out.shape == (*query.shape[:3], value.shape[3])
        if out.numel() == 0 or case["Tk"] == 0 or among(case, SPECIAL + EXTREME, "query", "key", "value"):
            assert case["Tk"] or not bool(out.any())
            return
        indices = run(case, "topk_select", query, key, top_k, **rule)
        seen = oracle.visible(query, key, **rule)
        every = Attention(query, key, value, seen.double(), **scoring_of(rule))
        chosen = oracle.multiplicity(query, key, indices) > 0
        outside = seen & ~chosen
        tail = (outside.double() @ every.value) / outside.sum(-1, keepdim=True).clamp(min=1)
        kept = every.p.masked_fill(~chosen, 0.0)
        rest = every.p.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)
        # The lse has an error of its own in float32, whatever the inputs are: a factor on what is left.
        largest = value.double().abs().amax() if value.numel() else 0.0
        error = 4 * largest * (every.relative.amax(-1, keepdim=True) + every.log_error + 2.0**-20)
        error = error + torch.finfo(out.dtype).eps * largest * 2
        assert_bounded(out, (kept @ every.value + rest * tail, error.expand(out.shape)), "out")
