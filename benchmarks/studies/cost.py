"""What attention costs: published speed-ups recomputed, then counted properly, then measured on this machine.

    sparse-attn study cost            some minutes on a quiet machine
    sparse-attn study cost --quick    short sequences alone

Three tables: the published figures beside the formulas that give them; the same models with the choice of keys, the
causal half and all heads counted; and measured seconds per forward pass beside the counts over this machine's peak
rates. Dense attention is measured whole where that takes seconds, and beyond on sampled blocks of queries against their
full context (marked ~). With --threads 1 the seconds are processor time, which a busy machine disturbs little. Lengths
already in the results file are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_attn
from benchmarks.studies import results
from sparse_attn.analysis import (
    Cost,
    Rates,
    Shape,
    block,
    crossover,
    dense,
    indexer,
    mlp,
    projections,
    published,
    topk,
)
from sparse_attn.bench.timing import interleave
from sparse_attn.cli.console import count
from sparse_attn.nn import HeadApproximator, KeySelector

HEADS, WIDTH = 8, 64
TOP_K, FEW, BLOCKS = 64, 32, 4
INDEXER_HEADS, INDEXER_WIDTH = 4, 32
FULL = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
QUICK = [64, 256, 1024, 4096]
DENSE_WHOLE, SAMPLED_BLOCKS, SAMPLED_ROWS = 16384, 24, 256
CHECKED = 16384  # where the sampled time stands beside the whole one
# What each is counted as, and the longest sequence it is run on.
COUNTS: dict[str, tuple[Callable[[Shape], Cost], int]] = {
    "dense": (dense, 2**20),
    "top-k, exact": (lambda s: topk(s, TOP_K), 65536),
    "top-k, indexer": (lambda s: indexer(s, TOP_K, heads=INDEXER_HEADS, dim=INDEXER_WIDTH), 65536),
    "blocks": (lambda s: block(s, BLOCKS), 131072),
    "small networks": (lambda s: mlp(s, 8, selector_hidden=128, approximator_hidden=128), 8192),
    "keys given": (lambda s: topk(s, TOP_K, indices_given=True), 131072),
    "32 keys given": (lambda s: topk(s, FEW, indices_given=True), 131072),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)
    parser.add_argument("--lengths", type=count(1), nargs="+", help="sequence lengths")


def execute(arguments: argparse.Namespace) -> int:
    found = results.start("cost", arguments)
    lengths = arguments.lengths or (QUICK if arguments.quick else FULL)
    show_published()
    if "rates" not in found.about:
        found.about["rates"] = peak_rates(arguments.quick)
        found.about["setting"] = f"B1 H{HEADS} D{WIDTH} causal float32, K={TOP_K}, {BLOCKS} blocks of 64"
    rates = Rates(**found.about["rates"])
    with results.bar("lengths", len(lengths)) as advance:
        for length in lengths:
            missing = [
                method
                for method, (_, longest) in COUNTS.items()
                if length <= longest and found.row(method=method, length=length) is None
            ]
            for row in measure(missing, length) if missing else ():
                found.add(row)
                results.say(f"T={length} {row['method']}: {row['seconds'] * 1e3:.2f} ms")
            advance()
    if not arguments.quick and "sampling" not in found.about:
        whole = found.row(method="dense", length=CHECKED)
        if whole is not None:
            sampled = dense_by_samples(*inputs(CHECKED))
            found.about["sampling"] = {"length": CHECKED, "sampled_over_whole": sampled / whole["seconds"]}
    conclude(found, rates)
    found.save()
    show_measured(found, lengths, rates)
    draw(found, rates)
    found.wrote()
    return 0


# --- published ---------------------------------------------------------------------------------------------------


def show_published() -> None:
    rows = [
        [f.table, f.label, f"{f.published:g}", f"{f.computed:.3f}", agreement(f)] for f in published.figures()
    ]
    results.show(
        "Published figures, none of them measured",
        ["table", "case", "published", "by formula", "agrees"],
        rows,
    )
    results.show(
        "The same models, the two networks counted for every head",
        ["model", "published", "all heads", "and causal", "and projections"],
        [list(row) for row in corrected()],
    )


def agreement(figure: published.Figure) -> str:
    """Whether they are one number to the last published digit, or how far apart they are."""
    digits = {"script, speed-up": 2, "README, speed-up": 2, "embedding, parameters": 3}.get(figure.table, 0)
    if round(figure.computed, digits) == figure.published:
        return "yes"
    return f"to {abs(figure.computed - figure.published):.3f}" if figure.agrees else "NO"


def corrected() -> list[tuple[str, ...]]:
    """Speed-up by count of the small networks over dense attention, one correction after the other."""
    rows = []
    for width, length in published.README_SIZES:
        heads = width // published.HEAD_DIM
        ratios = [f"{published.readme_ratio(width, length):.2f}×"]
        rows.append(
            (
                f"{width}d, T={length}",
                *ratios,
                *_ratios(length, heads, published.HEAD_DIM, published.TOP_K, 128),
            )
        )
    for length in (8192, 128_000):
        ratio = f"{published.large_model_ratio(length):,.0f}×"
        rows.append((f"16384d, T={length}", ratio, *_ratios(length, 128, 128, 32, 128)))
    return rows


def _ratios(length: int, heads: int, width: int, top_k: int, hidden: int) -> list[str]:
    found = []
    for is_causal in (False, True):
        shape = Shape(length, num_heads=heads, head_dim=width, is_causal=is_causal)
        full = dense(shape).flops
        small = mlp(shape, top_k, selector_hidden=hidden, approximator_hidden=hidden).flops
        found.append(f"{full / small:.2f}×")
    same = projections(shape).flops
    return [*found, f"{(full + same) / (small + same):.2f}×"]


# --- measured ----------------------------------------------------------------------------------------------------


def peak_rates(quick: bool) -> dict[str, float]:
    """This machine's best per second: operations of a matrix product, bytes in order, bytes of rows in cache."""
    side = 1024 if quick else 2048
    left, right, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    numbers = torch.zeros(2**24 if quick else 2**26)
    copied = torch.empty_like(numbers)
    rows, bags = torch.randn(8192, WIDTH), torch.randint(8192, (4096, TOP_K))
    return {
        "flops": 2 * side**3 / best(lambda: torch.matmul(left, right, out=out)),
        "stream": 8 * numbers.numel() / best(lambda: copied.copy_(numbers)),
        "gather": 4 * WIDTH * bags.numel() / best(lambda: F.embedding_bag(bags, rows, mode="sum")),
    }


def best(call: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the quickest of `rounds` calls."""
    return min(timed(call) for _ in range(rounds))


def clock() -> float:
    """With one thread the processor's own time, so that what else the machine does counts for little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers, [1, H, T, D] each."""
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3))


@torch.no_grad()
def measure(methods: list[str], length: int) -> list[dict]:
    """Median seconds of each method, by turns; sequences that take long get one round."""
    query, key, value = inputs(length)
    sampled = length > DENSE_WHOLE
    whole = [m for m in methods if m != "dense" or not sampled]
    calls = {method: call_of(method, query, key, value) for method in whole}
    times = interleave(calls, budget=10.0, least=1 if sampled else 3, clock=clock)
    found = {m: (t.median, len(t.samples)) for m, t in times.items()}
    if len(whole) < len(methods):
        found["dense"] = dense_by_samples(query, key, value), 1
    return [
        {
            "method": method,
            "length": length,
            "seconds": found[method][0],
            "rounds": found[method][1],
            "sampled": sampled and method == "dense",
        }
        for method in methods
    ]


def call_of(method: str, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """One forward pass; tensors are [1, H, T, D]. Learned parts are random: their cost does not depend on it."""
    length = query.shape[2]
    if method == "dense":
        return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if method == "top-k, exact":
        return lambda: sparse_attn.topk_attention(query, key, value, TOP_K, is_causal=True)
    if method == "top-k, indexer":
        sizes = (1, INDEXER_HEADS, length, INDEXER_WIDTH)
        q, k, w = torch.randn(sizes), torch.randn(1, 1, length, INDEXER_WIDTH), torch.rand(sizes[:3])

        def indexed() -> Tensor:
            chosen = sparse_attn.indexer_select(q, k, w, TOP_K, is_causal=True)
            return sparse_attn.gathered_attention(query, key, value, chosen)

        return indexed
    if method == "blocks":

        def blocked() -> Tensor:
            chosen = sparse_attn.block_select(query, key, BLOCKS, is_causal=True)
            return sparse_attn.block_attention(query, key, value, chosen, is_causal=True)

        return blocked
    if method == "small networks":
        selector = KeySelector(WIDTH, length, 8, num_heads=HEADS, hidden=128)
        approximator = HeadApproximator(WIDTH, 8, num_heads=HEADS, hidden=128)
        return lambda: approximator(value, selector.select(query))
    indices = random_keys(length, FEW if method == "32 keys given" else TOP_K)
    return lambda: sparse_attn.gathered_attention(query, key, value, indices)


def random_keys(length: int, top_k: int) -> Tensor:
    """Distinct visible keys at random places, one in each of top_k equal stretches: int32 [1, H, T, K]."""
    top_k = min(top_k, length)
    seen = torch.arange(1, length + 1, dtype=torch.float32)[:, None]
    edges = torch.floor(seen * torch.arange(top_k + 1) / top_k)
    width = edges[:, 1:] - edges[:, :-1]
    chosen = edges[:, :-1] + torch.floor(torch.rand(HEADS, length, top_k) * width)
    chosen = torch.where(width > 0, chosen, length).sort(-1).values.to(torch.int32)  # empty slots go last
    return torch.where(chosen == length, -1, chosen)[None]


@torch.no_grad()
def dense_by_samples(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Seconds of dense causal attention: blocks of queries spread evenly, each against all keys before its middle."""
    length = query.shape[2]
    blocks = length // SAMPLED_ROWS
    total = 0.0
    for i in range(SAMPLED_BLOCKS):
        place = int((i + 0.5) * blocks / SAMPLED_BLOCKS)
        rows = query[:, :, place * SAMPLED_ROWS : (place + 1) * SAMPLED_ROWS]
        seen = place * SAMPLED_ROWS + SAMPLED_ROWS // 2
        keys, values = key[:, :, :seen], value[:, :, :seen]
        total += timed(lambda r=rows, k=keys, v=values: F.scaled_dot_product_attention(r, k, v))
    return total * blocks / SAMPLED_BLOCKS


# --- conclusions -------------------------------------------------------------------------------------------------


def predicted(method: str, length: int, rates: Rates) -> float:
    return rates.seconds(COUNTS[method][0](Shape(length, num_heads=HEADS, head_dim=WIDTH)))


def speedups(found: results.Results, method: str) -> list[tuple[int, float]]:
    """(length, measured speed-up over dense), by length."""
    pairs = []
    for row in sorted(found.having(method=method), key=lambda r: r["length"]):
        full = found.row(method="dense", length=row["length"])
        if full is not None:
            pairs.append((row["length"], full["seconds"] / row["seconds"]))
    return pairs


def conclude(found: results.Results, rates: Rates) -> None:
    """Crossovers, and where 500× would be: by the model, and by the measured line continued."""
    found.about["conclusions"] = {}
    for method in COUNTS:
        if method == "dense":
            continue
        measured = speedups(found, method)
        model = [
            crossover(
                lambda t, m=method: predicted(m, t, rates),
                lambda t: predicted("dense", t, rates),
                factor=factor,
            )
            for factor in (1.0, 500.0)
        ]
        found.about["conclusions"][method] = {
            "crossover_model": model[0],
            "crossover_measured": measured_crossover(measured),
            "best_measured": max((s for _, s in measured), default=None),
            "length_of_500_model": model[1],
            # Where the counts level off below that, a line of measured times says nothing.
            "length_of_500_measured": continued(measured, 500.0) if model[1] else None,
        }


def measured_crossover(pairs: list[tuple[int, float]]) -> int | None:
    """The length from which the speed-up stays above 1, between two lengths on a straight line in logarithms; 0
    where it is so from the shortest on."""
    below = [i for i, (_, s) in enumerate(pairs) if s <= 1]
    if not below:
        return 0
    if below[-1] == len(pairs) - 1:
        return None
    (short, low), (long, high) = pairs[below[-1]], pairs[below[-1] + 1]
    share = -math.log(low) / (math.log(high) - math.log(low))
    return round(math.exp(math.log(short) + share * (math.log(long) - math.log(short))))


def continued(pairs: list[tuple[int, float]], factor: float) -> int | None:
    """Where a line through the last three points in logarithms reaches `factor`; None if it rises slower than T^¼."""
    last = [(math.log(t), math.log(s)) for t, s in pairs[-3:]]
    if len(last) < 3:
        return None
    x, y = (sum(p[i] for p in last) / 3 for i in (0, 1))
    slope = sum((p[0] - x) * (p[1] - y) for p in last) / sum((p[0] - x) ** 2 for p in last)
    return round(math.exp(x + (math.log(factor) - y) / slope)) if slope > 0.25 else None


def show_measured(found: results.Results, lengths: list[int], rates: Rates) -> None:
    peaks = f"{rates.flops / 1e9:,.0f} GFLOP/s, {rates.stream / 1e9:.1f} GB/s, gathered {rates.gather / 1e9:.1f} GB/s"
    table = []
    for method in COUNTS:
        cells = [method]
        for length in lengths:
            row = found.row(method=method, length=length)
            mark = "~" if row and row["sampled"] else ""
            cells.append(
                ""
                if row is None
                else f"{mark}{pretty(row['seconds'])} ({pretty(predicted(method, length, rates))})"
            )
        table.append(cells)
    for first in range(0, len(lengths), 4):
        chosen = [0, *range(1 + first, 1 + min(first + 4, len(lengths)))]
        results.show(
            f"Seconds measured (predicted from {peaks})",
            ["method", *(f"T={lengths[i - 1]}" for i in chosen[1:])],
            [[cells[i] for i in chosen] for cells in table],
        )
    results.show(
        "Against dense attention",
        [
            "method",
            "pays from T: model",
            "measured",
            "best measured",
            "500× at T: model",
            "measured, continued",
        ],
        [
            [
                method,
                *(number(c[f"crossover_{k}"]) for k in ("model", "measured")),
                f"{c['best_measured']:.2f}×" if c["best_measured"] else "",
                *(number(c[f"length_of_500_{k}"]) for k in ("model", "measured")),
            ]
            for method, c in found.about["conclusions"].items()
        ],
    )


def number(value: int | None) -> str:
    return "never" if value is None else "the shortest" if value == 0 else f"{value:,}"


def pretty(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def draw(found: results.Results, rates: Rates) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 7), layout="constrained")
    for i, method in enumerate(COUNTS):
        rows = sorted(found.having(method=method), key=lambda r: r["length"])
        lengths = [r["length"] for r in rows]
        left.plot(lengths, [r["seconds"] for r in rows], marker="o", color=f"C{i}", label=method)
        left.plot(lengths, [predicted(method, n, rates) for n in lengths], ":", color=f"C{i}")
        if method != "dense":
            right.plot(*zip(*speedups(found, method), strict=True), marker="o", color=f"C{i}", label=method)
    claimed = [8192, 128_000]
    right.plot(
        claimed,
        [published.large_model_ratio(n) for n in claimed],
        "k*",
        markersize=12,
        label="published, not measured",
    )
    right.axhline(1, color="black", linewidth=1)
    left.set(title="Forward pass (dotted: counted work at this machine's peak rates)", ylabel="seconds")
    right.set(title="Times as fast as dense attention (above 1: faster)", ylabel="dense time over its time")
    ticks = sorted({r["length"] for r in found.rows} | {131072})
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="sequence length T")
        axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"What attention costs ({found.about['setting']})")
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
