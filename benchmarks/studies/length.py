"""A million tokens on one machine: time, memory and recall of each selection from T = 2^14 to 2^20, one head.

    sparse-attn study length                                       all of it: half an hour on a quiet machine
    sparse-attn study length --lengths 1048576 --methods blocks    one piece; what is in the results file is kept
    sparse-attn study length --quick                               short sequences alone

A method is run whole where its work allows that, and beyond on blocks of queries at evenly spread places, each with the
keys that it sees (marked ~); dense attention likewise. With --threads 1 the seconds are processor time. Before a method
is timed, its output at sampled rows is held against float64: the exact ones for the keys too, all for the attention to
the keys that they chose. What the selections that do not score every pair find is counted on two kinds of inputs:
independent numbers, where nobody can know where the best keys are without looking at all, and grouped ones, where
neighbours look alike, as they suppose.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.studies import results
from benchmarks.studies.cost import clock, continued, pretty
from sparse_attn.bench.memory import peak_of
from sparse_attn.cli.console import count
from sparse_attn.selection import Blocks, Exact, FromIndexer, Hierarchical, Refined, Rule, attend

WIDTH, TOP_K, BLOCK = 64, 256, 64
INDEXER_HEADS, INDEXER_WIDTH = 4, 32
FULL = [2**n for n in range(14, 21)]
QUICK = [2048, 4096]
PLACES = 8  # sampled blocks
CHECKED = 8  # rows that are held against float64, at each of three places
WANTED = 500.0
TOLERANCE = 2e-5  # of the largest value, per row


@dataclass(frozen=True)
class Method:
    """How it chooses keys, and the longest sequence that it is run on whole."""

    whole: int
    in_words: str
    scores_all_pairs: bool = False
    rows: int = 1024  # of a sampled block of queries: a call also packs the keys, which a whole run does once


METHODS = {
    "dense": Method(2**14, "all keys", True, rows=256),
    "exact": Method(2**16, f"{TOP_K} keys of the largest q·k", True),
    "indexer": Method(
        2**16, f"{TOP_K} keys by an indexer of {INDEXER_HEADS} heads × {INDEXER_WIDTH}, int8", True
    ),
    "hierarchical": Method(2**20, f"{TOP_K} keys: blocks of blocks, then blocks, then tokens"),
    "refined blocks": Method(2**20, f"{TOP_K} keys: blocks, then tokens"),
    "blocks": Method(2**20, f"{TOP_K // BLOCK} blocks of {BLOCK}"),
}
RECALLED = ("hierarchical", "refined blocks", "blocks")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)
    parser.add_argument("--lengths", type=count(1024), nargs="+", help="sequence lengths, multiples of 256")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument(
        "--parts", nargs="+", choices=("times", "recall", "decoding"), default=["times", "recall", "decoding"]
    )


def execute(arguments: argparse.Namespace) -> int:
    found = results.start("length", arguments)
    lengths = arguments.lengths or (QUICK if arguments.quick else FULL)
    found.about["setting"] = f"B1 H1 D{WIDTH} causal float32, {TOP_K} keys per query"
    parts = [(measure_method, m) for m in arguments.methods if "times" in arguments.parts]
    parts += [(measure_recall, m) for m in arguments.methods if "recall" in arguments.parts and m in RECALLED]
    parts += [(measure_decoding, "decoding")] if "decoding" in arguments.parts else []
    with results.bar("pieces", len(lengths) * len(parts)) as advance:
        for length in lengths:
            for measure, name in parts:
                measure(found, name, length)
                advance(f"T={length:,} {name}")
    conclude(found)
    show(found)
    draw(found)
    found.wrote()
    return 0


# --- inputs ------------------------------------------------------------------------------------------------------


def inputs(length: int, kind: str = "independent") -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value, [1, 1, T, D] each: normal numbers, or `grouped`.

    Grouped: the keys of a block of 64 lie around a centre of their own, and the queries of a block look for the
    centre of an earlier block.
    """
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, 1, length, WIDTH, generator=generator) for _ in range(3))
    if kind == "grouped":
        blocks = length // BLOCK
        centres = torch.randn(blocks, WIDTH, generator=generator)
        wanted = (torch.rand(blocks, generator=generator) * torch.arange(1, blocks + 1)).long()
        key.view(blocks, BLOCK, WIDTH).add_(centres[:, None])
        query.view(blocks, BLOCK, WIDTH).add_(centres[wanted][:, None])
    return query, key, value


def index_of(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and weights of an indexer: random, for its cost does not depend on them."""
    generator = torch.Generator().manual_seed(length + 1)
    query = torch.randn(1, INDEXER_HEADS, length, INDEXER_WIDTH, generator=generator)
    key = torch.randn(1, 1, length, INDEXER_WIDTH, generator=generator)
    return query, key, torch.rand(1, INDEXER_HEADS, length, generator=generator)


# --- times -------------------------------------------------------------------------------------------------------


Call = Callable[[slice], Tensor]  # queries → their outputs [1, 1, t, D]


def call_of(method: str, query: Tensor, key: Tensor, value: Tensor) -> Call:
    length = query.shape[2]
    if method == "dense":

        def run_dense(rows: slice) -> Tensor:
            if rows == slice(0, length):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)
            # Every row is given what the middle one sees: the work is that of the block, without a mask's cost.
            seen = (rows.start + rows.stop) // 2
            return F.scaled_dot_product_attention(query[:, :, rows], key[:, :, :seen], value[:, :, :seen])

        return run_dense
    index = index_of(length) if method == "indexer" else None

    def run(rows: slice) -> Tensor:
        q, k, v = query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop]
        rule = Rule(is_causal=True, causal_offset=rows.start)
        if method == "exact":
            return Exact().attend(q, k, v, TOP_K, rule)[0]
        return attend(q, k, v, select(method, q, k, rows, rule, index), rule=rule)

    return run


def select(method: str, q: Tensor, k: Tensor, rows: slice, rule: Rule, index=None):
    if index is not None:
        of_query, of_key, weights = index
        of_rows = of_query[:, :, rows], of_key[:, :, : rows.stop], weights[:, :, rows]
        return FromIndexer(*of_rows, int8=True).select(q, k, TOP_K, rule)
    chooser = {"hierarchical": Hierarchical(BLOCK), "refined blocks": Refined(), "blocks": Blocks()}
    return chooser[method].select(q, k, TOP_K, rule)


@torch.no_grad()
def measure_method(found: results.Results, method: str, length: int) -> None:
    if found.row(method=method, length=length) is not None:
        return
    query, key, value = inputs(length)
    call = call_of(method, query, key, value)
    worst = check(method, query, key, value, call)
    row: dict = {"method": method, "length": length, "error": worst}
    if length <= METHODS[method].whole:
        whole = slice(0, length)
        call(slice(0, min(length, 4096)))  # thread pools and code are there
        out, extra = peak_of(lambda: call(whole))
        del out
        times = [timed(lambda: call(whole)) for _ in range(3 if length <= 2**17 else 1)]
        row |= {"seconds": statistics.median(times), "extra_mb": extra / 1e6, "sampled": False}
    else:
        row |= {"seconds": by_samples(call, length, METHODS[method].rows), "sampled": True}
    found.add(row)
    results.say(f"T={length:,} {method}: {row['seconds']:.4g} s")


def by_samples(call: Call, length: int, rows: int) -> float:
    """Seconds of the whole from blocks of queries at evenly spread places: their mean times the number of blocks."""
    blocks = length // rows
    call(slice(0, rows))
    total = 0.0
    for i in range(PLACES):
        first = int((i + 0.5) * blocks / PLACES) * rows
        total += timed(lambda f=first: call(slice(f, f + rows)))
    return total * blocks / PLACES


def timed(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def check(method: str, query: Tensor, key: Tensor, value: Tensor, call: Call) -> float:
    """The largest error of sampled rows, over the largest value; raises where a row is not what it should be.

    The keys of the exact selection are those of the largest products in float64 (those that float32 cannot tell apart
    aside); the attention is the float64 one to the keys that were chosen.
    """
    length, worst = query.shape[2], 0.0
    for place in (0.3, 0.6, 0.999):
        first = min(int(place * length / BLOCK) * BLOCK, length - BLOCK)
        rows = slice(first, first + BLOCK)
        if method == "dense":
            continue  # PyTorch's own
        out = call(rows)[0, 0, :CHECKED].double()
        rule = Rule(is_causal=True, causal_offset=rows.start)
        q, k = query[:, :, rows], key[:, :, : rows.stop]
        index = index_of(length) if method == "indexer" else None
        chosen = (
            Exact().select(q, k, TOP_K, rule)
            if method == "exact"
            else select(method, q, k, rows, rule, index)
        )
        for i in range(CHECKED):
            seen = first + i + 1
            scores = key[0, 0, :seen].double() @ query[0, 0, first + i].double() / WIDTH**0.5
            keys = chosen.indices[0, 0, i // chosen.query_tile].long()
            keys = keys[keys >= 0]
            if chosen.block_size is not None:
                keys = (keys[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
                keys = keys[keys < seen]
            if method == "exact":
                best = scores.topk(min(TOP_K, seen)).values.sort().values
                if (scores[keys].sort().values - best).abs().max() > 1e-4:
                    raise AssertionError(f"{method}, T={length}: row {first + i} has not the best keys")
            expected = scores[keys].softmax(0) @ value[0, 0, keys].double()
            error = float((out[i] - expected).abs().max() / expected.abs().max())
            if not error < TOLERANCE:
                raise AssertionError(f"{method}, T={length}: row {first + i} is off by {error:.2g}")
            worst = max(worst, error)
    return worst


# --- recall ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_recall(found: results.Results, method: str, length: int) -> None:
    """Mass and keys found, over blocks of 64 queries at evenly spread places of the second half."""
    for kind in ("independent", "grouped"):
        key_of_row = {"recall_of": method, "length": length, "inputs": kind}
        if found.row(**key_of_row) is not None:
            continue
        query, key, value = inputs(length, kind)
        hits, masses, bests = [], [], []
        for i in range(8):
            first = int(length * (0.5 + (i + 0.5) / 16) / BLOCK) * BLOCK
            rows = slice(first, first + BLOCK)
            q, k, v = query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop]
            rule = Rule(is_causal=True, causal_offset=first)
            chosen, best = select(method, q, k, rows, rule), Exact().select(q, k, TOP_K, rule)
            hits.append(share_found(chosen, best.indices))
            seen = torch.arange(rows.stop) <= torch.arange(rows.start, rows.stop)[:, None]
            every = (q @ k.mT / WIDTH**0.5).masked_fill(~seen, -torch.inf).logsumexp(-1)
            for of, part in ((masses, chosen), (bests, best)):
                lse = attend(q, k, v, part, rule=rule, return_lse=True)[1]
                of.append(float((lse - every).exp().mean()))
        means = {"recall": hits, "mass": masses, "exact_mass": bests}
        found.add(key_of_row | {name: sum(x) / len(x) for name, x in means.items()})


def share_found(chosen, best: Tensor) -> float:
    """How many of the best keys [1, 1, t, K] are among the chosen tokens or blocks."""
    size = chosen.block_size or 1
    indices = chosen.indices.repeat_interleave(chosen.query_tile, 2)[:, :, : best.shape[2]]
    hit = (best[..., :, None] // size == indices[..., None, :]).any(-1) & (best >= 0)
    return float(hit.sum()) / float((best >= 0).sum())


# --- decoding ----------------------------------------------------------------------------------------------------

LAYERS, HEADS, WARM, TOKENS = 2, 4, 3, 8  # of the model that decodes; its cache has one key head a layer


@torch.no_grad()
def measure_decoding(found: results.Results, name: str, length: int) -> None:
    """Milliseconds a token of `generate` with a cache of `length` random keys, dense and sparse in turns."""
    if found.row(decoding=True, length=length) is not None:
        return
    import transformers

    import sparse_attn.integrations.transformers as sparse_transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=HEADS * WIDTH, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=length + 64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    # A dynamic cache copies all of itself for every token.
    room = length + 4 * (WARM + TOKENS)
    cache = transformers.StaticCache(config=config, max_cache_len=room)
    for layer in range(LAYERS):
        _, key, value = inputs(length + BLOCK * layer)
        cache.update(key[:, :, :length], value[:, :, :length], layer)
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    row: dict = {"decoding": True, "length": length, "cache_mb": LAYERS * 2 * length * WIDTH * 4 / 1e6}
    taken: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(2):
        for attention in taken:
            if attention == "dense":
                model.set_attn_implementation("sdpa")
            else:
                sparse_transformers.configure(model, top_k=TOP_K, share="kv", self_test=False)
            token = torch.zeros(1, 1, dtype=torch.long)
            for i in range(WARM + TOKENS):  # the first make the key index
                seconds = timed(lambda t=token: model(input_ids=t, use_cache=True, **{argument: cache}))
                if i >= WARM:
                    taken[attention].append(seconds)
    found.add(row | {f"{a}_ms": 1e3 * statistics.median(t) for a, t in taken.items()})


# --- conclusions -------------------------------------------------------------------------------------------------


def speedups(found: results.Results, method: str) -> list[tuple[int, float]]:
    """(length, dense seconds over its seconds), by length."""
    pairs = []
    for row in sorted(found.having(method=method), key=lambda r: r["length"]):
        dense = found.row(method="dense", length=row["length"])
        if dense is not None:
            pairs.append((row["length"], dense["seconds"] / row["seconds"]))
    return pairs


def conclude(found: results.Results) -> None:
    """Where 500× is passed: between two lengths that were measured, or by the measured line continued."""
    found.about["conclusions"] = {}
    for method in METHODS:
        pairs = speedups(found, method)
        if method == "dense" or not pairs:
            continue
        passed = next((length for length, ratio in pairs if ratio >= WANTED), None)
        onward = None
        if passed is None and not METHODS[method].scores_all_pairs:
            onward = continued(pairs, WANTED)
        best = max(pairs, key=lambda p: p[1])
        found.about["conclusions"][method] = {
            "passed_at": passed, "continued": onward, "best": best[1], "best_at": best[0],
        }  # fmt: skip


def show(found: results.Results) -> None:
    lengths = sorted({r["length"] for r in found.rows if "method" in r})
    cells = []
    for method in METHODS:
        row_of = {r["length"]: r for r in found.having(method=method)}
        if row_of:
            ratios = dict(speedups(found, method))
            cells.append([method, *(cell(row_of.get(n), ratios.get(n), method) for n in lengths)])
    results.show(
        "Seconds of one head's forward, and how many times as fast as dense (~ from sampled blocks of queries)",
        ["method", *(f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else f"{n:,}" for n in lengths)],
        cells,
    )
    rows = [r for r in found.rows if "extra_mb" in r]
    results.show(
        "Peak memory beyond inputs of 3 × 4·T·64 bytes, output included, MB (whole runs)",
        ["method", *(f"{n:,}" for n in lengths)],
        [
            [
                m,
                *(
                    f"{r['extra_mb']:,.0f}" if (r := found.row(method=m, length=n)) in rows else ""
                    for n in lengths
                ),
            ]
            for m in METHODS
            if found.having(method=m)
        ],
    )
    results.show(
        "500 times as fast as dense",
        ["method", "best measured", "at T", "passed at T, measured", "continued to T"],
        [
            [m, f"{c['best']:.1f}×", f"{c['best_at']:,}", number(c["passed_at"]), number(c["continued"])]
            for m, c in found.about["conclusions"].items()
        ],
    )
    recalls = [r for r in found.rows if "recall_of" in r]
    if recalls:
        results.show(
            f"What is found of the {TOP_K} best keys (attention mass; that of the exact selection)",
            ["selection", "inputs", "T", "recall", "mass", "exact mass"],
            [
                [
                    r["recall_of"], r["inputs"], f"{r['length']:,}",
                    *(f"{r[n]:.1%}" for n in ("recall", "mass", "exact_mass")),
                ]
                for r in sorted(recalls, key=lambda r: (r["inputs"], r["recall_of"], r["length"]))
            ],
        )  # fmt: skip
    decoding = sorted(found.having(decoding=True), key=lambda r: r["length"])
    if decoding:
        results.show(
            f"One token of a model of {LAYERS} layers, {HEADS} heads on one key head, its cache full of random keys",
            ["cache", "MB", "dense ms", f"exact {TOP_K} keys, ms", "as fast"],
            [
                [
                    f"{r['length']:,}", f"{r['cache_mb']:,.0f}", f"{r['dense_ms']:.1f}", f"{r['sparse_ms']:.1f}",
                    f"{r['dense_ms'] / r['sparse_ms']:.2f}×",
                ]
                for r in decoding
            ],
        )  # fmt: skip


def cell(row: dict | None, ratio: float | None, method: str) -> str:
    if row is None:
        return ""
    mark = "~" if row["sampled"] else ""
    seconds = row["seconds"]
    shown = f"{seconds:,.0f} s" if seconds >= 100 else pretty(seconds)
    return f"{mark}{shown}" + ("" if ratio is None or method == "dense" else f" ({ratio:.1f}×)")


def number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def draw(found: results.Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 7), layout="constrained")
    for i, method in enumerate(METHODS):
        rows = sorted(found.having(method=method), key=lambda r: r["length"])
        if not rows:
            continue
        lengths = [r["length"] for r in rows]
        left.plot(
            lengths, [r["seconds"] for r in rows], marker="o", color=f"C{i}", label=METHODS[method].in_words
        )
        if method != "dense" and speedups(found, method):
            right.plot(*zip(*speedups(found, method), strict=True), marker="o", color=f"C{i}", label=method)
    right.axhline(WANTED, color="black", linewidth=1, linestyle=":")
    right.axhline(1, color="black", linewidth=1)
    left.set(title="Forward of one head", ylabel="seconds")
    right.set(title="Times as fast as dense attention (dotted: 500)", ylabel="dense time over its time")
    ticks = sorted({r["length"] for r in found.rows})
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="sequence length T")
        axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(f"Up to a million tokens ({found.about['setting']})")
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
