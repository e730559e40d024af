"""Copies, pickles and threads of Hugging Face models and their caches: each against one that shares nothing."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import torch

import sparse_attn as sa
from faults import case, off_by, refused
from faults.huggingface import _configure, _ids, _llama


def _indexed():
    import sparse_attn.integrations.transformers as sparse_transformers

    return _configure(
        sparse_transformers.add_indexers(_llama(), num_heads=2, head_dim=8), top_k=6, selector="indexer"
    )


@torch.no_grad()
def _step(model, ids: torch.Tensor, past: Any) -> torch.Tensor:
    taken = inspect.signature(type(model).forward).parameters
    return model(input_ids=ids, **{"cache" if "cache" in taken else "past_key_values": past}).logits


def _filled(model):
    import transformers

    past = transformers.DynamicCache(config=model.config)
    _step(model, _ids(3, 24), past)
    return past


@case(
    "a deep copy of a cache with index keys, its beams reordered",
    "the original's were reordered: both off by 0.25",
)
def copied_cache() -> str:
    model, order = _indexed(), torch.tensor([2, 0, 0])
    past, fresh = _filled(model), _filled(model)
    other = copy.deepcopy(past)
    for cache in (other, fresh):
        cache.reorder_cache(order)
    ids = _ids(3, 1)
    copied = off_by(_step(model, ids, other), _step(model, ids, fresh), 0)
    return f"copy {copied}, original {off_by(_step(model, ids, past), _step(model, ids, _filled(model)), 0)}"


@case("a cache with index keys, each of its layers reordered", "old index keys chose: off by 0.18")
def reordered_layers() -> str:
    model, order = _indexed(), torch.tensor([2, 0, 0])
    past, fresh = _filled(model), _filled(model)
    for layer in past.layers:
        layer.reorder_cache(order)
    fresh.reorder_cache(order)
    return off_by(_step(model, _ids(3, 1), past), _step(model, _ids(3, 1), fresh), 0)


@case("four threads run one model with indexers", "AttributeError, or what another thread's tokens chose")
def threads_with_indexers() -> str:
    model, texts = _indexed(), [_ids(1, length) for length in (40, 50, 60, 70)]
    wanted = [_step(model, ids, None) for ids in texts]
    found: list[Any] = [None] * len(texts)

    def run(number: int) -> None:
        found[number] = [_step(model, texts[number], None) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f is not None for f in found), "a thread failed"
    return ", ".join(dict.fromkeys(off_by(t, w, 0) for f, w in zip(found, wanted, strict=True) for t in f))


@case("a model pickled after its attention was changed to another", "TypeError: cannot pickle 'weakref'")
def pickled_model() -> str:
    model = _configure(_llama(), top_k=6)
    past = _filled(model)
    _step(model, _ids(3, 1), past)
    model.set_attn_implementation("sdpa")
    _step(model, _ids(3, 1), past)
    again = pickle.loads(pickle.dumps(model))
    return off_by(_step(again, _ids(3, 24), None), _step(model, _ids(3, 24), None), 0)


@case("`configure` with a backend that there is not", "accepted, refused at the first forward")
def unknown_backend() -> str:
    return refused(lambda: _configure(_llama(), top_k=6, backend="gpu"), "backend", "gpu")


@case("packed sequences in whole blocks, one with a NaN", "its other outputs had other last bits than alone")
def packed_blocks_beside_nan() -> str:
    lengths, sizes = [7, 31], {"block_size": 16, "query_tile": 8}
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(sum(lengths), 1, d, generator=generator) for d in (9, 9, 63))
    value[20, 0, 5] = torch.nan
    where = torch.tensor([0, 7, 38]), None, 31, 31
    blocks = sa.varlen_block_select(query, key, *where, 4, **sizes)
    out = sa.varlen_block_attention(query, key, value, blocks, *where, **sizes)[7:]
    parts = [t[7:].transpose(0, 1)[None] for t in (query, key, value)]
    alone = sa.block_attention(*parts, blocks[1:5].transpose(0, 1)[None], **sizes)[0].transpose(0, 1)
    assert bool(alone.isnan().any()), "the NaN is to be seen"
    return off_by(out.nan_to_num(0.0), alone.nan_to_num(0.0), 0)
