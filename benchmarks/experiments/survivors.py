"""How many keys the bounds of exact selection leave, and what it costs beside the full product and dense attention.

    python -m benchmarks.experiments.survivors [--lengths 4096 8192] [--budgets 64 256] [--json FILE]

On random inputs, and with SPARSE_ATTN_REAL_INPUTS=FILE on a language model's own. For rows rounded to 16 and to 8 bits:
of K keys how many are left as candidates, how many are scored once more in the order of the full product, and how many
blocks of queries are given up. Output, LSE and indices are compared with those of the full product, to the bit, first.
Times are processor time of one thread, the least of a few calls in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn.bench import inputs, machine
from sparse_attn.wings.cpu import selection_by_bounds

WAYS = {"by itself": (None, 0), "16 bits": (True, 16), "8 bits": (True, 8), "every score exact": (False, 0)}


def figures(kind: str, length: int, dtype: str, top_k: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each way: what the bounds left, and milliseconds; of dense attention: milliseconds."""
    query, key, value = inputs.make(kind, length, dtype=dtype)
    found: dict[str, dict[str, float]] = {}
    results = {}
    for name, way in WAYS.items():
        with selection_by_bounds(*way) as counts:
            results[name] = sparse_attn.topk_attention(
                query, key, value, top_k, is_causal=True, return_lse=True, return_indices=True
            )
        budget = max(1, counts["budget"])
        found[name] = {
            "candidates": counts["kept"] / budget,
            "scored": counts["scored"] / budget,
            "given_up": counts["given_up"] / max(1, counts["blocks"] + counts["given_up"]),
        }
    for name, result in results.items():
        if not all(map(torch.equal, result, results["every score exact"])):
            raise SystemExit(f"{name}: not the same bits as the full product ({kind}, {length}, {dtype})")

    def milliseconds(call) -> float:
        begin = time.thread_time()
        call()
        return 1e3 * (time.thread_time() - begin)

    for _ in range(rounds):
        for name, way in WAYS.items():
            with selection_by_bounds(*way):
                took = milliseconds(
                    lambda: sparse_attn.topk_attention(query, key, value, top_k, is_causal=True)
                )
            found[name]["ms"] = min(took, found[name].get("ms", took))
        took = milliseconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
        dense = found.setdefault("dense", {"ms": took})
        dense["ms"] = min(took, dense["ms"])
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in ("random", "real"):
        for length in arguments.lengths:
            if reason := inputs.why_not(kind, length):
                print(f"{kind} T={length}: {reason}")
                continue
            for dtype in ("float32", "bfloat16"):
                for top_k in arguments.budgets:
                    found = figures(kind, length, dtype, top_k, arguments.rounds)
                    dense = found["dense"]["ms"]
                    print(f"{kind} T={length} {dtype} K={top_k}: dense {dense:.0f} ms")
                    for name in WAYS:
                        row = found[name]
                        print(
                            f"  {name:18s} {row['ms']:6.1f} ms, {dense / row['ms']:5.2f}x; "
                            f"{row['candidates']:.2f} K left, {row['scored']:.3f} K scored, "
                            f"{100 * row['given_up']:.0f} % given up",
                            flush=True,
                        )
                    rows.append({"inputs": kind, "length": length, "dtype": dtype, "top_k": top_k, **found})
    if arguments.json is not None:
        results = {
            "machine": machine.describe(1, "python -m benchmarks.experiments.survivors"),
            "real_inputs": inputs.describe_real(),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
