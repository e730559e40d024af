"""A real language model made sparse: SmolLM2-135M generates with few keys per query, chosen by trained indexers.

    pip install "sparse-attn[hf,cli]" gguf accelerate
    sparse-attn train-indexer --model DIR [--gguf NAME] --text FILE … --length 1024 --out indexers.safetensors
    python examples/retrofit_smollm2.py --model DIR [--gguf NAME] --indexers indexers.safetensors

DIR is any causal model of transformers with rotary attention (with --gguf NAME: that GGUF file in it); any texts will
do to train on, some hundred thousand tokens of them. Without --indexers the keys are each head's own best.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_attn.integrations.transformers as sparse_transformers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder")
    parser.add_argument("--indexers", help="what sparse-attn train-indexer wrote")
    parser.add_argument("--top-k", type=int, default=256, help="keys per query (default 256)")
    parser.add_argument("--prompt", default="The state of the Union is", help="what is gone on with")
    arguments = parser.parse_args()
    more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **more)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **more).eval()
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
