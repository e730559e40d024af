"""A small serving loop: continuous batching over a paged cache, sparse beside dense attention.

    pip install "sparse-attn[hf]" gguf
    python examples/serve_paged.py --model DIR --gguf FILE --text *.txt --context 4096 --requests 6

Requests arrive one by one, each a piece of the texts. A step either reads the prompt of the next request, or makes the
next token of all that run, together. A request leaves when its tokens are made, and its pages go to the next one.

Sparse attention is one `varlen_topk_attention` per layer and step, which finds each request's keys through
`block_table`, where they lie, and most of those that are not chosen rules out by their 8-bit rows in a `PagedKeyIndex`
(`--no-index`: without). The dense rival keeps each request's keys in one piece, which suits
scaled_dot_product_attention best, and calls it once per request. Printed are tokens per second, latencies and the
cache's size; before, each request's tokens are compared with those that it gets when it is served alone (`--check`).

The model is any of transformers' Llama kind (Llama, SmolLM2, …), in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from sparse_attn.bench import machine

PAGE = 64  # tokens


@dataclass
class Request:
    """A prompt, what was made of it, and where its keys and values lie."""

    prompt: Tensor  # int64 [T]
    new_tokens: int
    arrives: int  # the step from which on it may be served
    tokens: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys are in the cache
    pages: list[int] = field(default_factory=list)
    waited: float = 0.0  # when it could first be served, then seconds from there to its first token
    latencies: list[float] = field(default_factory=list)  # seconds for each token after the first

    @property
    def length(self) -> int:
        return len(self.prompt) + self.new_tokens


class PagedCache:
    """Keys and values of all requests and layers in pages; `attend` is sparse."""

    def __init__(
        self, config: object, requests: int, longest: int, top_k: int, with_index: bool = True
    ) -> None:
        self.top_k, self.per_request = top_k, math.ceil(longest / PAGE)
        pages = requests * self.per_request
        shape = config.num_hidden_layers, pages, PAGE, config.num_key_value_heads, config.head_dim
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.free = list(range(pages))
        self.indices = [sparse_attn.PagedKeyIndex.of(keys) for keys in self.keys] if with_index else None

    def admit(self, request: Request) -> bool:
        """Takes pages for the whole request; False while there are not enough."""
        needed = math.ceil(request.length / PAGE)
        if needed > len(self.free):
            return False
        request.pages = [self.free.pop() for _ in range(needed)]
        return True

    def release(self, request: Request) -> None:
        self.free.extend(request.pages)
        request.pages = []

    def plan(self, batch: Sequence[Request], counts: Sequence[int]) -> Callable:
        """For a step with so many new tokens of each request: attend(layer, query, key, value), all [T, H, D]."""
        table = torch.full((len(batch), self.per_request), -1, dtype=torch.int32)
        for row, request in zip(table, batch, strict=True):
            row[: len(request.pages)] = torch.tensor(request.pages)
        used = torch.tensor([r.cached + n for r, n in zip(batch, counts, strict=True)])
        cu_seq = torch.tensor([0, *counts]).cumsum(0)
        where = [torch.arange(r.cached, r.cached + n) for r, n in zip(batch, counts, strict=True)]
        slots = torch.cat([row[at // PAGE] * PAGE + at % PAGE for row, at in zip(table, where, strict=True)])
        longest, most = int(used.max()), max(counts)
        whole = not any(r.cached for r in batch)  # prompts, whose keys are all here: the pages are for later

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.flatten(0, 1)[slots] = key
            values.flatten(0, 1)[slots] = value
            index = None if self.indices is None else self.indices[layer].write(slots, key)
            if whole:
                return sparse_attn.varlen_topk_attention(
                    query, key, value, cu_seq, None, most, most, self.top_k, is_causal=True
                )
            return sparse_attn.varlen_topk_attention(
                query, keys, values, cu_seq, None, most, longest, self.top_k,
                is_causal=True, seqused_k=used, block_table=table, key_index=index,
            )  # fmt: skip

        return attend

    def bytes(self) -> int:
        rows = [t for index in self.indices or () for t in (index.codes, index.bounds)]
        return sum(t.nbytes for t in (self.keys, self.values, *rows))


class DenseCache:
    """Keys and values of each request in one piece; `attend` is scaled_dot_product_attention, request by request."""

    def __init__(self, config: object, requests: int, longest: int) -> None:
        shape = requests, 2, config.num_hidden_layers, config.num_key_value_heads, longest, config.head_dim
        self.rows = torch.zeros(shape)
        self.free = list(range(requests))

    def admit(self, request: Request) -> bool:
        if not self.free:
            return False
        request.pages = [self.free.pop()]
        return True

    release = PagedCache.release

    def plan(self, batch: Sequence[Request], counts: Sequence[int]) -> Callable:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outs, begin = [], 0
            for request, count in zip(batch, counts, strict=True):
                here, end = slice(begin, begin + count), request.cached + count
                keys, values = self.rows[request.pages[0], :, layer]  # [Hkv, longest, D]
                keys[:, request.cached : end] = key[here].transpose(0, 1)
                values[:, request.cached : end] = value[here].transpose(0, 1)
                q, k, v = query[here].transpose(0, 1)[None], keys[None, :, :end], values[None, :, :end]
                if count == 1:  # a group's query heads as queries: nothing is read twice
                    grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
                    out = F.scaled_dot_product_attention(grouped, k, v).flatten(1, 2)
                else:  # a whole prompt
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[
                        0
                    ].transpose(0, 1)
                outs.append(out)
                begin += count
            return torch.cat(outs)

        return attend

    def bytes(self) -> int:
        return self.rows.numel() * 4


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, D], [T, 1, D]
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-other, one), dim=-1) * sin


def forward(model: torch.nn.Module, ids: Tensor, positions: Tensor, ends: Tensor, attend: Callable) -> Tensor:
    """Logits [S, V] at `ends` of the packed tokens `ids` [T]."""
    x = model.model.embed_tokens(ids)
    cos, sin = (t[0, :, None] for t in model.model.rotary_emb(x[None], positions[None]))
    for number, layer in enumerate(model.model.layers):
        own = layer.self_attn
        h = layer.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (-1, own.head_dim)) for p in (own.q_proj, own.k_proj, own.v_proj))
        out = attend(number, rotated(q, cos, sin), rotated(k, cos, sin), v)
        x = x + own.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[ends]))


def step(model: torch.nn.Module, cache: PagedCache | DenseCache, batch: Sequence[Request]) -> None:
    """The next token of each request, whose last token, or prompt, is not in the cache yet."""
    new = [r.prompt if not r.tokens else torch.tensor(r.tokens[-1:]) for r in batch]
    counts = [len(ids) for ids in new]
    positions = torch.cat([torch.arange(r.cached, r.cached + n) for r, n in zip(batch, counts, strict=True)])
    ends = torch.tensor(counts).cumsum(0) - 1
    logits = forward(model, torch.cat(new), positions, ends, cache.plan(batch, counts))
    for request, count, token in zip(batch, counts, logits.argmax(-1).tolist(), strict=True):
        request.cached += count
        request.tokens.append(token)


class Clock:
    now: Callable[[], float] = time.perf_counter  # seconds


@torch.no_grad()
def serve(
    model: torch.nn.Module, cache: PagedCache | DenseCache, requests: Sequence[Request]
) -> dict[str, float]:
    """Serves all; seconds and tokens of prompts, and of steps that make tokens."""
    waiting, running, number = deque(sorted(requests, key=lambda r: r.arrives)), [], 0
    spent = {"prompt s": 0.0, "prompt tokens": 0, "decode s": 0.0, "decode tokens": 0}
    while waiting or running:
        now = Clock.now()
        for request in waiting:
            if request.arrives <= number and not request.waited:
                request.waited = now
        ready = bool(waiting) and (waiting[0].arrives <= number or not running)
        if ready and cache.admit(waiting[0]):
            request = waiting.popleft()
            step(model, cache, [request])
            spent["prompt s"] += Clock.now() - now
            spent["prompt tokens"] += len(request.prompt)
            request.waited = Clock.now() - (request.waited or now)
            running.append(request)
        else:
            step(model, cache, running)
            took = Clock.now() - now
            spent["decode s"] += took
            spent["decode tokens"] += len(running)
            for request in running:
                request.latencies.append(took)
        for request in [r for r in running if len(r.tokens) == r.new_tokens]:
            running.remove(request)
            cache.release(request)
        number += 1
    return spent


def measured(
    model: torch.nn.Module,
    new_cache: Callable[[], PagedCache | DenseCache],
    new_requests: Callable[[], list[Request]],
    check: int,
) -> dict[str, float]:
    """What a user of the server would see, once the first `check` requests got what they get alone."""
    cache, requests = new_cache(), new_requests()
    spent = serve(model, cache, requests)
    for request, alone in zip(requests[:check], new_requests(), strict=False):
        serve(model, new_cache(), [alone])
        if alone.tokens != request.tokens:
            raise SystemExit(f"served alone a request got {alone.tokens}, among others {request.tokens}")
    gaps = torch.tensor([s for r in requests for s in r.latencies])
    first = torch.tensor([r.waited for r in requests])
    made = sum(len(r.tokens) for r in requests)
    return {
        "tokens/s": made / (spent["prompt s"] + spent["decode s"]),
        "decode tokens/s": spent["decode tokens"] / spent["decode s"],
        "prompt tokens/s": spent["prompt tokens"] / spent["prompt s"],
        "first token p50 s": first.quantile(0.5).item(),
        "next token p50 ms": gaps.quantile(0.5).item() * 1e3,
        "next token p95 ms": gaps.quantile(0.95).item() * 1e3,
        "cache MB": cache.bytes() / 1e6,
    }


def read_requests(ids: Tensor, args: argparse.Namespace) -> Callable[[], list[Request]]:
    """Pieces of the text; their lengths differ by up to a quarter, and they arrive `--every` steps apart."""
    pieces, at = [], 0
    for n in range(args.requests):
        length = args.context - args.new_tokens - n * args.context // (4 * args.requests)
        if at + length > len(ids):
            raise SystemExit(
                f"the texts have {len(ids)} tokens, {args.requests} requests need more: give more --text"
            )
        pieces.append(ids[at : at + length])
        at += length
    return lambda: [Request(piece, args.new_tokens, n * args.every) for n, piece in enumerate(pieces)]


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal language model of the Llama kind")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder")
    parser.add_argument("--text", required=True, nargs="+", help="texts that the prompts are taken from")
    parser.add_argument(
        "--context", type=int, default=4096, help="tokens of the longest request, new ones included"
    )
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="requests that the cache has room for")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--every", type=int, default=4, help="steps between two arrivals")
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--check", type=int, default=1, help="requests that are served alone, too, and compared"
    )
    parser.add_argument("--no-index", action="store_true", help="sparse attention without a PagedKeyIndex")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="seconds are the processor's, on one thread: for a machine that is not idle",
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'sparse-attn[hf]' gguf") from None
    if args.processor_time:
        args.threads, Clock.now = 1, time.process_time
    torch.set_num_threads(args.threads)
    gguf = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **gguf)
    text = "\n\n".join(Path(name).read_text(encoding="utf-8", errors="replace") for name in args.text)
    new_requests = read_requests(tokenizer(text, return_tensors="pt").input_ids[0], args)
    return compare(model, new_requests, args)


def compare(
    model: torch.nn.Module, new_requests: Callable[[], list[Request]], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    room = model.config, args.batch, args.context
    caches = {
        "dense": lambda: DenseCache(*room),
        f"top {args.top_k}": lambda: PagedCache(*room, args.top_k, not args.no_index),
    }
    found = {name: measured(model, cache, new_requests, args.check) for name, cache in caches.items()}
    dense, sparse = found.values()
    print(f"{'':20}" + "".join(f"{name:>12}" for name in found) + f"{'ratio':>10}")
    for name in dense:
        print(f"{name:20}{dense[name]:12.4g}{sparse[name]:12.4g}{sparse[name] / dense[name]:9.2f}×")
    if args.json:
        settings = {
            name: value for name, value in vars(args).items() if name not in ("json", "model", "text")
        }
        about = machine.describe(args.threads, f"serve_paged.py --context {args.context}")
        Path(args.json).write_text(
            json.dumps({"machine": about, "settings": settings, **found}, indent=1) + "\n", encoding="utf-8"
        )
    return found


if __name__ == "__main__":
    main()
