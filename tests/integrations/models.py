"""Small models of random weights, and what the tests of Hugging Face models have in common."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LENGTH = 24


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def small(config_class, **more):
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def pair(top_k=10_000, model=None, **options):
    """The same weights with scaled_dot_product_attention and with ours."""
    dense = llama() if model is None else model
    dense.set_attn_implementation("sdpa")
    return dense, sparse_transformers.configure(copy.deepcopy(dense), top_k=top_k, **options)


def ids(batch=3, length=LENGTH):
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side, batch=3, length=LENGTH):
    mask = torch.ones((batch, length), dtype=torch.int64)
    for b in range(1, batch):
        where = slice(0, 4 * b) if side == "left" else slice(length - 4 * b, length)
        mask[b, where] = 0
    return mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def cached(past):
    """The argument of a model that takes its key/value cache, by the name of this transformers version."""
    taken = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": past}


def logits(model, tokens, mask=None, **more):
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, **more).logits
    return out if mask is None else out[mask.bool()]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
