"""`sparse-attn bench`: the standard tables, or a table for a shape of one's own."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from sparse_attn.bench import inputs, machine, own_shape, registry, suites
from sparse_attn.bench.own_shape import Shape, Wish
from sparse_attn.cli.checkout import checkout
from sparse_attn.cli.console import UsageError, count, require
from sparse_attn.files import write_text

HELP = "what is faster: top-k or dense attention, at your own shape or over the standard table"

DESCRIPTION = """\
With --shape: topk_attention at each --top-k beside scaled_dot_product_attention, FlexAttention and plain PyTorch at
that shape, on the CPU: forward, forward + backward, and one decoding step with a cache of Tk keys; then one sentence
on which is faster. What would take longer than --seconds is left out and named. Nothing is written without --out.

Without --shape: the standard table of a suite, every figure beside its target, a JSON and a PNG. In a checkout they go
to benchmarks/results (--quick: benchmarks/scratch), else to sparse_attn_bench in the current folder.

All contenders get the same inputs, are checked against float64 before they are timed, and take turns (A B A B ...), so
the ratios come from one run. With SPARSE_ATTN_REAL_INPUTS=FILE (see docs/performance.md) the attention suite is
repeated on a language model's own queries and keys; with SPARSE_ATTN_GPT2_BPE=DIR (GPT-2's encoder.json and vocab.bpe)
the widths suite on real token ids.
"""

EPILOG = """\
examples:
  sparse-attn bench --shape 1,32/8,4096,4096,128 --top-k 64,256 --dtype float32,bfloat16
                                        a prompt of 4096 tokens, 32 query heads over 8 key heads
  sparse-attn bench --shape 1,8/8,1,32768,64 --top-k 128
                                        one query with a cache of 32768 keys
  sparse-attn bench --quick             a smoke test of the attention table, under two minutes
  sparse-attn bench                     all of it, some minutes
  sparse-attn bench --suite widths      the variable-width embedding and its loss
  sparse-attn bench --op indexer_select --json
                                        one op's rows, as JSON on standard output
"""

SHAPE = re.compile(r"(\d+),(\d+)(?:/(\d+))?,(\d+),(\d+),(\d+)")
# Plain PyTorch takes this long for nothing: without the native kernels long sequences are left out.
PURE_MAX_LENGTH = 1024


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    own = parser.add_argument_group("your own shape")
    own.add_argument("--shape", metavar="B,Hq/Hkv,Tq,Tk,D", help="batch, heads, queries, keys, head width")
    own.add_argument("--top-k", metavar="K,K", help="keys per query (default: 64,256)")
    own.add_argument("--dtype", metavar="NAME,NAME", help="of float32, bfloat16, float16 (default: float32)")
    own.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="the last query sees all keys (default: causal)",
    )
    own.add_argument("--seconds", type=count(1), help="what the whole table may take (default: 120)")
    table = parser.add_argument_group("the standard table")
    table.add_argument("--quick", action="store_true", help="few rounds: a smoke test")
    table.add_argument("--suite", choices=registry.SUITES, help="what to measure (default: attention)")
    table.add_argument(
        "--op", choices=registry.names(), metavar="OP", help=f"one of {', '.join(registry.names())}"
    )
    table.add_argument("--name", help="of the two files (default: the suite's or op's, with _cpu)")
    table.add_argument("--max-length", type=count(1), help="leave out longer sequences")
    parser.add_argument(
        "--threads", type=count(1), default=min(2, inputs.cores()), help="torch threads (default: 2)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure what dense tiles and gathering cost here and keep it for the CPU wing (under a minute)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON and the PNG")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    own, table = ("top_k", "dtype", "causal", "seconds"), ("quick", "suite", "op", "name", "max_length")
    unfit, why = (own, "needs") if arguments.shape is None else (table, "does not go with")
    for name in unfit:
        if getattr(arguments, name) not in (None, False) or (name == "causal" and arguments.causal is False):
            raise UsageError(f"--{name.replace('_', '-')} {why} --shape")
    if arguments.suite and arguments.op:
        raise UsageError("--suite and --op exclude each other")
    require("rich")
    if arguments.shape is None or arguments.out is not None:
        require("matplotlib")
    if arguments.calibrate:
        return _calibrate(arguments)
    torch.set_num_threads(arguments.threads)
    return _standard(arguments) if arguments.shape is None else _own_shape(arguments)


def _calibrate(arguments: argparse.Namespace) -> int:
    given = {k for k, v in vars(arguments).items() if v not in (None, False)} & {
        "shape",
        "suite",
        "op",
        "quick",
        "out",
    }
    if given:
        raise UsageError(f"--calibrate goes without --{min(given)}")
    from sparse_attn.bench import calibrate
    from sparse_attn.wings import extension, tile_costs

    if extension.module is None:
        raise UsageError(f"--calibrate measures the native kernels: {extension.load_error}")
    with _bar(calibrate.STEPS) as step:
        costs = calibrate.measure(step)
    file = tile_costs.write(costs)
    if arguments.json:
        print(json.dumps(costs, indent=2))
    else:
        say("Nanoseconds of one thread: " + ", ".join(f"{name} {cost:.3g}" for name, cost in costs.items()))
        say(f"Kept in {file}; the CPU wing goes by it from the next process on.")
    return 0


# ---- a shape of one's own -------------------------------------------------------------------------------


def wish(arguments: argparse.Namespace) -> Wish:
    """What the options ask for; one sentence for what they cannot ask for."""
    found = SHAPE.fullmatch(arguments.shape.replace(" ", ""))
    if not found or 0 in (sizes := [int(n) for n in found.groups(found[2])]):
        raise UsageError(
            "--shape takes B,Hq/Hkv,Tq,Tk,D, whole numbers from 1 on such as 1,32/8,4096,4096,128, "
            f"got {arguments.shape!r}"
        )
    shape = Shape(*sizes)
    if shape.heads % shape.kv_heads:
        raise UsageError(f"--shape: Hq must be a multiple of Hkv, got {shape.heads}/{shape.kv_heads}")
    if shape.dim > 256:
        raise UsageError(f"--shape: D can be 256 at most, got {shape.dim}")
    causal = arguments.causal is not False
    if causal and shape.queries > shape.keys:
        raise UsageError(
            f"--shape: with --causal there can be no more queries than keys, got Tq={shape.queries} and "
            f"Tk={shape.keys} (--no-causal takes any)"
        )
    top_k = _listed("--top-k", arguments.top_k or "64,256", "whole numbers from 1 on", _positive)
    known = tuple(inputs.DTYPES)
    dtypes = _listed(
        "--dtype", arguments.dtype or "float32", f"of {', '.join(known)}", lambda t: t if t in known else None
    )
    return Wish(shape, tuple(sorted(top_k)), dtypes, causal, arguments.seconds or 120)


def _positive(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) else None


def _listed(option: str, text: str, accepted: str, parse: Callable) -> tuple:
    """The parts of a list with commas, each once."""
    parts = [parse(part.strip()) for part in text.split(",")]
    if None in parts:
        raise UsageError(f"{option} takes a list with commas, {accepted}, got {text!r}")
    return tuple(dict.fromkeys(parts))


def _own_shape(arguments: argparse.Namespace) -> int:
    asked = wish(arguments)
    command = f"sparse-attn bench --shape {arguments.shape} --top-k {','.join(map(str, asked.top_k))}"
    command += f" --dtype {','.join(asked.dtypes)}{'' if asked.causal else ' --no-causal'}"
    command += f" --threads {arguments.threads}"
    try:
        with _bar(own_shape.steps(asked)) as step:
            results = own_shape.run(asked, arguments.threads, command, step)
    except registry.WrongResult as error:
        return _wrong(error)
    from sparse_attn.bench import plots, report

    if arguments.out is not None:
        _write(results, arguments.out, arguments.name or "own_shape_cpu", plots.draw_ratios)
    _show(results, arguments.json, report.print_own_shape)
    return 0


# ---- the standard table ---------------------------------------------------------------------------------


def _standard(arguments: argparse.Namespace) -> int:
    if machine.wing() != "cpu" and arguments.max_length is None:
        arguments.max_length = PURE_MAX_LENGTH
    suite = arguments.suite or "attention"
    ops = [registry.op(arguments.op)] if arguments.op else registry.suite(suite)
    say(f"{arguments.threads} threads; torch {torch.__version__}; {machine.wing()} wing")
    if arguments.max_length is not None:
        say(f"sequences past T={arguments.max_length} are left out")
    quick, longest = arguments.quick, arguments.max_length
    try:
        with _bar(suites.steps(ops, quick)) as step:
            results = suites.run(ops, quick, arguments.threads, longest, _command(arguments), step)
    except registry.WrongResult as error:
        return _wrong(error)
    from sparse_attn.bench import plots, report

    folder = arguments.out or _folder(quick)
    name = arguments.name or f"{arguments.op or suite}_cpu"
    _write(results, folder, name, plots.draw)
    _show(results, arguments.json, report.print_results)
    root = checkout()
    if root is not None and folder == root / "benchmarks" / "results":
        say("`python -m benchmarks.readme --write` puts these figures into README.md and docs")
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """The command for the record, without the folders of this machine."""
    words = ["sparse-attn bench"]
    words += [f"--{name} {getattr(arguments, name)}" for name in ("suite", "op") if getattr(arguments, name)]
    words += ["--quick"] if arguments.quick else []
    words += [f"--threads {arguments.threads}"]
    words += [f"--max-length {arguments.max_length}"] if arguments.max_length else []
    return " ".join(words)


def _folder(quick: bool) -> Path:
    root = checkout()
    if root is None:
        return Path("sparse_attn_bench")
    return root / "benchmarks" / ("scratch" if quick else "results")


# ---- both -----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """To standard error: standard output is the program's."""
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False)


@contextmanager
def _bar(total: int):
    """A progress bar on standard error; yields the function that is told what comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda what: progress.update(task, description=what, advance=1)


def _wrong(error: Exception) -> int:
    say(f"Nothing was reported, for a contender computes something else: {error}")
    return 1


def _write(results: dict, folder: Path, name: str, draw: Callable[[dict, Path], None]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1, ensure_ascii=False)
        write_text(folder / f"{name}.json", text + "\n")
        draw(results, folder / f"{name}.png")
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from None
    say(f"wrote {name}.json and {name}.png to {folder}")


def _show(results: dict, as_json: bool, show: Callable) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        show(results, Console())
