"""What the residual mass is worth: the error of top-k attention's output against dense, on real queries and keys.

    SPARSE_ATTN_REAL_INPUTS=… python -m benchmarks.experiments.residual_error [--length 2048] [--top-k 64 128 256]
        [--json FILE]

`mean` and `tail='blocks'` are those of `sparse_attn.topk_attention`. The other tails are tried here alone, from a
stored [T, T] matrix: the values left out, weighted by exp(β · score of the block's mean key), and by the true mass of
each block.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import inputs, machine


def errors(query: Tensor, key: Tensor, value: Tensor, top_k: int, block: int = 16) -> dict[str, float]:
    """|out − dense| / |dense| over the second half of the queries, all heads together."""
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ key.mT / math.sqrt(query.shape[3])).masked_fill(~causal, -torch.inf)
    mass = scores.softmax(-1)
    dense = mass @ value
    half = slice(length // 2, None)

    def error(out: Tensor) -> float:
        return ((out - dense)[:, :, half].norm() / dense[:, :, half].norm()).item()

    indices = sparse_attn.topk_select(query, key, top_k, is_causal=True)
    chosen = torch.zeros(*scores.shape[:3], length + 1, dtype=torch.bool)
    chosen = chosen.scatter_(-1, indices.long().where(indices >= 0, length), True)[..., :length]
    outside = causal & ~chosen
    kept = mass.masked_fill(~chosen, 0.0)
    rest = 1 - kept.sum(-1, keepdim=True)

    def with_tail(logits: Tensor) -> float:
        weights = logits.masked_fill(~outside, -torch.inf).softmax(-1).nan_to_num(0.0)
        return error(kept @ value + rest * (weights @ value))

    means = key.unflatten(2, (-1, block)).mean(3).repeat_interleave(block, dim=2)
    coarse = query @ means.mT / math.sqrt(query.shape[3])
    pieces = outside.unflatten(-1, (-1, block))
    true_mass = (mass.masked_fill(~outside, 0.0).unflatten(-1, (-1, block)).sum(-1) / pieces.sum(-1)).log()
    mean, blocks = (
        sparse_attn.topk_attention(query, key, value, top_k, is_causal=True, tail=tail)
        for tail in ("mean", "blocks")
    )
    return {
        "plain": error(sparse_attn.topk_attention(query, key, value, top_k, is_causal=True)),
        "mean": error(mean),
        "tail='blocks'": error(blocks),
        f"blocks of {block}": with_tail(coarse),
        f"blocks of {block}, β=0.25": with_tail(0.25 * coarse),
        f"true mass of blocks of {block}": with_tail(true_mass.repeat_interleave(block, dim=-1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="a multiple of 16 (default 2048)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    reason = inputs.why_not("real", arguments.length)
    if reason is not None:
        raise SystemExit(reason)
    tensors = inputs.make("real", arguments.length)
    rows: dict[str, dict[str, float]] = {}
    for top_k in arguments.top_k:
        found = errors(*tensors, top_k)
        print(f"T={arguments.length} K={top_k}: " + ", ".join(f"{n} {e:.4f}" for n, e in found.items()))
        for name, error in found.items():
            rows.setdefault(name, {})[str(top_k)] = error
    if arguments.json:
        results = {
            "machine": machine.describe(
                torch.get_num_threads(), "python -m benchmarks.experiments.residual_error"
            ),
            "real_inputs": inputs.describe_real(),
            "length": arguments.length,
            "budgets": [str(n) for n in arguments.top_k],
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
