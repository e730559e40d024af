"""`sparse-attn train-indexer`: indexers that learn a language model's attention, at the length they will serve."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.cli import evaluate, language_model
from sparse_attn.cli.console import UsageError, count, device_of, refusals, require
from sparse_attn.distillation.indexers import distill_indexers
from sparse_attn.distillation.progress import reporting
from sparse_attn.evaluation import Document, Plan, Store, evaluate_model
from sparse_attn.evaluation.harness import check_documents

HELP = "train indexers on a language model's own attention, at the length that they are to serve"

DESCRIPTION = """\
Gives each attention layer of a causal model of transformers an indexer (a few narrow heads that score keys) and
trains it to score as the layer's own attention weighs; the model itself stays as it is. An indexer is good at the
lengths that it was trained at, and bad beyond: --length is the longest context that it is to serve.

The state is kept in OUT.training as it goes, and a run that was interrupted goes on from there. At the end the last
--held-out texts, which were not trained on, are run with the indexers beside dense attention and exact selection.
"""

EPILOG = """\
examples:
  sparse-attn train-indexer --model DIR --text *.txt --length 2048
  sparse-attn train-indexer --model DIR --text *.txt --length 8192 --queries 64 --updates 16 --share kv
  sparse-attn evaluate --model DIR --text other/*.txt --selector indexer+blocks --indexers indexers.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    language_model.add_options(parser)
    add = parser.add_argument
    add("--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 texts to learn from")
    add("--length", type=count(16), default=2048, metavar="T", help="tokens of a sequence (default 2048)")
    add("--steps", type=count(1), default=300, help="sequences (default 300)")
    add("--updates", type=count(1), default=1, help="of each indexer, per sequence (default 1)")
    add("--queries", type=count(1), default=256, help="that an update learns from (default 256)")
    add("--learning-rate", type=float, default=2e-3, help="of AdamW, at its height (default 0.002)")
    add("--heads", type=count(1), default=4, help="of an indexer, per group (default 4)")
    add("--head-dim", type=count(1), default=32, help="their width (default 32)")
    add("--share", choices=("all", "kv"), default="all", help="a selection for all heads, or per key head")
    add("--budget", default="12.5%", metavar="K", help="keys per query: 256, or 12.5%% (the default)")
    add("--held-out", type=count(0), default=2, help="texts kept for the evaluation (default 2)")
    add("--seed", type=count(0), default=0, help="of the order and the queries (default 0)")
    add("--threads", type=count(1), default=torch.get_num_threads(), help="torch threads")
    add("--out", type=Path, default=Path("indexers.safetensors"), metavar="FILE", help="file to write")


def run(arguments: argparse.Namespace) -> int:
    import sparse_attn.integrations.transformers as sparse_transformers

    torch.set_num_threads(arguments.threads)
    require("rich")
    with refusals():
        plan = Plan(["indexer", "indexer+blocks"], [arguments.budget], [arguments.length], ["text"])
    pairs = plan.pairs(arguments.length)
    if not pairs:
        raise UsageError(
            f"--budget must be fewer keys than --length {arguments.length}, got {arguments.budget}"
        )
    keys = pairs[0][1]
    texts = language_model.texts_of(arguments.text)
    model, tokenizer = language_model.load(arguments, device_of(arguments.device))
    documents = language_model.documents(tokenizer, texts)
    long = [d for d in documents if d.length >= arguments.length]
    if len(long) <= arguments.held_out:
        raise UsageError(
            f"--text needs more than --held-out {arguments.held_out} texts of more than {arguments.length} tokens, "
            f"got {len(long)}"
        )
    learned, held_out = long[: len(long) - arguments.held_out], long[len(long) - arguments.held_out :]
    if held_out:
        with refusals("--text "):
            check_documents(held_out, plan)
    torch.manual_seed(arguments.seed)  # of the weights that training starts from
    sparse_transformers.add_indexers(
        model, num_heads=arguments.heads, head_dim=arguments.head_dim, share=arguments.share
    )
    with refusals(), reporting("train indexers", arguments.steps, True) as advance:
        history = distill_indexers(
            model,
            sequences(learned, arguments.length, arguments.seed),
            arguments.steps,
            top_k=keys,
            queries=arguments.queries,
            updates=arguments.updates,
            learning_rate=arguments.learning_rate,
            checkpoint=arguments.out.with_suffix(".training"),
            save_every=max(1, arguments.steps // 20),
            seed=arguments.seed,
            progress=lambda step, steps, loss: advance(f"{loss:.3f} nats from the attention"),
        )
    sparse_transformers.save_indexers(model, arguments.out)
    edge = max(1, len(history) // 10)
    first, last = sum(history[:edge]) / edge, sum(history[-edge:]) / edge
    print(f"wrote {arguments.out}: {first:.3f} nats from the attention at first, {last:.3f} at the end")
    if held_out:
        store = Store(arguments.out.with_suffix(".evaluation.json"), {"trained": history[-1]})
        evaluate_model(model, held_out, plan, store, progress=True)
        evaluate.show(store, False)
    return 0


def sequences(documents: Sequence[Document], length: int, seed: int) -> Iterator[Tensor]:
    """Token ids [1, length] from random places of the texts, each text as often as the others, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for number in torch.randperm(len(documents), generator=generator).tolist():
            tokens = documents[number].tokens
            start = int(torch.randint(len(tokens) - length + 1, (), generator=generator))
            yield tokens[None, start : start + length]
