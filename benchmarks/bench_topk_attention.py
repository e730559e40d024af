"""`topk_attention` against dense attention and top-k attention in plain PyTorch.

pytest benchmarks/bench_topk_attention.py
"""

OP = "topk_attention"
CONTENDERS = ("ours", "sdpa", "flex", "plain", "plain_tuned")


def test_topk_attention(run, contender, case) -> None:
    run(contender, case)
