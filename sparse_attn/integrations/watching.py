"""What each attention layer of a Hugging Face model is given, shown while the model runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations.masks import attention_mask as make_mask
from sparse_attn.integrations.options import configs_of
from sparse_attn.integrations.packed import within_documents
from sparse_attn.integrations.visibility import Visibility, scores_of

_numbers = count()  # a name a use: threads watch models of their own


class Given(NamedTuple):
    """The tensors of one layer's attention in one call."""

    module: torch.nn.Module
    hidden: Tensor | None  # [B, T, C], what the layer projects; of `modules` alone
    rope: tuple[Tensor, Tensor] | None  # (cos, sin) of the positions, where the model has rotary embeddings
    query: Tensor  # [B, Hq, T, D], after the rotary embedding
    key: Tensor  # [B, Hkv, T, D]
    value: Tensor  # [B, Hkv, T, Dv]
    scale: float | None
    seen: Visibility
    others: dict[str, Any]  # whatever else the layer asked for


def layer_inputs(arguments: tuple, named: dict) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(hidden states, rotary cosines and sines) from what an attention module was called with."""
    hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
    rope = named.get("position_embeddings")
    if rope is None and len(arguments) > 1 and isinstance(arguments[1], tuple):
        rope = arguments[1]
    return hidden, rope


@contextmanager
def dense_but_shown(model: torch.nn.Module, look: Callable[[Given], None]):
    """Within it `model` runs with its dense attention, and `look` is called in each layer before that."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=0.0,
        scaling=None,
        is_causal=None,
        softcap=None,
        s_aux=None,
        **others,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = within_documents(Visibility.of(attention_mask, query, key, causal), others, query, key)
        asked = {"dropout": dropout, "softcap": softcap, "s_aux": s_aux, **others}
        look(Given(module, None, None, query, key, value, scaling, seen, asked))
        out = seen.dense_attention(query, key, value, scores_of(scaling, softcap, s_aux))
        return out.transpose(1, 2), None

    implementation = f"sparse_attn_watching_{next(_numbers)}"
    AttentionInterface.register(implementation, attention)
    AttentionMaskInterface.register(implementation, make_mask)
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    try:
        model.set_attn_implementation(implementation)
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name  # of this config alone, not of those within it
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(implementation, None)  # it holds the model


@contextmanager
def watching(model: torch.nn.Module, look: Callable[[Given], None], modules: Iterable[torch.nn.Module]):
    """Within it `model` runs with its dense attention, and `look` is called in each of `modules` before that.

    Yields:
        run(tokens), which passes int64 [B, T] token ids through the model without its head.
    """
    inputs: dict[int, tuple] = {}  # of the modules that are running

    def remember(module, arguments, named) -> None:
        inputs[id(module)] = layer_inputs(arguments, named)

    def with_inputs(given: Given) -> None:
        if id(given.module) in inputs:
            hidden, rope = inputs.pop(id(given.module))
            look(given._replace(hidden=hidden, rope=rope))

    def run(tokens: Tensor) -> None:
        checks.token_batch("batches must hold", tokens, model.get_input_embeddings().num_embeddings)
        base = getattr(model, model.base_model_prefix, model)
        with torch.no_grad():
            base(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)

    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        with dense_but_shown(model, with_inputs):
            yield run
    finally:
        for hook in hooks:
            hook.remove()
