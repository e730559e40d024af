"""What each attention layer of a Hugging Face model is given, shown while the model runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations.visibility import Visibility
from sparse_attn.integrations.visibility import attention_mask as make_mask

_IMPLEMENTATION = "sparse_attn_watching"


class Given(NamedTuple):
    """The tensors of one layer's attention in one call."""

    module: torch.nn.Module
    hidden: Tensor  # [B, T, C], what the layer projects
    rope: tuple[Tensor, Tensor] | None  # (cos, sin) of the positions, where the model has rotary embeddings
    query: Tensor  # [B, Hq, T, D], after the rotary embedding
    key: Tensor  # [B, Hkv, T, D]
    value: Tensor  # [B, Hkv, T, Dv]
    scale: float | None


def layer_inputs(arguments: tuple, named: dict) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(hidden states, rotary cosines and sines) from what an attention module was called with."""
    hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
    rope = named.get("position_embeddings")
    if rope is None and len(arguments) > 1 and isinstance(arguments[1], tuple):
        rope = arguments[1]
    return hidden, rope


@contextmanager
def watching(model: torch.nn.Module, look: Callable[[Given], None], modules: Iterable[torch.nn.Module]):
    """Within it `model` runs with its dense attention, and `look` is called in each of `modules` before that.

    Yields:
        run(tokens), which passes int64 [B, T] token ids through the model without its head.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    inputs: dict[int, tuple] = {}  # of the modules that are running

    def remember(module, arguments, named) -> None:
        inputs[id(module)] = layer_inputs(arguments, named)

    def attention(
        module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = Visibility.of(attention_mask, query, key, causal)
        if id(module) in inputs:
            look(Given(module, *inputs.pop(id(module)), query, key, value, scaling))
        return seen.dense_attention(query, key, value, scaling).transpose(1, 2), None

    def run(tokens: Tensor) -> None:
        checks.token_batch("batches must hold", tokens, model.get_input_embeddings().num_embeddings)
        base = getattr(model, model.base_model_prefix, model)
        with torch.no_grad():
            base(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)

    AttentionInterface.register(_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, make_mask)
    before = model.config._attn_implementation
    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
