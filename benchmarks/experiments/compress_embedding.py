"""What a trained language model loses when its embedding is given fewer parameters: variable width against uniform.

    pip install transformers gguf accelerate
    python -m benchmarks.experiments.compress_embedding --model DIR [--gguf NAME] --counts FILE … --text FILE …

Token counts come from the --counts texts; the cross-entropy is that of the --text files, which they must not hold.
For each ratio of the table's parameters three fits, all weighted by the same counts, take the place of the embedding
(and of the tied head): `plan_widths` with its default rule, its other rules, and one uniform low-rank table of the same
parameter count. Nothing is retrained. Printed: the frequency-weighted relative squared error of the table on the
--counts texts and on the --text files, and the model's cross-entropy, in nats per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from sparse_attn import plan_widths
from sparse_attn.bench import machine
from sparse_attn.nn import VariableWidthEmbedding
from sparse_attn.planner import low_rank

RULES = ("lagrange", "mass", "power")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder")
    parser.add_argument("--counts", required=True, nargs="+", help="texts to count tokens in")
    parser.add_argument("--text", required=True, nargs="+", help="other texts, for the cross-entropy")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each --text (default 2048)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="default 0.5 0.25 0.1"
    )
    parser.add_argument("--out", help="also write the rows as JSON to this file")
    args = parser.parse_args()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"{error}: pip install transformers gguf accelerate") from None

    gguf = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **gguf).eval()
    embedding = model.get_input_embeddings()
    vocabulary, dim = embedding.weight.shape
    if model.get_output_embeddings().weight.data_ptr() != embedding.weight.data_ptr():
        print("the head is not tied to the embedding: it stays as it is")

    def tokens(name: str) -> torch.Tensor:
        return tokenizer(Path(name).read_text("utf-8", "replace"), return_tensors="pt").input_ids[0]

    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for name in args.counts:
        counts += torch.bincount(tokens(name), minlength=vocabulary)
    texts = [tokens(name)[: args.length] for name in args.text]
    seen = torch.cat(texts)
    occur = torch.bincount(seen, minlength=vocabulary)
    print(
        f"{args.gguf or Path(args.model).name}: embedding {vocabulary:,} × {dim}; counts from "
        f"{int(counts.sum()):,} tokens ({int((counts > 0).sum()):,} distinct); cross-entropy of "
        f"{len(seen):,} others, of which "
        f"{float((counts[seen] == 0).float().mean()):.2%} are of tokens that were not counted"
    )
    # Each token is given one more than it was counted: a text to come holds some that these have not.
    weights = counts + 1
    full = embedding.weight.detach().clone()
    rows = [{"table": "full", "parameters": full.numel(), **_loss(model, texts, None)}]
    _print(rows[0], rows[0])
    for ratio in args.ratios:
        budget = int(ratio * full.numel())
        tables = {}
        for rule in RULES:
            plan = plan_widths(weights, dim, budget=budget, rule=rule)
            fitted = VariableWidthEmbedding.from_embedding(embedding, weights, plan=plan)
            tables[rule] = (fitted.full_table(), fitted.num_parameters(), plan)
        narrow, projections, report = low_rank.uniform_low_rank(full, weights, budget)
        uniform = narrow[0] if projections[0] is None else narrow[0] @ projections[0].t()
        tables["uniform"] = (uniform, report.parameters, None)
        for name, (table, parameters, plan) in tables.items():
            row = {
                "table": name,
                "ratio": ratio,
                "parameters": parameters,
                "bands": None if plan is None else [list(plan.band_sizes), list(plan.widths)],
                "error_counted": _error(full, table, counts),
                "error_text": _error(full, table, occur),
                **_loss(model, texts, table),
            }
            rows.append(row)
            _print(row, rows[0])
    if args.out:
        result = {
            "machine": machine.describe(
                torch.get_num_threads(), "python -m benchmarks.experiments.compress_embedding"
            ),
            "model": args.gguf or Path(args.model).name,
            "texts": [Path(name).name for name in args.text],
            "tokens": {"counted": int(counts.sum()), "evaluated": len(seen)},
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _error(full: torch.Tensor, table: torch.Tensor, counts: torch.Tensor) -> float:
    """Σ_t c_t ‖e_t − ê_t‖² / Σ_t c_t ‖e_t‖²."""
    lost = ((full - table) ** 2).sum(1).double() @ counts.double()
    return float(lost / ((full**2).sum(1).double() @ counts.double()))


@torch.no_grad()
def _loss(model, texts: list[torch.Tensor], table: torch.Tensor | None) -> dict[str, float]:
    """Nats per token over the texts, with `table` in place of the embedding (and of a tied head)."""
    weight = model.get_input_embeddings().weight
    kept = weight.clone()
    if table is not None:
        weight.copy_(table)
    try:
        losses = [
            F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
            for ids in texts
        ]
    finally:
        weight.copy_(kept)
    return {"cross_entropy": float(torch.cat(losses).mean())}


def _print(row: dict, first: dict) -> None:
    line = f"{row['table']:9} {row['parameters']:12,} parameters"
    if "ratio" in row:
        errors = f"table error {row['error_counted']:7.2%} counted, {row['error_text']:7.2%} text"
        line = f"{row['ratio']:5.0%}  {line}  {errors}"
    change = row["cross_entropy"] - first["cross_entropy"]
    print(f"{line}  cross-entropy {row['cross_entropy']:.4f} ({change:+.4f})", flush=True)


if __name__ == "__main__":
    main()
