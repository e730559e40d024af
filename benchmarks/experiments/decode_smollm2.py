"""A language model's tokens per second with a long cache: exact selection, with key indices and without, and SDPA.

    pip install "sparse-attn[hf]" gguf accelerate
    python -m benchmarks.experiments.decode_smollm2 --model DIR [--gguf NAME] --text FILE … [--context 8192]
        [--tokens 48] [--rounds 3] [--top-k 256] [--caches dynamic static] [--profile] [--keep FILE]
        [--json FILE]

`generate` goes on from a cache of `--context` tokens of text, which is filled once with SDPA. That exact selection
generates the same tokens with key indices as without is asserted before anything is timed. Then all take turns; a row
is the median of the time between two tokens. "no attention" is the same model and cache with an attention that returns
zeros: no attention can be faster than that. The profile says, for exact selection with indices, what a token's time
goes to.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.bench import machine
from sparse_attn.demo.text import read

WARM = 4  # first tokens, in which an index is made
LABELS = {
    "sdpa": "SDPA",
    "exact": "exact selection",
    "indexed": "exact selection, key indices",
    "none": "no attention",
}


def nothing(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **others
) -> tuple[Tensor, None]:
    """Zeros [B, Tq, Hq, Dv] at no price."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


class Decoding:
    """One model, and the cache of one text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import transformers

        import sparse_attn.integrations.transformers as sparse_transformers

        self.arguments, self.lib, self.transformers = arguments, sparse_transformers, transformers
        transformers.utils.logging.disable_progress_bar()
        transformers.AttentionInterface.register("no_attention", nothing)
        transformers.masking_utils.AttentionMaskInterface.register(
            "no_attention", transformers.masking_utils.sdpa_mask
        )
        more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **more)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, **more
        ).eval()
        text = "\n\n".join(read(file) for file in arguments.text)
        self.tokens = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.context + 1]
        if self.tokens.shape[1] <= arguments.context:
            raise SystemExit(f"--text has {self.tokens.shape[1]} tokens, --context needs more")
        taken = inspect.signature(type(self.model).forward).parameters
        self.argument = "cache" if "cache" in taken else "past_key_values"
        self.prompt = self.filled(arguments.keep)

    def filled(self, keep: Path | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tokens but the last, layer by layer."""
        if keep is not None and keep.exists():
            return torch.load(keep, weights_only=True)
        self.use("sdpa")
        cache = self.transformers.DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model.model(self.tokens[:, :-1], **{self.argument: cache})
        prompt = [(layer.keys, layer.values) for layer in cache.layers]
        if keep is not None:
            torch.save(prompt, keep)
        return prompt

    def cache(self, kind: str):
        """A new cache of the prompt's keys and values."""
        if kind == "dynamic":
            cache = self.transformers.DynamicCache(config=self.model.config)
        else:
            room = self.arguments.context + WARM + self.arguments.tokens + 1
            cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=room)
        for number, (keys, values) in enumerate(self.prompt):
            cache.update(keys, values, number)
        return cache

    def use(self, contender: str) -> None:
        if contender in ("exact", "indexed"):
            self.lib.configure(
                self.model, top_k=self.arguments.top_k, key_index=contender == "indexed", self_test=False
            )
        else:
            self.model.set_attn_implementation("sdpa" if contender == "sdpa" else "no_attention")

    def generate(self, contender: str, kind: str, tokens: int) -> tuple[Tensor, list[float]]:
        """(the tokens, when each of them was there in seconds)"""
        self.use(contender)
        times: list[float] = []

        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            times.append(time.perf_counter())
            return scores

        out = self.model.generate(
            self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            logits_processor=self.transformers.LogitsProcessorList([watch]),
            **{self.argument: self.cache(kind)},
        )
        return out[:, self.tokens.shape[1] :], times

    def measure(self, kind: str) -> dict[str, dict[str, float]]:
        count = WARM + self.arguments.tokens
        made = {contender: self.generate(contender, kind, count)[0] for contender in ("exact", "indexed")}
        if not torch.equal(made["exact"], made["indexed"]):
            raise SystemExit(f"{kind}: with key indices other tokens were generated: {made}")
        print(f"{kind} cache: the same {count} tokens with key indices as without")
        steps: dict[str, list[float]] = {contender: [] for contender in LABELS}
        for _ in range(self.arguments.rounds):
            for contender, found in steps.items():
                _, times = self.generate(contender, kind, count)
                found += [
                    after - before for before, after in zip(times[WARM:-1], times[WARM + 1 :], strict=True)
                ]
        middle = {contender: statistics.median(found) for contender, found in steps.items()}
        rows = {
            contender: {
                "ms_per_token": 1e3 * seconds,
                "tokens_per_second": 1 / seconds,
                "against_sdpa": middle["sdpa"] / seconds,
            }
            for contender, seconds in middle.items()
        }
        for contender, row in rows.items():
            print(
                f"  {LABELS[contender]:30} {row['ms_per_token']:7.1f} ms a token, "
                f"{row['tokens_per_second']:6.2f} tokens/s, {row['against_sdpa']:.2f} × SDPA"
            )
        return rows

    def profile(self, kind: str, contender: str = "indexed", count: int = 12) -> dict[str, float]:
        """ms per token by op, its own time alone."""
        from torch.profiler import ProfilerActivity, profile

        self.generate(contender, kind, 2)
        with profile(activities=[ProfilerActivity.CPU]) as run:
            self.generate(contender, kind, count)
        own = {event.key: event.self_cpu_time_total / 1e3 / count for event in run.key_averages()}
        most = dict(sorted(own.items(), key=lambda item: -item[1])[:10])
        print(f"  {kind}, {LABELS[contender]}: " + ", ".join(f"{op} {ms:.1f}" for op, ms in most.items()))
        return most


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a Llama-like causal language model")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="texts, end to end")
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache (default 8192)")
    parser.add_argument("--tokens", type=int, default=48, help="timed tokens per round (default 48)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all contenders (default 3)")
    parser.add_argument("--top-k", type=int, default=256, help="keys per query (default 256)")
    parser.add_argument("--caches", nargs="+", choices=("dynamic", "static"), default=["dynamic", "static"])
    parser.add_argument("--profile", action="store_true", help="also say what a token's time goes to, by op")
    parser.add_argument("--keep", type=Path, help="a file for the filled cache, which another run takes up")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    decoding = Decoding(arguments)
    rows = {kind: decoding.measure(kind) for kind in arguments.caches}
    own = {kind: decoding.profile(kind) for kind in arguments.caches if arguments.profile}
    if arguments.json:
        results = {
            "machine": machine.describe(
                torch.get_num_threads(), "python -m benchmarks.experiments.decode_smollm2"
            ),
            "model": arguments.gguf or Path(arguments.model).name,
            "texts": [file.name for file in arguments.text],
            "context": arguments.context,
            "top_k": arguments.top_k,
            "labels": LABELS,
            "rows": rows,
            "profile_ms_per_token": own,
        }
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
