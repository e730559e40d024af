"""A trained language model made sparse without retraining: its cross-entropy by selection and budget.

    pip install "sparse-attn[hf,cli]" gguf accelerate
    sparse-attn train-indexer --model DIR --gguf NAME --text TRAIN … --length 2048 --out indexers.safetensors
    sparse-attn study retrofit --model DIR --gguf NAME --text FILE … --calibrate TRAIN … --indexers indexers.safetensors

For each selection and budget: the cross-entropy of the last half of each window of real text, how much of the dense
model's attention mass the selected keys hold (on the dense model's own queries and keys, the last 512 queries),
peak memory of the forward pass, and, at one budget, its time: all selections and dense attention in turns, the least
of two rounds (of one from 8,192 tokens on). What is already in the results file is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.studies import results
from sparse_attn import (
    block_attention,
    block_select,
    gathered_attention,
    quantized_select,
    refine_blocks,
    topk_select,
)
from sparse_attn.bench.memory import peak_of
from sparse_attn.cli.console import UsageError, count, refusals
from sparse_attn.demo.text import read
from sparse_attn.integrations.indexers import attention_layers
from sparse_attn.integrations.selectors import BLOCK
from sparse_attn.integrations.watching import Given, watching

SINKS = 4
# name → options of sparse_attn.integrations.transformers.configure, beside top_k
ARMS: dict[str, dict] = {
    "window + sinks": {"window": "rest", "sinks": SINKS},
    "exact, per head": {},
    "exact, share kv": {"share": "kv"},
    "exact, share all": {"share": "all"},
    "int8, per head": {"selector": "int8"},
    "int8, share all": {"selector": "int8", "share": "all"},
    "low rank 16, per head": {"selector": "low_rank"},
    "low rank 16, share all": {"selector": "low_rank", "share": "all"},
    "blocks, per head": {"selector": "blocks"},
    "blocks refined, per head": {"selector": "refined_blocks"},
    "indexer": {"selector": "indexer"},
    "exact, per head, residual": {"residual": True},
    "exact, share kv, residual": {"share": "kv", "residual": True},
}
RANK, CALIBRATION_LENGTH, CALIBRATION_WINDOWS = 16, 1024, 8
WEIGHED = 512  # last queries of a window, whose attention mass is counted
TIMED = 256  # budget whose rows are timed
LEAST_BLOCKS = 3 * BLOCK  # the first, the queries' own, and one that is chosen


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="texts, a window from each")
    parser.add_argument("--indexers", type=Path, help="trained indexers (without: that row is left out)")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        help="other texts, that low-rank scorers are fitted on (without: those rows are left out)",
    )
    parser.add_argument(
        "--lengths", type=count(1), nargs="+", default=[2048, 8192], help="windows (default: 2048 8192)"
    )
    parser.add_argument(
        "--budgets", type=count(1), nargs="+", default=[64, 128, 256, 512], help="keys per query"
    )
    parser.add_argument(
        "--windows", type=count(1), default=4, help="windows per length at most (default 4; of 8192: 1)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these selections")


def execute(arguments: argparse.Namespace) -> int:
    if arguments.quick:
        arguments.lengths, arguments.budgets, arguments.windows = [512], [64, 192], 1
    study = Study(arguments, results.start("retrofit", arguments))
    study.run()
    study.draw()
    study.found.wrote()
    return 0


class Study:
    def __init__(self, arguments: argparse.Namespace, found: results.Results) -> None:
        import transformers

        import sparse_attn.integrations.transformers as sparse_transformers

        self.arguments, self.lib, self.found = arguments, sparse_transformers, found
        transformers.utils.logging.disable_progress_bar()
        more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **more)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, **more
        ).eval()
        with refusals("--text "):
            self.texts = [tokenizer(read(f), return_tensors="pt").input_ids for f in arguments.text]
        if arguments.indexers:
            sparse_transformers.load_indexers(self.model, arguments.indexers)
        if arguments.calibrate:
            with refusals("--calibrate "):
                texts = [read(f) for f in arguments.calibrate[:CALIBRATION_WINDOWS]]
            windows = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
            batches = [t[:, :CALIBRATION_LENGTH] for t in windows]
            sparse_transformers.fit_low_rank(self.model, batches, rank=RANK)
        lacking = {"indexer": not arguments.indexers, "low_rank": not arguments.calibrate}
        self.arms = [a for a in arguments.arms or ARMS if not lacking.get(ARMS[a].get("selector"))]
        self.name = arguments.gguf or Path(arguments.model).name
        found.about |= {"model": self.name, "texts": [f.name for f in arguments.text]}

    def windows(self, length: int) -> list[Tensor]:
        """Token ids [1, length + 1], one per text that is long enough."""
        limit = self.arguments.windows if length < 8192 else 1
        found = [t[:, : length + 1] for t in self.texts if t.shape[1] > length][:limit]
        if not found:
            raise UsageError(f"no --text has more than {length} tokens, which --lengths asks for")
        return found

    def run(self) -> None:
        for length in self.arguments.lengths:
            windows = self.windows(length)
            dense = self.row("dense", None, length, len(windows))
            if dense is None:
                dense = self.measure("dense", None, windows)
            rows = [(arm, budget) for arm in self.arms for budget in self.budgets(arm, length)]
            with results.bar(f"T={length}", len(rows)) as advance:
                for arm, budget in rows:
                    if self.row(arm, budget, length, len(windows)) is None:
                        self.measure(arm, budget, windows)
                    advance()
            self.add_mass(windows)
            self.add_times(windows)
            self.print(length, len(windows))

    def budgets(self, arm: str, length: int) -> list[int]:
        """Those that the arm can have: all keys are no selection, and blocks come whole."""
        blocks = ARMS[arm].get("selector") in ("blocks", "refined_blocks")
        return [
            b
            for b in self.arguments.budgets
            if b < length and (not blocks or (b >= LEAST_BLOCKS and b % BLOCK == 0))
        ]

    def row(self, arm: str, budget: int | None, length: int, windows: int) -> dict | None:
        return self.found.row(arm=arm, budget=budget, length=length, windows=windows)

    def set(self, arm: str, budget: int | None) -> None:
        if arm == "dense":
            self.model.set_attn_implementation("sdpa")  # what one has without this package
            return
        options = dict(ARMS[arm])
        if options.get("window") == "rest":
            options["window"] = budget - SINKS
        self.lib.configure(self.model, top_k=budget, **options)

    @torch.no_grad()
    def measure(self, arm: str, budget: int | None, windows: list[Tensor]) -> None:
        length = windows[0].shape[1] - 1
        half = length // 2
        losses, peaks = [], []
        self.set(arm, budget)
        for tokens in windows:
            hidden, peak = peak_of(lambda tokens=tokens: self.forward(tokens)[half:])
            peaks.append(peak)
            targets = tokens[0, half + 1 :]
            for rows in torch.arange(len(targets)).split(512):
                logits = self.model.lm_head(hidden[rows])
                losses.append(F.cross_entropy(logits, targets[rows], reduction="none"))
        row = {
            "arm": arm,
            "budget": budget,
            "length": length,
            "windows": len(windows),
            "cross_entropy": float(torch.cat(losses).mean()),
            "peak_mb": max(peaks) / 1e6,
        }
        self.found.add(row)
        results.say(f"T={length} {arm} {budget or ''}: {row['cross_entropy']:.4f} nats")

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, T + 1] → hidden states [T, C]: without the head, which is the same for all."""
        return self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[0]

    def add_mass(self, windows: list[Tensor]) -> None:
        """Attention mass held, of the first window, for the rows that lack it: one dense pass serves them all."""
        length = windows[0].shape[1] - 1
        wanted = [
            r
            for r in self.found.having(length=length, windows=len(windows))
            if r["arm"] in self.arms and "mass" not in r
        ]
        if not wanted:
            return
        held: dict[int, list[float]] = {i: [] for i in range(len(wanted))}
        layers = attention_layers(self.model).values()
        with watching(self.model, lambda given: self.weigh(wanted, held, given), layers) as run:
            run(windows[0][:, :-1])
        for i, row in enumerate(wanted):
            row["mass"] = sum(held[i]) / len(held[i])
            row["least_mass"] = min(held[i])  # of any layer
        self.found.save()

    @torch.no_grad()
    def add_times(self, windows: list[Tensor]) -> None:
        """Seconds of the first window's forward pass, for dense attention and for each selection at one budget."""
        length = windows[0].shape[1] - 1
        budget = min(TIMED, max(self.arguments.budgets))
        rows = [self.row("dense", None, length, len(windows))]
        rows += [self.row(arm, budget, length, len(windows)) for arm in self.arms]
        rows = [row for row in rows if row is not None]
        if all("seconds" in row for row in rows):
            return
        taken: dict[str, float] = {}
        for _ in range(2 if length < 8192 else 1):
            for row in rows:
                self.set(row["arm"], row["budget"])
                start = time.perf_counter()
                self.forward(windows[0])
                seconds = time.perf_counter() - start
                taken[row["arm"]] = min(seconds, taken.get(row["arm"], seconds))
        for row in rows:
            row["seconds"] = taken[row["arm"]]
        self.found.save()

    def weigh(self, wanted: list[dict], held: dict, given: Given) -> None:
        last = given._replace(query=given.query[:, :, -WEIGHED:])
        full = dense_lse(last.query, last.key, last.scale)
        for i, row in enumerate(wanted):
            some = selected_lse(dict(ARMS[row["arm"]]), row["budget"], last)
            held[i].append(float((some - full).exp().mean()))

    def print(self, length: int, windows: int) -> None:
        dense = self.row("dense", None, length, windows)
        table = []
        for arm in self.arms:
            for budget in self.arguments.budgets:
                row = self.row(arm, budget, length, windows)
                if row is not None:
                    table.append(
                        [
                            arm,
                            str(budget),
                            f"{row['cross_entropy'] - dense['cross_entropy']:+.4f}",
                            f"{row['mass']:.1%}",
                            f"{row['peak_mb']:,.0f}",
                            f"{row['seconds']:.2f}" if "seconds" in row else "",
                        ]
                    )
        results.show(
            f"{self.name}, windows of {length:,} tokens ({windows}): dense {dense['cross_entropy']:.4f} nats, "
            f"{dense['seconds']:.2f} s, {dense['peak_mb']:,.0f} MB",
            ["selection", "keys", "nats over dense", "mass held", "peak MB", "seconds"],
            table,
        )

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lengths = self.arguments.lengths
        figure, axes = plt.subplots(
            1, len(lengths), figsize=(8 * len(lengths), 6), squeeze=False, layout="constrained"
        )
        for axis, length in zip(axes[0], lengths, strict=True):
            dense = self.found.row(arm="dense", length=length)
            for i, arm in enumerate(self.arms):
                rows = self.found.having(arm=arm, length=length)
                rows.sort(key=lambda r: r["budget"])
                over = [max(1e-4, r["cross_entropy"] - dense["cross_entropy"]) for r in rows]
                style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": "os"[i // 10]}
                axis.plot([r["budget"] for r in rows], over, label=arm, **style)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="keys per query",
                ylabel="cross-entropy over dense attention (nats; 0.0001 = none)",
                title=f"windows of {length} tokens (dense: {dense['cross_entropy']:.3f} nats)",
            )
            axis.set_xticks(self.arguments.budgets, [str(b) for b in self.arguments.budgets])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(f"{self.name}: sparse attention without retraining")
        figure.savefig(self.found.picture, dpi=110)
        plt.close(figure)


def selected_lse(options: dict, budget: int, given: Given) -> Tensor:
    """Log-sum-exp over the keys that the arm selects for a layer's last queries, [B, Hq, t]."""
    module, hidden, rope, query, key, value, scale = given[:7]
    count = query.shape[2]
    selector = options.pop("selector", "exact")
    options.pop("residual", None)
    if options.get("window") == "rest":
        options["window"] = budget - SINKS
    rule = {"is_causal": True, "causal_offset": key.shape[2] - count, "scale": scale}
    sizes = {"block_size": BLOCK, "query_tile": BLOCK}
    if selector == "blocks":
        blocks = block_select(query, key, budget // BLOCK, **rule, **sizes, **options)
        return block_attention(query, key, value, blocks, **rule, **sizes, return_lse=True)[1]
    if selector == "indexer":
        indexer = module.sparse_attn_indexer
        last_rope = None if rope is None else tuple(t[:, -count:] for t in rope)
        indices = indexer.select(hidden[:, -count:], budget, keys=indexer.keys(hidden, rope), rope=last_rope)
    elif selector == "refined_blocks":
        blocks = block_select(query, key, 4 * budget // BLOCK, **rule, **sizes, **options)
        indices = refine_blocks(query, key, blocks, budget, **rule, **sizes, **options)
    else:
        low_rank = getattr(module, "sparse_attn_low_rank", None)
        choose = {
            "exact": topk_select,
            "int8": quantized_select,
            "low_rank": low_rank and low_rank.select,
        }
        indices = choose[selector](query, key, budget, **rule, **options)
    return gathered_attention(query, key, value, indices, scale=scale, return_lse=True)[1]


def dense_lse(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Log-sum-exp over all visible keys for the last queries, float32 [B, Hq, t], in blocks of them."""
    offset = key.shape[2] - query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    parts = []
    for first in range(0, query.shape[2], 256):
        last = min(first + 256, query.shape[2])
        scores = (query[:, :, first:last] @ key[..., : offset + last]) * scale
        seen = torch.ones(last - first, offset + last, dtype=torch.bool).tril(offset + first)
        parts.append(scores.masked_fill_(~seen, -torch.inf).logsumexp(-1))
    return torch.cat(parts, 2)
