"""`indexer_select` and `quantized_select` against the exact `topk_select`: B1 H8 D64, indexer 4 heads × 32, causal.

pytest benchmarks/bench_indexer_select.py
python -m benchmarks.bench_indexer_select [--length 16384] [--top-k 64 256]     a table, contenders in turn
"""

from __future__ import annotations

import argparse

import pytest
import torch

import sparse_attn
from benchmarks import timing

LABELS = {
    "exact": "topk_select, share='none'",
    "exact_all": "topk_select, share='all'",
    "quantized": "quantized_select",
    "indexer": "indexer_select",
    "indexer_int8": "indexer_select, int8",
}


def make(length: int, dtype: str = "float32") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (1, 8, length, 64),
        "key": (1, 8, length, 64),
        "index_query": (1, 4, length, 32),
        "index_key": (1, 1, length, 32),
        "weights": (1, 4, length),
    }
    return {n: torch.randn(s, generator=generator).to(getattr(torch, dtype)) for n, s in shapes.items()}


def prepare(name: str, inputs: dict[str, torch.Tensor], top_k: int):
    """The call to time."""
    pair = inputs["query"], inputs["key"]
    index = inputs["index_query"], inputs["index_key"], inputs["weights"]
    if name.startswith("exact"):
        share = "all" if name == "exact_all" else "none"
        return lambda: sparse_attn.topk_select(*pair, top_k, is_causal=True, share=share)
    if name == "quantized":
        return lambda: sparse_attn.quantized_select(*pair, top_k, is_causal=True)
    return lambda: sparse_attn.indexer_select(*index, top_k, is_causal=True, int8=name == "indexer_int8")


def check(name: str, inputs: dict[str, torch.Tensor], top_k: int) -> None:
    """The last queries' rows against the reference wing, up to near-ties."""
    last = slice(inputs["key"].shape[2] - 16, None)
    some = {n: t[:, :, last] if n not in ("key", "index_key") else t for n, t in inputs.items()}
    call = prepare(name, inputs, top_k)()[:, :, last]
    with sparse_attn.use_backend("reference"):
        offset = inputs["key"].shape[2] - 16
        pair = some["query"], some["key"]
        index = some["index_query"], some["index_key"], some["weights"]
        options = {"is_causal": True, "causal_offset": offset}
        if name.startswith("exact"):
            share = "all" if name == "exact_all" else "none"
            want = sparse_attn.topk_select(*pair, top_k, share=share, **options)
        elif name == "quantized":
            want = sparse_attn.quantized_select(*pair, top_k, **options)
        else:
            want = sparse_attn.indexer_select(*index, top_k, int8=name == "indexer_int8", **options)
    common = (call.unsqueeze(-1) == want.unsqueeze(-2)).any(-1).double().mean().item()
    if common < 0.999:
        raise AssertionError(f"{name}: {common:.4f} of the selection is the reference's")


@pytest.mark.parametrize("top_k", [64, 256])
@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("name", LABELS)
def test_indexer_select(benchmark, name, length, top_k) -> None:
    inputs = make(length)
    check(name, inputs, top_k)
    benchmark.group = f"select T={length} K={top_k}"
    benchmark.extra_info.update(contender=name, threads=torch.get_num_threads())
    benchmark.pedantic(prepare(name, inputs, top_k), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inputs = make(arguments.length, arguments.dtype)
    print(f"T={arguments.length} {arguments.dtype}, {arguments.threads} threads")
    for top_k in arguments.top_k:
        for name in LABELS:
            check(name, inputs, top_k)
        times = timing.interleave({n: prepare(n, inputs, top_k) for n in LABELS}, budget=30, rounds=9)
        exact = times["exact"].median
        for name, label in LABELS.items():
            seconds = times[name].median
            print(
                f"  K={top_k:<4} {label:28} {1e3 * seconds:8.1f} ms   {exact / seconds:5.2f} × as fast as exact"
            )


if __name__ == "__main__":
    main()
