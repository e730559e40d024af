"""`topk_select` against scores + torch.topk in plain PyTorch, and against the matmul of the scores alone.

pytest benchmarks/bench_topk_select.py
"""

OP = "topk_select"
CONTENDERS = ("ours", "plain", "plain_tuned", "scores")


def test_topk_select(run, contender, case) -> None:
    run(contender, case)
