"""The rule of a selection, drawn: one line for each argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers.inputs import mask

from fuzz.case import Case, Draw, generator

MASKS = (
    "[Tk]",
    "[Tq, Tk]",
    "[B, 1, 1, Tk]",
    "[B, 1, Tq, Tk]",
    "[B, H, Tq, Tk]",
    "[1, 1, Tq, 1]",
    "[Tk, Tq].mT",
)


PER_QUERY = ("[B] int32", "[B] int64", "[B, Tq] int32", "[B, Tq] int64")
SOFTCAPS = (0.05, 1.0, 5.0, 30.0, 1e-30, 1e30)
SINKS = ("normal", "normal", "mixed", "high", "low", "none")  # how large the logits of the sinks are


def _offset(draw: Draw, case: Case) -> int | str | None:
    if not case.get("is_causal"):
        return None
    queries, keys = case["Tq"], case["Tk"]
    if queries == keys and draw.random() < 0.5:
        return None
    if draw.random() < 0.25:
        return draw.choice(PER_QUERY)
    far = draw.choice((2**40, -(2**40), 2**61, -(2**61)))
    return draw.choice((keys - queries, keys - queries, 0, draw.randint(-queries - 2, keys + 3), far))


def _budget(draw: Draw, case: Case) -> int:
    """What of top_k is not yet spoken for."""
    left = case["top_k"] - case.get("window", 0) - case.get("sinks", 0)
    return draw.randint(0, left)


# Each: how the argument is drawn, None where it is not given; a mask and lengths are made by `rule_of`.
OPTIONS: dict[str, Callable[[Draw, Case], Any]] = {
    "is_causal": lambda draw, case: draw.maybe(0.5, lambda: True),
    "causal_offset": _offset,
    "attn_mask": lambda draw, case: draw.maybe(0.25, lambda: draw.choice(MASKS)),
    "key_lengths": lambda draw, case: draw.maybe(0.25, lambda: draw.choice(("int32", "int64"))),
    "scale": lambda draw, case: draw.maybe(0.3, lambda: draw.choice((0.3, -0.7, 0.0, 1e-3, 3.0))),
    "window": lambda draw, case: (
        draw.maybe(0.4, lambda: _budget(draw, case)) if case.get("is_causal") else None
    ),
    "sinks": lambda draw, case: draw.maybe(0.3, lambda: _budget(draw, case)),
    "share": lambda draw, case: draw.choice((None, "kv", "all")),
    "key_starts": lambda draw, case: draw.maybe(0.2, lambda: draw.choice(PER_QUERY)),
    "softcap": lambda draw, case: draw.maybe(0.2, lambda: draw.choice(SOFTCAPS)),
    "sink_logits": lambda draw, case: draw.maybe(0.2, lambda: draw_sinks(draw)),
}
# What an op's arguments say of its scores alone.
SCORING = ("scale", "softcap", "sink_logits")


def draw_sinks(draw: Draw) -> str:
    return f"{draw.choice(SINKS)} {draw.choice(('float32', 'float32', 'bfloat16', 'float16', 'float64'))}"


def sinks_of(case: Case) -> torch.Tensor:
    """sink_logits [Hq], exact in float32."""
    kind, dtype = case["sink_logits"].split()
    logits = torch.randn((case["Hq"],), generator=generator(case, "sinks"))
    if kind == "none" or (kind == "mixed" and case["Hq"] > 0):
        logits[:: 1 if kind == "none" else 2] = -torch.inf
    logits = logits + {"low": -30.0, "high": 4.0, "mixed": 2.0}.get(kind, 0.0)
    return logits.to(getattr(torch, dtype))


def per_query(case: Case, name: str, most: int) -> torch.Tensor:
    """Whole numbers [B] or [B, Tq] about 0 … most, now and then the ends of the dtype."""
    axes, dtype = case[name].rsplit(" ", 1)
    shape = (case["B"], case["Tq"])[: 1 + ("Tq" in axes)]
    numbers = torch.randint(-2, most + 3, shape, generator=generator(case, name))
    limits = torch.iinfo(getattr(torch, dtype))
    rare = torch.rand(shape, generator=generator(case, f"rare {name}"))
    numbers = numbers.masked_fill(rare < 0.03, limits.min).masked_fill(rare > 0.97, limits.max)
    return numbers.to(getattr(torch, dtype))


def one_offset(case: Case) -> None:
    """For ops that take one number for all queries."""
    if isinstance(case.get("causal_offset"), str):
        case["causal_offset"] = case["Tk"] - case["Tq"]


def draw_rule(draw: Draw, case: Case, *without: str) -> Case:
    """Into the case, all that is given of the rule."""
    for name, drawn in OPTIONS.items():
        value = None if name in without else drawn(draw, case)
        if value is not None:
            case[name] = value
    return case


def rule_of(case: Case, heads: int | None = None) -> dict[str, Any]:
    """The keywords of the call; `heads`: how many a mask per head is for."""
    rule = {name: case[name] for name in OPTIONS if name in case}
    if "key_lengths" in rule:
        lengths = torch.randint(case["Tk"] + 1, (case["B"],), generator=generator(case, "lengths"))
        rule["key_lengths"] = lengths.to(getattr(torch, rule["key_lengths"]))
    if "key_starts" in rule:
        rule["key_starts"] = per_query(case, "key_starts", case["Tk"])
    if isinstance(rule.get("causal_offset"), str):
        rule["causal_offset"] = per_query(case, "causal_offset", case["Tk"])
    if "sink_logits" in rule:
        rule["sink_logits"] = sinks_of(case)
    if "attn_mask" in rule:
        spec = rule["attn_mask"]
        shared = case.get("share") is not None
        count = 1 if shared and "H" in spec else heads or case["Hq"]
        sizes = {"B": case["B"], "H": count, "Tq": case["Tq"], "Tk": case["Tk"], "1": 1}
        shape = [sizes[n] for n in spec.removesuffix(".mT").strip("[]").split(", ")]
        seen = mask(*shape, seed=case["seed"])
        rule["attn_mask"] = seen.mT if spec.endswith(".mT") else seen
    return rule
