"""`sparse-attn evaluate`: what a language model loses by attending sparsely."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_attn.bench import machine
from sparse_attn.cli import language_model
from sparse_attn.cli.console import UsageError, count, device_of, refusals, require
from sparse_attn.evaluation import Document, Plan, Store, draw, evaluate_model, tables
from sparse_attn.evaluation.arms import NAMES
from sparse_attn.evaluation.harness import TASKS, notes

HELP = "what a language model loses by attending sparsely: text, needles, and which keys are found"

DESCRIPTION = """\
Runs a causal model of transformers with dense attention and with each selection at each budget, over the same texts:

  text      cross-entropy over the last half of each document, beside dense attention's on the same documents, and the
            KL divergence of what it predicts, with 95 % intervals over documents
  recall    which of each head's best keys a selection finds, and how much attention is on those that it takes
  needles   numbers told at some depth of a long text and asked for at its end, one or several: how many answers are
            right, and how many nats one takes, beside dense attention on the same text

The first row is dense attention, the ceiling; the exact selection of each head, the oracle, is always among the others.
Results are kept in --out after each step, and what is there is not run again: an interrupted run goes on.
"""

EPILOG = f"""\
selectors: {", ".join(NAMES)};
  with /kv or /all where heads share a selection, /reuse2 where two layers do, and with +tail or +blocks where means of
  what is left out are added

examples:
  sparse-attn evaluate --model DIR --text a.txt b.txt --selector exact exact/kv exact+tail --budget 5% 12.5%
  sparse-attn evaluate --model DIR --text *.txt --selector indexer+blocks --indexers FILE --lengths 2048 8192
  sparse-attn evaluate --model DIR --text *.txt --selector low_rank --calibrate other/*.txt --tasks recall
"""

CALIBRATED = 4  # texts that low-rank scorers are fitted on


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    language_model.add_options(parser)
    add = parser.add_argument
    add("--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 texts, a document each")
    add("--selector", nargs="+", default=list(Plan.selectors), metavar="NAME", help="how keys are chosen")
    add("--budget", nargs="+", default=list(Plan.budgets), metavar="K", help="keys per query: 256, or 12.5%%")
    add("--lengths", nargs="+", type=count(16), default=list(Plan.lengths), metavar="T", help="tokens (2048)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add(
        "--last",
        type=count(1),
        metavar="N",
        help="tokens at the end that text is measured on (default: half)",
    )
    add("--documents", type=count(1), default=Plan.documents, help="texts at most, per length (default 10)")
    add(
        "--cases",
        type=count(1),
        default=Plan.cases,
        help="texts with several needles, and with one at each depth (4)",
    )
    add(
        "--dense",
        choices=("sdpa", "eager", "sparse_attn"),
        help="of the dense rows (default: the model's own, mostly sdpa); sparse_attn is quick with sliding windows",
    )
    add("--indexers", type=Path, metavar="FILE", help="trained indexers, for the selector indexer")
    add("--calibrate", nargs="+", type=Path, metavar="FILE", help="other texts, which low_rank is fitted on")
    add("--rank", type=count(1), default=16, help="of low_rank (default 16)")
    add("--threads", type=count(1), default=torch.get_num_threads(), help="torch threads")
    add("--out", type=Path, default=Path("evaluation.json"), metavar="FILE", help="results (evaluation.json)")
    add("--json", action="store_true", help="print the results as JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    require("rich")
    require("matplotlib")
    with refusals():
        plan = Plan(
            arguments.selector,
            arguments.budget,
            arguments.lengths,
            arguments.tasks,
            arguments.documents,
            arguments.cases,
            arguments.dense,
            arguments.last,
        )
        about = {"model": language_model.name_of(arguments), "dtype": arguments.dtype}
        for name in ("indexers", "calibrate"):
            given = getattr(arguments, name)
            if given:
                about[name] = given.name if isinstance(given, Path) else [f.name for f in given[:CALIBRATED]]
        if arguments.dense:
            about["dense"] = arguments.dense
        store = opened(arguments.out, about)
    needs = {"indexer": "indexers", "low_rank": "calibrate"}
    for name in {arm.name for arm in plan.arms()} & needs.keys():
        if not getattr(arguments, needs[name]):
            what = (
                "a file of sparse-attn train-indexer" if name == "indexer" else "texts that it is fitted on"
            )
            raise UsageError(f"--selector {name} needs --{needs[name]}, {what}")
    texts = language_model.texts_of(arguments.text)
    others = language_model.texts_of((arguments.calibrate or [])[:CALIBRATED], "--calibrate")
    model, tokenizer = language_model.load(arguments, device_of(arguments.device))
    documents = language_model.documents(tokenizer, texts)
    prepare(model, arguments, language_model.documents(tokenizer, others))
    for note in notes(model, documents, plan):
        print(f"note: {note}", file=sys.stderr)
    store.machine = machine.describe(arguments.threads, command(arguments))
    with refusals():
        evaluate_model(model, documents, plan, store, encode=language_model.encoder(tokenizer), progress=True)
    store.save()
    draw(store, arguments.out.with_suffix(".png"), f"{about['model']}: sparse attention beside dense")
    show(store, arguments.json)
    return 0


def opened(file: Path, about: dict) -> Store:
    """The results, in a file that can be written: better said now than when hours are over."""
    if file.suffix == ".png":
        raise UsageError(f"--out must be a JSON file, beside which the picture is written, got {file}")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if file.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = "it is a folder" if file.is_dir() else f"{above} is no folder that can be written in"
        raise UsageError(f"--out {file} cannot be written: {why}")
    try:
        return Store(file, about)
    except OSError as error:
        raise UsageError(f"--out {file} cannot be read: {error.strerror or error}") from None


def prepare(model, arguments: argparse.Namespace, others: Sequence[Document]) -> None:
    """Gives the model the indexers and scorers that were asked for."""
    import sparse_attn.integrations.transformers as sparse_transformers

    if arguments.indexers:
        try:
            with refusals("--indexers "):
                sparse_transformers.load_indexers(model, arguments.indexers)
        except OSError as error:
            raise UsageError(
                f"--indexers {arguments.indexers} cannot be read: {error.strerror or error}"
            ) from None
    if others:
        batches = [d.tokens[None, : max(arguments.lengths)] for d in others]
        with refusals("--calibrate "):
            sparse_transformers.fit_low_rank(model, batches, rank=arguments.rank)


def command(arguments: argparse.Namespace) -> str:
    """What was run, without folders: they are this machine's."""
    parts = ["sparse-attn evaluate", f"--selector {' '.join(arguments.selector)}"]
    parts += [f"--budget {' '.join(arguments.budget)}", f"--lengths {' '.join(map(str, arguments.lengths))}"]
    parts += [f"--tasks {' '.join(arguments.tasks)}", f"--documents {arguments.documents}"]
    if "needles" in arguments.tasks:
        parts.append(f"--cases {arguments.cases}")
    if arguments.last:
        parts.append(f"--last {arguments.last}")
    if arguments.dense:
        parts.append(f"--dense {arguments.dense}")
    if arguments.indexers:
        parts.append(f"--indexers {shlex.quote(arguments.indexers.name)}")
    return " ".join(parts)


def show(store: Store, as_json: bool) -> None:
    found = tables(store)
    if as_json:
        result = {"about": store.about, "rows": store.rows, "tables": [t._asdict() for t in found]}
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    for title, columns, rows in found:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        Console(width=120).print(table)
    print(f"wrote {store.file.name} and {store.file.with_suffix('.png').name} to {store.file.parent}")
