"""Measures the cheap selections beside dense and exact attention: figures beside their targets, a JSON and a PNG.

    python -m benchmarks.experiments.cheap_selection             some four minutes, into benchmarks/results
    python -m benchmarks.experiments.cheap_selection --quick     short sequences, into benchmarks/scratch

B1 H8 D64 causal, independent random numbers, one selection for all heads by an indexer of 4 heads × 32, tiles and
blocks of 64. Results are compared with the reference before anything is timed; contenders take turns, medians. Dense
attention past T=16,384 is measured on one of the 8 heads and counted eight times; its rows say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from sparse_attn.bench import machine, registry, timing
from sparse_attn.bench.attention import AttentionCase
from sparse_attn.bench.cases.block_attention import BLOCK

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCRATCH = RESULTS.parent / "scratch"
HEADS, DENSE_MAX = 8, 16384
SETTING = "B1 H8 D64 causal, float32, random inputs; indexer 4 heads × 32, blocks and tiles of 64"


@dataclass
class Group:
    """Calls on the same inputs; the first is what the others are compared with."""

    name: str
    calls: dict[str, Callable[[], object]]
    targets: dict[str, float] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)  # a call that does one of so many equal parts


def after_selection(length: int, top_k: int) -> Group:
    """An indexer chooses for all heads, gathered attention follows."""
    selects, inputs = choosers(length, top_k, ("ours", "int8"))
    query, key = inputs["query"], inputs["key"]
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(1))
    indices = selects["ours"]()
    _check_attention(query, key, value, indices)

    def both(name: str) -> Callable[[], object]:
        return lambda: sparse_attn.gathered_attention(query, key, value, selects[name]())

    calls = {
        "SDPA (dense)": lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        "topk_attention, exact, per head": lambda: sparse_attn.topk_attention(
            query, key, value, top_k, is_causal=True
        ),
        "indexer_select + gathered_attention": both("ours"),
        "indexer_select int8 + gathered_attention": both("int8"),
        "indexer_select alone": selects["ours"],
        "indexer_select int8 alone": selects["int8"],
        "gathered_attention alone": lambda: sparse_attn.gathered_attention(query, key, value, indices),
    }
    targets = {"indexer_select + gathered_attention": 8.0} if length == 16384 else {}
    return Group(f"attention, T={length:,}, {top_k} keys per query, forward", calls, targets)


def by_blocks(length: int, count: int, backward: bool) -> Group:
    """Each tile chooses whole blocks by their mean keys and attends to them."""
    op = registry.op("block_attention")
    direction = "both" if backward else "forward"
    case = AttentionCase("block_attention", length, direction=direction, top_k=count * BLOCK)
    inputs = op.inputs(case)
    tensors, times = inputs, 1
    if length > DENSE_MAX:
        tensors, times = tuple(t[:, :1] for t in inputs), HEADS
    names = {"ours": "block_select + block_attention", "attend": "block_attention alone"}
    works = {"SDPA (dense)": op.prepare("sdpa", case, tensors)}
    for name, label in names.items():
        works[label] = op.prepare(name, case, inputs)
        if length <= DENSE_MAX:  # the float64 of longer ones does not fit beside them
            op.check(name, case, inputs, works[label])
    calls = {label: timing.bound(work.forward, work.leaves, direction) for label, work in works.items()}
    direction = "forward + backward" if backward else "forward"
    targets = {names["ours"]: 30.0} if length == 65536 and not backward else {}
    name = f"attention, T={length:,}, {count} blocks of {BLOCK}, {direction}"
    return Group(name, calls, targets, {"SDPA (dense)": times})


def selection_alone(length: int, top_k: int) -> Group:
    labels = registry.op("indexer_select").labels
    order = ("exact", "exact_all", "quantized", "ours", "int8")
    calls, _ = choosers(length, top_k, order)
    named = {labels[name]: calls[name] for name in order}
    return Group(f"selection alone, T={length:,}, {top_k} keys per query", named)


def choosers(length: int, top_k: int, names: tuple[str, ...]) -> tuple[dict[str, Callable], dict]:
    """(the choice of each contender, checked; the tensors that it is made on)."""
    op, case = registry.op("indexer_select"), AttentionCase("indexer_select", length, top_k=top_k)
    inputs, calls = op.inputs(case), {}
    for name in names:
        work = op.prepare(name, case, inputs)
        op.check(name, case, inputs, work)
        calls[name] = lambda work=work: work.forward(*work.leaves)
    return calls, inputs


def _check_attention(query, key, value, indices) -> None:
    """The last queries' outputs against float64."""
    last = slice(query.shape[2] - 16, None)
    got = sparse_attn.gathered_attention(query, key, value, indices)[:, :, last]
    with sparse_attn.use_backend("reference"):
        wide = (t.double() for t in (query[:, :, last], key, value))
        want = sparse_attn.gathered_attention(*wide, indices[:, :, last])
    error = (got - want).abs().max().item()
    if not error < 1e-5:
        raise AssertionError(f"gathered_attention is off by {error}")


def groups(quick: bool) -> list[Callable[[], Group]]:
    """Made one at a time: each holds inputs and results of its own."""
    short, middle, long = (2048, 2048, 4096) if quick else (16384, 8192, 65536)
    return [
        lambda: after_selection(short, 64),
        lambda: after_selection(short, 256),
        lambda: by_blocks(long, 16, False),
        lambda: by_blocks(middle, 16, True),
        lambda: selection_alone(short, 64),
        lambda: selection_alone(short, 256),
    ]


def measure(group: Group, quick: bool) -> list[dict]:
    times = timing.interleave(group.calls, budget=2 if quick else 40, rounds=9)
    first = next(iter(group.calls))
    base = times[first].median * group.times.get(first, 1)
    rows = []
    for name in group.calls:
        parts = group.times.get(name, 1)
        low, high = times[name].quartiles()
        rows.append(
            {
                "group": group.name,
                "call": name if parts == 1 else f"{name}, one head measured, × {parts}",
                "milliseconds": 1e3 * parts * times[name].median,
                "quartiles": [1e3 * parts * low, 1e3 * parts * high],
                "rounds": len(times[name].samples),
                "faster": base / (parts * times[name].median),
                "target": group.targets.get(name),
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            print(f"{group}\n  {'':48} {'ms':>9}  × as fast as the first row")
        target = "" if row["target"] is None else f"   at least {row['target']:g}: {verdict(row)}"
        print(f"  {row['call']:48} {row['milliseconds']:9.1f}  {row['faster']:6.2f}{target}")


def verdict(row: dict) -> str:
    return "met" if row["faster"] >= row["target"] else "falls short"


def draw(results: dict, path: Path) -> None:
    """Times as fast as the first row of each group, a panel per group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sparse_attn.bench.plots import ratio_bars

    names = list(dict.fromkeys(row["group"] for row in results["rows"]))
    figure, axes = plt.subplots(-(-len(names) // 2), 2, figsize=(19, 13), layout="constrained")
    figure.suptitle(f"sparse_attn: cheap selection ({results['setting']})", fontsize=14, weight="bold")
    figure.supxlabel(machine.in_words(results["machine"]), fontsize=9, color="#555555")
    for axis, name in zip(axes.flat, names, strict=False):
        first, *rest = (row for row in results["rows"] if row["group"] == name)
        bars = [
            (f"{row['call']}\n{row['milliseconds']:.0f} ms", row["faster"], row["target"]) for row in rest
        ]
        ratio_bars(axis, bars, f"{name}\ntimes as fast as {first['call']} ({first['milliseconds']:,.0f} ms)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.cheap_selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the two files")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for make in groups(args.quick):
        group = make()
        print(group.name, file=sys.stderr, flush=True)
        rows += measure(group, args.quick)
    command = "python -m benchmarks.experiments.cheap_selection" + " --quick" * args.quick
    command += f" --threads {args.threads}"
    results = {
        "format": 1,
        "setting": SETTING,
        "machine": machine.describe(args.threads, command),
        "rows": rows,
    }
    folder = args.out or (SCRATCH if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "cheap_selection_cpu.json").write_text(text + "\n", "utf-8")
    draw(results, folder / "cheap_selection_cpu.png")
    print_rows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
