"""The command line: `sparse-attn <command>`, also `python -m sparse_attn <command>`.

A command is a module of this package with `HELP` (one line), `configure(parser)` and `run(arguments) -> exit code`;
it becomes part of the program by its name in COMMANDS, where "-" is "_" in the module's. Exit codes: 0 done, 1
something was found wrong, 2 a bad option or a missing package, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

import torch

import sparse_attn
from sparse_attn.cli.console import UsageError

COMMANDS = ("demo", "doctor", "bench", "plan", "evaluate", "train-indexer", "study")

DESCRIPTION = """\
Top-k gathered sparse attention for PyTorch: each query attends to its top_k best keys alone, and no
[queries x keys] matrix is ever stored.
"""

EPILOG = """\
examples:
  sparse-attn doctor           what runs on this machine, what does not and why, and whether it computes right
  sparse-attn demo             watch a small GPT learn with top-k attention beside dense attention (two minutes)
  sparse-attn demo --help      everything that the demo can be asked
  sparse-attn bench --shape 1,32/8,4096,4096,128 --top-k 64,256
                               what is faster at your own shape: top-k or dense attention
  sparse-attn plan --tokens train.bin --dim 768 --budget 10M
                               how wide each token's embedding row should be
  sparse-attn evaluate --model DIR --text a.txt b.txt
                               what your language model loses by attending sparsely
  sparse-attn train-indexer --model DIR --text *.txt --length 8192
                               indexers that learn its attention
  sparse-attn study --help     the studies on real text (in a checkout)

in Python:
  out = sparse_attn.topk_attention(query, key, value, top_k=64, is_causal=True)
"""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines, and the columns do not depend on the width of the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sparse-attn", description=DESCRIPTION, epilog=EPILOG, formatter_class=Formatter
    )
    version = f"sparse-attn {sparse_attn.__version__} (torch {torch.__version__})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name in COMMANDS:
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP, formatter_class=Formatter)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; never raises for a bad option or for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that has no "×" shows "?" instead of ending in a traceback.
            stream.reconfigure(errors="replace")
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:  # argparse: --help, --version or a bad option
        return leaving.code if isinstance(leaving.code, int) else 2
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments)
    except SystemExit as leaving:  # argparse again, for the options of a study
        if isinstance(leaving.code, int):
            return leaving.code
        raise
    except UsageError as error:
        print(f"sparse-attn {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sparse-attn {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sparse-attn doctor | head`
        # Python flushes stdout once more at exit; without a pipe it would complain there.
        sys.stdout = None
        return 0
