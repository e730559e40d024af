"""Writes the queries, keys and values of a real language model over a real text, for the `real` inputs.

    pip install transformers gguf accelerate
    python -m benchmarks.experiments.extract_real_inputs --model DIR --text FILE --out real_inputs.pt
    SPARSE_ATTN_REAL_INPUTS=real_inputs.pt sparse-attn bench

DIR holds a model that transformers can load (with --gguf NAME: that GGUF file in DIR). Kept are `--heads`
query heads spread evenly over all layers, each with its key and value head, after the rotary embedding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder")
    parser.add_argument("--text", required=True, help="a text of at least --length tokens")
    parser.add_argument("--length", type=int, default=8192, help="positions to keep (default 8192)")
    parser.add_argument("--heads", type=int, default=8, help="query heads to keep (default 8)")
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args()
    try:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise SystemExit(f"{error}: pip install transformers gguf accelerate") from None

    captured: dict[int, tuple[torch.Tensor, ...]] = {}

    def capture(module, query, key, value, attention_mask, scaling=None, **_):
        captured[module.layer_idx] = (query[0], key[0], value[0])  # [H, T, D], after the rotary embedding
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("capture", capture)
    AttentionMaskInterface.register("capture", sdpa_mask)
    gguf = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="capture", **gguf
    )
    ids = tokenizer(
        Path(args.text).read_text(encoding="utf-8", errors="replace"), return_tensors="pt"
    ).input_ids
    if ids.shape[1] < args.length:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, but --length is {args.length}")
    with torch.no_grad():
        model.model(ids[:, : args.length])

    layers, heads = len(captured), captured[0][0].shape[0]
    repeat = heads // captured[0][1].shape[0]
    # Head n of --heads comes from the n-th part of all layers × heads, whatever their numbers are.
    chosen = [
        divmod(int((n + 0.5) * layers * heads / args.heads), heads) for n in range(args.heads)
    ]  # (layer, head)
    stacks = zip(
        *[
            (captured[layer][0][head], captured[layer][1][head // repeat], captured[layer][2][head // repeat])
            for layer, head in chosen
        ],
        strict=True,
    )
    query, key, value = (torch.stack(stack) for stack in stacks)  # [heads, T, D]
    origin = {
        "model": args.gguf or Path(args.model).name,
        "text": Path(args.text).name,
        "layers_and_heads": [list(pair) for pair in chosen],
    }
    torch.save({"query": query, "key": key, "value": value, "origin": origin}, args.out)
    print(f"{args.out}: {list(query.shape)} from {origin}")


if __name__ == "__main__":
    main()
