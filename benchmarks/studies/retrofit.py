"""A trained language model made sparse without retraining: its cross-entropy by selection and budget.

    pip install "sparse-attn[hf,cli]" gguf accelerate
    python examples/retrofit_smollm2.py train --model DIR --gguf NAME --text TRAIN … --out indexers.safetensors
    sparse-attn study retrofit --model DIR --gguf NAME --text FILE … --calibrate TRAIN … --indexers indexers.safetensors

For each selection and budget: the cross-entropy of the last half of each window of real text, how much of the dense
model's attention mass the selected keys hold (on the dense model's own queries and keys, queries of the last half),
peak memory of the forward pass, and, at one budget, its time: all selections and dense attention in turns, the least
of two rounds. What is already in the results file is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.memory import peak_of
from sparse_attn import (
    block_attention,
    block_select,
    gathered_attention,
    quantized_select,
    refine_blocks,
    topk_select,
)
from sparse_attn.integrations.indexers import attention_layers
from sparse_attn.integrations.transformers import BLOCK
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
TIMED, ROUNDS = 256, 2  # budget whose rows are timed
LEAST_BLOCKS = 3 * BLOCK  # the first, the queries' own, and one that is chosen


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
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
        "--lengths", type=int, nargs="+", default=[2048, 8192], help="windows (default: 2048 8192)"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512], help="keys per query")
    parser.add_argument(
        "--windows", type=int, default=4, help="windows per length at most (default 4; of 8192: 1)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these selections")
    parser.add_argument(
        "--quick", action="store_true", help="one window of 512, budgets 64 and 192: a smoke test"
    )
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="torch threads")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and PNG"
    )


def execute(arguments: argparse.Namespace) -> int:
    if arguments.quick:
        arguments.lengths, arguments.budgets, arguments.windows = [512], [64, 192], 1
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    study.run()
    study.draw()
    print(f"wrote {study.file.name} and {study.file.with_suffix('.png').name} to {study.file.parent}")
    return 0


class Study:
    def __init__(self, arguments: argparse.Namespace) -> None:
        import transformers

        import sparse_attn.integrations.transformers as sparse_transformers

        self.arguments, self.lib = arguments, sparse_transformers
        transformers.utils.logging.disable_progress_bar()
        more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **more)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, **more
        ).eval()
        self.texts = [
            tokenizer(f.read_text("utf-8", "replace"), return_tensors="pt").input_ids for f in arguments.text
        ]
        if arguments.indexers:
            sparse_transformers.load_indexers(self.model, arguments.indexers)
        if arguments.calibrate:
            windows = (
                tokenizer(f.read_text("utf-8", "replace"), return_tensors="pt").input_ids
                for f in arguments.calibrate[:CALIBRATION_WINDOWS]
            )
            batches = [t[:, :CALIBRATION_LENGTH] for t in windows]
            sparse_transformers.fit_low_rank(self.model, batches, rank=RANK)
        lacking = {"indexer": not arguments.indexers, "low_rank": not arguments.calibrate}
        self.arms = [a for a in arguments.arms or ARMS if not lacking.get(ARMS[a].get("selector"))]
        self.file = arguments.out / ("retrofit_quick.json" if arguments.quick else "retrofit.json")
        self.rows = json.loads(self.file.read_text())["rows"] if self.file.exists() else []

    def windows(self, length: int) -> list[Tensor]:
        """Token ids [1, length + 1], one per text that is long enough."""
        limit = self.arguments.windows if length < 8192 else 1
        found = [t[:, : length + 1] for t in self.texts if t.shape[1] > length][:limit]
        if not found:
            raise SystemExit(f"no --text has more than {length} tokens")
        return found

    def run(self) -> None:
        for length in self.arguments.lengths:
            windows = self.windows(length)
            dense = self.row("dense", None, length, len(windows))
            if dense is None:
                dense = self.measure("dense", None, windows)
            for arm in self.arms:
                for budget in self.budgets(arm, length):
                    if self.row(arm, budget, length, len(windows)) is None:
                        self.measure(arm, budget, windows)
            self.add_mass(windows)
            self.add_times(windows)
            self.print(length)

    def budgets(self, arm: str, length: int) -> list[int]:
        """Those that the arm can have: all keys are no selection, and blocks come whole."""
        blocks = ARMS[arm].get("selector") in ("blocks", "refined_blocks")
        return [
            b
            for b in self.arguments.budgets
            if b < length and (not blocks or (b >= LEAST_BLOCKS and b % BLOCK == 0))
        ]

    def row(self, arm: str, budget: int | None, length: int, windows: int) -> dict | None:
        same = {"arm": arm, "budget": budget, "length": length, "windows": windows}
        return next((r for r in self.rows if all(r[k] == v for k, v in same.items())), None)

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
        self.rows.append(row)
        self.save()
        _say(f"T={length} {arm} {budget or ''}: {row['cross_entropy']:.4f} nats")

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, T + 1] → hidden states [T, C]: without the head, which is the same for all."""
        return self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[0]

    def add_mass(self, windows: list[Tensor]) -> None:
        """Attention mass held, of the first window, for the rows that lack it: one dense pass serves them all."""
        length = windows[0].shape[1] - 1
        wanted = [
            r
            for r in self.rows
            if r["length"] == length
            and r["windows"] == len(windows)
            and r["arm"] in self.arms
            and "mass" not in r
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
        self.save()

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
        for _ in range(ROUNDS):
            for row in rows:
                self.set(row["arm"], row["budget"])
                start = time.perf_counter()
                self.forward(windows[0])
                seconds = time.perf_counter() - start
                taken[row["arm"]] = min(seconds, taken.get(row["arm"], seconds))
        for row in rows:
            row["seconds"] = taken[row["arm"]]
        self.save()

    def weigh(self, wanted: list[dict], held: dict, given: Given) -> None:
        half = given.query.shape[2] // 2
        full = dense_lse(given.query, given.key, given.scale)
        for i, row in enumerate(wanted):
            some = selected_lse(dict(ARMS[row["arm"]]), row["budget"], given)
            held[i].append(float((some - full)[:, :, half:].exp().mean()))

    def print(self, length: int) -> None:
        from rich.console import Console
        from rich.table import Table

        dense = next(r for r in self.rows if r["arm"] == "dense" and r["length"] == length)
        title = (
            f"{Path(self.arguments.model).name}, windows of {length}: dense {dense['cross_entropy']:.4f} nats"
        )
        table = Table(title=f"{title}, {dense['seconds']:.2f} s, {dense['peak_mb']:,.0f} MB")
        for column in ("selection", "budget", "nats over dense", "mass held", "seconds", "peak MB"):
            table.add_column(column, justify="left" if column == "selection" else "right")
        for arm in self.arms:
            for budget in self.arguments.budgets:
                row = self.row(arm, budget, length, dense["windows"])
                if row is not None:
                    table.add_row(
                        arm,
                        str(budget),
                        f"{row['cross_entropy'] - dense['cross_entropy']:+.4f}",
                        f"{row['mass']:.1%}",
                        f"{row['seconds']:.2f}" if "seconds" in row else "",
                        f"{row['peak_mb']:,.0f}",
                    )
        Console(width=100).print(table)

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "format": 1,
            "machine": machine.describe(self.arguments.threads, "sparse-attn study retrofit"),
            "model": self.arguments.gguf or Path(self.arguments.model).name,
            "texts": [f.name for f in self.arguments.text],
            "rows": self.rows,
        }
        self.file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lengths = self.arguments.lengths
        figure, axes = plt.subplots(
            1, len(lengths), figsize=(8 * len(lengths), 6), squeeze=False, layout="constrained"
        )
        for axis, length in zip(axes[0], lengths, strict=True):
            dense = next(r for r in self.rows if r["arm"] == "dense" and r["length"] == length)
            for arm in self.arms:
                rows = [r for r in self.rows if r["arm"] == arm and r["length"] == length]
                rows.sort(key=lambda r: r["budget"])
                over = [max(1e-4, r["cross_entropy"] - dense["cross_entropy"]) for r in rows]
                axis.plot([r["budget"] for r in rows], over, marker="o", label=arm)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="keys per query",
                ylabel="cross-entropy over dense attention (nats; 0.0001 = none)",
                title=f"windows of {length} tokens (dense: {dense['cross_entropy']:.3f} nats)",
            )
            axis.set_xticks(self.arguments.budgets, [str(b) for b in self.arguments.budgets])
            axis.grid(alpha=0.3)
            axis.legend()
        name = self.arguments.gguf or Path(self.arguments.model).name
        figure.suptitle(f"{name}: sparse attention without retraining")
        figure.savefig(self.file.with_suffix(".png"), dpi=110)
        plt.close(figure)


def selected_lse(options: dict, budget: int, given: Given) -> Tensor:
    """Log-sum-exp over the keys that the arm selects from a layer's tensors, [B, Hq, T]."""
    module, hidden, rope, query, key, value, scale = given
    selector = options.pop("selector", "exact")
    options.pop("residual", None)
    if options.get("window") == "rest":
        options["window"] = budget - SINKS
    rule = {"is_causal": True, "scale": scale}
    sizes = {"block_size": BLOCK, "query_tile": BLOCK}
    if selector == "blocks":
        blocks = block_select(query, key, budget // BLOCK, **rule, **sizes, **options)
        return block_attention(query, key, value, blocks, **rule, **sizes, return_lse=True)[1]
    if selector == "indexer":
        indices = module.sparse_attn_indexer.select(hidden, budget, rope=rope)
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
    """Log-sum-exp over all visible keys, float32 [B, Hq, T], in blocks of queries."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    parts = []
    for first in range(0, query.shape[2], 256):
        last = min(first + 256, query.shape[2])
        scores = (query[:, :, first:last] @ key[..., :last]) * scale
        seen = torch.ones(last - first, last, dtype=torch.bool).tril(first)
        parts.append(scores.masked_fill_(~seen, -torch.inf).logsumexp(-1))
    return torch.cat(parts, 2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    configure(parser)
    raise SystemExit(execute(parser.parse_args()))
