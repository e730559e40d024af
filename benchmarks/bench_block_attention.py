"""`block_select` and `block_attention` (blocks and tiles of 64) against dense SDPA: B1 H8 D64, causal.

pytest benchmarks/bench_block_attention.py
python -m benchmarks.bench_block_attention [--lengths 8192 65536] [--blocks 16]     a table, contenders in turn

Past --dense-max SDPA's time is not measured but scaled with T² from that length, and marked so.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from benchmarks import timing

LABELS = {
    "sdpa": "SDPA (dense)",
    "exact": "topk_attention, as many keys",
    "attend": "block_attention, blocks given",
    "both": "block_select + block_attention",
}
BLOCK = 64


def make(length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 8, length, 64, generator=generator) for _ in range(3))


def prepare(name: str, count: int, inputs: tuple[torch.Tensor, ...]):
    """The forward, as a function of query, key and value."""
    if name == "sdpa":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == "exact":
        return lambda q, k, v: sparse_attn.topk_attention(q, k, v, count * BLOCK, is_causal=True)
    choose = lambda q, k: sparse_attn.block_select(q, k, count, is_causal=True)  # noqa: E731
    if name == "both":
        return lambda q, k, v: sparse_attn.block_attention(q, k, v, choose(q, k), is_causal=True)
    blocks = choose(*inputs[:2])
    return lambda q, k, v: sparse_attn.block_attention(q, k, v, blocks, is_causal=True)


def check(count: int, inputs: tuple[torch.Tensor, ...]) -> None:
    """The last queries against gathered attention to the tokens of their blocks."""
    query, key, value = inputs
    length = query.shape[2]
    blocks = sparse_attn.block_select(query, key, count, is_causal=True)
    out = sparse_attn.block_attention(query, key, value, blocks, is_causal=True)[:, :, -BLOCK:]
    tokens = (blocks[:, :, -1:].long().unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(3)
    own = torch.arange(length - BLOCK, length).unsqueeze(-1)
    tokens = torch.where((tokens >= 0) & (tokens <= own), tokens, -1).int()
    want = sparse_attn.gathered_attention(query[:, :, -BLOCK:], key, value, tokens)
    error = (out - want).abs().max().item()
    if error > 1e-5:
        raise AssertionError(f"block_attention is off by {error}")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("name", LABELS)
def test_block_attention(benchmark, name, length, backward) -> None:
    inputs = make(length)
    check(16, inputs)
    call = timing.bound(prepare(name, 16, inputs), inputs, backward)
    benchmark.group = f"blocks T={length} {'fwd+bwd' if backward else 'fwd'}"
    benchmark.extra_info.update(contender=name, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--blocks", type=int, default=16, help="blocks per tile (default 16)")
    parser.add_argument("--dense-max", type=int, default=16384, help="longest measured SDPA (default 16384)")
    parser.add_argument("--exact-max", type=int, default=16384, help="longest topk_attention (default 16384)")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for length in arguments.lengths:
        inputs = make(length)
        check(arguments.blocks, inputs)
        names = [n for n in LABELS if n != "exact" or length <= arguments.exact_max]
        calls, note = {}, ""
        for name in names:
            given = inputs
            if name == "sdpa" and length > arguments.dense_max:
                given = make(arguments.dense_max)
                note = f" (scaled from T={arguments.dense_max})"
            calls[name] = timing.bound(prepare(name, arguments.blocks, given), given, arguments.backward)
        times = timing.interleave(calls, budget=40, rounds=7)
        dense = times["sdpa"].median * (length / min(length, arguments.dense_max)) ** 2
        what = "forward + backward" if arguments.backward else "forward"
        print(f"T={length}, {arguments.blocks} blocks of {BLOCK}, {what}, {arguments.threads} threads")
        for name in names:
            seconds = dense if name == "sdpa" else times[name].median
            label = LABELS[name] + (note if name == "sdpa" else "")
            print(f"  {label:40} {1e3 * seconds:9.1f} ms   {dense / seconds:6.2f} × as fast as dense")


if __name__ == "__main__":
    main()
