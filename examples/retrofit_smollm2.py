"""A real language model made sparse: SmolLM2-135M with indexers that learn its attention.

    pip install "sparse-attn[hf,cli]" gguf accelerate
    python examples/retrofit_smollm2.py train --model DIR [--gguf NAME] --text FILE … --out indexers.safetensors
    python examples/retrofit_smollm2.py generate --model DIR [--gguf NAME] --indexers indexers.safetensors

DIR is any causal model of transformers with rotary attention (with --gguf NAME: that GGUF file in it); any texts will
do to train on, some hundred thousand tokens of them. Training goes on from `OUT.training` when it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import sparse_attn.integrations.transformers as sparse_transformers
from sparse_attn.distillation import distill_indexers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "generate"))
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder")
    parser.add_argument("--indexers", type=Path, help="generate: the trained indexers")
    parser.add_argument("--text", nargs="+", type=Path, help="train: texts to learn from")
    parser.add_argument("--out", type=Path, default=Path("indexers.safetensors"), help="train: file to write")
    parser.add_argument("--steps", type=int, default=300, help="train: sequences (default 300)")
    parser.add_argument("--length", type=int, default=1024, help="train: tokens of each (default 1024)")
    parser.add_argument("--queries", type=int, default=256, help="train: queries of each (default 256)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="train: of AdamW (default 0.002)")
    parser.add_argument("--heads", type=int, default=4, help="train: heads of an indexer (default 4)")
    parser.add_argument("--head-dim", type=int, default=32, help="train: their width (default 32)")
    parser.add_argument("--top-k", type=int, default=256, help="keys per query (default 256)")
    parser.add_argument("--prompt", default="The state of the Union is", help="generate: its beginning")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, arguments.gguf)
    if arguments.what == "train":
        train(model, tokenizer, arguments)
    else:
        generate(model, tokenizer, arguments)


def load(folder: str, gguf: str | None = None):
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval(), tokenizer


def sequences(tokenizer, texts: list[Path], length: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Token ids [1, length] from random places of the texts, without end."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, torch.Tensor] = {}
    while True:
        number = int(torch.randint(len(texts), (), generator=generator))
        if number not in kept:
            text = texts[number].read_text("utf-8", "replace")
            kept[number] = tokenizer(text, return_tensors="pt").input_ids[0].to(torch.int32)
        tokens = kept[number]
        start = int(torch.randint(max(1, len(tokens) - length), (), generator=generator))
        if len(tokens) >= length:
            yield tokens[start : start + length].long()[None]


def train(model, tokenizer, arguments) -> None:
    from rich.progress import Progress

    if not arguments.text:
        raise SystemExit("train needs --text FILE …")
    sparse_transformers.add_indexers(model, num_heads=arguments.heads, head_dim=arguments.head_dim)
    with Progress() as bar:
        task = bar.add_task("training", total=arguments.steps)

        def show(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"training, {loss:.3f} nats from the attention")

        history = distill_indexers(
            model,
            sequences(tokenizer, arguments.text, arguments.length),
            arguments.steps,
            top_k=arguments.top_k,
            queries=arguments.queries,
            learning_rate=arguments.learning_rate,
            checkpoint=arguments.out.with_suffix(".training"),
            progress=show,
        )
    sparse_transformers.save_indexers(model, arguments.out)
    edge = max(1, len(history) // 10)
    first, last = sum(history[:edge]) / edge, sum(history[-edge:]) / edge
    print(f"wrote {arguments.out}: {first:.3f} nats from the attention at first, {last:.3f} at the end")


def generate(model, tokenizer, arguments) -> None:
    selector = "exact"
    if arguments.indexers:
        sparse_transformers.load_indexers(model, arguments.indexers)
        selector = "indexer"
    sparse_transformers.configure(model, top_k=arguments.top_k, selector=selector, sinks=4)
    tokens = tokenizer(arguments.prompt, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
