"""`sparse-attn study NAME`: runs a study of the checkout; they are not part of the installed package."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from sparse_attn.cli.checkout import checkout
from sparse_attn.cli.console import UsageError

HELP = "what the ideas are worth on real text: one study from one command (in a checkout)"

DESCRIPTION = """\
Runs one study: real text, equal budgets, a table, a JSON and a picture. `sparse-attn study NAME --help` says what it
asks and what it needs; all have a --quick form.
"""

HELPS = {
    "associative": "an exact task: which value stood beside this key? Accuracy by selection and budget",
    "attention": "models trained from scratch with exact top-k and with an indexer, against dense attention",
    "combined": "both ideas in one model, against neither and each: do speed-ups multiply, do losses add?",
    "cost": "what attention costs: published speed-ups recomputed, counted properly, and measured here",
    "hybrid": "heads approximated by small networks beside indexers and exact selection, on real text",
    "leak": "two published tests of token widths run again, then with their faults removed",
    "length": "up to a million tokens: time, memory and recall of each selection beside dense attention",
    "retrofit": "a trained language model made sparse without retraining: loss by selection and budget",
    "widths": "variable embedding widths against uniform ones of the same size: small GPTs on real text",
}


EPILOG = """\
examples:
  sparse-attn study cost --quick        a minute: counts and short sequences
  sparse-attn study retrofit --help     what a study asks and what it needs
  sparse-attn study retrofit --model DIR --text a.txt b.txt
                                        a language model's loss with each selection, at each budget
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = "studies:\n" + "\n".join(f"  {name:12} {HELPS[name]}" for name in HELPS) + "\n\n" + EPILOG
    parser.add_argument("study", choices=HELPS, metavar="NAME", help=f"one of {', '.join(HELPS)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of that study")


def run(arguments: argparse.Namespace) -> int:
    root = checkout()
    if root is None:
        raise UsageError(
            "the studies are not in the installed package: they need its source tree (git clone the repository and "
            "run `pip install -e '.[study]'` in it)"
        )
    sys.path.insert(0, str(root))
    study = import_module(f"benchmarks.studies.{arguments.study}")
    parser = argparse.ArgumentParser(f"sparse-attn study {arguments.study}")
    study.configure(parser)
    return study.execute(parser.parse_args(arguments.options))
