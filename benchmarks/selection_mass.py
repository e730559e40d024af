"""How much of the attention mass cheap selections hold, on a language model's own queries and keys.

SPARSE_ATTN_REAL_INPUTS=… python -m benchmarks.selection_mass [--length 4096] [--budgets 64 256]

Mean over heads and over the second half of the queries; low-rank projections are fitted on the first half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from torch import Tensor

import sparse_attn
from benchmarks import inputs

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    arguments = parser.parse_args()
    reason = inputs.why_not("real", arguments.length)
    if reason is not None:
        raise SystemExit(reason)
    query, key, value = inputs.make("real", arguments.length)
    every = sparse_attn.topk_attention(query, key, value, arguments.length, is_causal=True, return_lse=True)[
        1
    ]
    half = slice(arguments.length // 2, None)
    for budget in arguments.budgets:
        print(f"T={arguments.length}, {budget} keys per query")
        for name, lse in selections(query, key, value, budget):
            print(f"  {name:46} {(lse - every)[:, :, half].exp().mean().item():.3f}")


if __name__ == "__main__":
    main()
