"""The standard tables: everything that the case files of one suite (or one op) say, as one JSON-able dict."""

from __future__ import annotations

from dataclasses import fields

import torch

from sparse_attn.bench import inputs, machine, registry, runner
from sparse_attn.bench.attention import SETTING
from sparse_attn.bench.bands import BandCase
from sparse_attn.bench.registry import Op
from sparse_attn.bench.runner import Settings, Step

SECTIONS = ("headline", "real", "know_before_use")


def steps(ops: list[Op], quick: bool) -> int:
    """How often `run` tells what comes next."""
    lengths = {case.length for op in ops for cases in op.scaling().values() for case in cases}
    single = sum(len(op.comparisons(quick)) + len(op.peaks(quick)) for op in ops)
    return single + len(lengths) + any(op.overhead() for op in ops)


def run(ops: list[Op], quick: bool, threads: int, max_length: int | None, command: str, step: Step) -> dict:
    """All measurements of these ops; `step` is told what comes next."""
    settings = Settings.of(quick, threads, max_length)
    with torch.random.fork_rng(devices=[]):
        # The cheap ones that depend on other processes first: if they fail, little is lost.
        memory = runner.peak_memory(ops, settings, quick, step)
        overhead = runner.overhead(ops, quick, step)
        planned = [c for op in ops for c in op.comparisons(quick)]
        planned.sort(key=lambda c: SECTIONS.index(c.section))
        rows, skipped = runner.comparisons(planned, settings, step)
        scaling = runner.scaling(ops, settings, step)
    own = [f"{row['name']}: {why}" for row in rows for why in row["left_out"].values()]
    results = {
        "format": 1,
        "setting": SETTING
        if ops[0].suite == "attention"
        else "; ".join(f"{op.name}: {op.setting}" for op in ops),
        "quick": quick,
        "machine": machine.describe(threads, command),
        "real_inputs": inputs.describe_real(),
        **{section: [row for row in rows if row["section"] == section] for section in SECTIONS},
        "scaling": scaling,
        "overhead": overhead,
        "memory": memory,
        "left_out": list(dict.fromkeys(skipped + own)),
    }
    return results | (_flat(ops, results) if ops[0].suite == "widths" else {})


def _flat(ops: list[Op], results: dict) -> dict:
    """The widths' rows one per contender, and their settings, as their JSON has always had them."""
    settings = {"variable_width_embedding": "lookup", "variable_width_cross_entropy": "loss"}
    rows = []
    for row in results["headline"]:
        labels = registry.op(row["op"]).labels
        case = row["case"]
        parts = {field.name: case[field.name] for field in fields(BandCase)}
        direction = runner.DIRECTIONS[case["direction"]] + BandCase(**parts).remarks
        facts = {"op": row["op"], "ids": case["ids"], "direction": direction}
        own = {"milliseconds": row["milliseconds"], "over_ours": 1.0, "target": None}
        rows.append({**facts, "contender": labels["ours"], **own})
        for name, rival in row["rivals"].items():
            other = {
                "milliseconds": rival["milliseconds"],
                "over_ours": rival["faster"],
                "target": rival["target"],
            }
            rows.append({**facts, "contender": labels[name], **other})
    return {**{settings.get(op.name, op.name): op.setting for op in ops}, "rows": rows}
