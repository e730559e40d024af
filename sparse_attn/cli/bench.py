"""`sparse-attn bench`: runs the benchmarks of the checkout; they are not part of the installed package."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from sparse_attn.cli.console import UsageError

HELP = "measure against dense attention and plain PyTorch, with targets, a JSON and a picture (in a checkout)"

DESCRIPTION = """\
Measures the attention ops against what one would use instead: dense scaled_dot_product_attention, FlexAttention, and
top-k attention in plain PyTorch. All contenders get the same inputs, are checked before they are timed, and take
turns (A B A B ...), so the ratios come from one run. Prints every figure beside its target and writes a JSON and a
PNG. With SPARSE_ATTN_REAL_INPUTS=FILE (benchmarks/extract_real_inputs.py makes one) the comparisons are repeated on
a language model's own queries and keys.

--suite widths measures the variable-width embedding and its loss instead, against nn.Embedding, eager adaptive input,
the dense fused loss and the approximate adaptive softmax. With SPARSE_ATTN_GPT2_BPE=DIR (GPT-2's encoder.json and
vocab.bpe) on real token ids too.
"""

EPILOG = """\
examples:
  sparse-attn bench --quick             a smoke test, under two minutes, into benchmarks/scratch
  sparse-attn bench                     all of it, some minutes, into benchmarks/results
  sparse-attn bench --suite widths      the embedding and its loss
  sparse-attn bench --quick --json      the JSON on standard output
  python -m benchmarks.run              the same, without installing anything
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--quick", action="store_true", help="few rounds, no suites: a smoke test")
    parser.add_argument(
        "--suite",
        choices=("attention", "widths"),
        default="attention",
        help="what to measure (default: attention)",
    )
    parser.add_argument("--out", type=Path, help="folder for the two files")
    parser.add_argument(
        "--name", default="attention_cpu", help="their name (default: attention_cpu; attention suite)"
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, cores), help="torch threads (default: 2, as the targets)"
    )
    parser.add_argument("--max-length", type=int, help="leave out longer sequences (attention suite)")
    parser.add_argument(
        "--no-suites", action="store_true", help="leave out the pytest-benchmark suites (attention suite)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    root = checkout()
    if root is None:
        raise UsageError(
            "the benchmarks are not in the installed package; run this in the root of a checkout of the repository"
        )
    sys.path.insert(0, str(root))
    return import_module(f"benchmarks.{'run' if arguments.suite == 'attention' else 'widths'}").execute(
        arguments
    )


def checkout() -> Path | None:
    """The root of the repository: where this package lies, or the current folder."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "run.py").is_file() and (root / "sparse_attn").is_dir():
            return root
    return None
