"""`gathered_attention` with given indices against dense attention and a gather in plain PyTorch.

pytest benchmarks/bench_gathered_attention.py
"""

OP = "gathered_attention"
CONTENDERS = ("ours", "sdpa", "flex", "plain", "plain_tuned")


def test_gathered_attention(run, contender, case) -> None:
    run(contender, case)
