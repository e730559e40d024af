"""How much of the attention mass cheap selections hold, on a language model's own queries and keys.

    SPARSE_ATTN_REAL_INPUTS=… python -m benchmarks.experiments.selection_mass [--length 4096] [--budgets 64 256]
        [--json FILE]

Mean over heads and over the second half of the queries; low-rank projections are fitted on the first half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import inputs, machine

BLOCK = 64


def selections(query: Tensor, key: Tensor, value: Tensor, budget: int) -> Iterator[tuple[str, Tensor]]:
    """(name, log-sum-exp of the scores of the chosen keys [B, H, T])"""
    length = query.shape[2]
    causal = {"is_causal": True}

    def gathered(indices: Tensor) -> Tensor:
        return sparse_attn.gathered_attention(query, key, value, indices, return_lse=True)[1]

    yield "exact", gathered(sparse_attn.topk_select(query, key, budget, **causal))
    yield (
        "exact, one for all heads",
        gathered(sparse_attn.topk_select(query, key, budget, share="all", **causal)),
    )
    yield "quantized_select", gathered(sparse_attn.quantized_select(query, key, budget, **causal))
    coarse = (in_4_bits(t) for t in (query, key))
    yield "rounded to 4 bits (not an op)", gathered(sparse_attn.topk_select(*coarse, budget, **causal))
    half = length // 2
    for rank in (8, 16, 32):
        scorer = sparse_attn.nn.LowRankScorer(key.shape[1], key.shape[3], rank)
        scorer.calibrate(query[:, :, :half], key[:, :, :half]).fit()
        yield f"LowRankScorer, rank {rank}", gathered(scorer.select(query, key, budget, **causal))
    for pool in ("mean", "bound"):
        if budget >= 2 * BLOCK:
            blocks = sparse_attn.block_select(query, key, budget // BLOCK, pool=pool, **causal)
            _, lse = sparse_attn.block_attention(query, key, value, blocks, return_lse=True, **causal)
            yield f"block_select, {pool}", lse
        blocks = sparse_attn.block_select(query, key, 4 * max(1, budget // BLOCK), pool=pool, **causal)
        refined = sparse_attn.refine_blocks(query, key, blocks, budget, **causal)
        yield f"block_select, {pool}, 4 × the budget, refined", gathered(refined)


def in_4_bits(rows: Tensor) -> Tensor:
    """Whole numbers of [−7, 7] times a scale per row."""
    scale = rows.abs().amax(-1, keepdim=True) / 7
    return (rows / scale).round() * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    reason = inputs.why_not("real", arguments.length)
    if reason is not None:
        raise SystemExit(reason)
    query, key, value = inputs.make("real", arguments.length)
    every = sparse_attn.topk_attention(query, key, value, arguments.length, is_causal=True, return_lse=True)[
        1
    ]
    half = slice(arguments.length // 2, None)
    rows: dict[str, dict[str, float]] = {}
    for budget in arguments.budgets:
        print(f"T={arguments.length}, {budget} keys per query")
        for name, lse in selections(query, key, value, budget):
            held = (lse - every)[:, :, half].exp().mean().item()
            rows.setdefault(name, {})[str(budget)] = held
            print(f"  {name:46} {held:.3f}")
    if arguments.json:
        results = {
            "machine": machine.describe(
                torch.get_num_threads(), "python -m benchmarks.experiments.selection_mass"
            ),
            "real_inputs": inputs.describe_real(),
            "length": arguments.length,
            "budgets": [str(n) for n in arguments.budgets],
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
