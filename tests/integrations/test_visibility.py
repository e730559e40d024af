"""Padding, packed documents and sliding windows: each sequence is what it is alone."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    LENGTH,
    SHAPE,
    cached,
    close,
    ids,
    llama,
    logits,
    padding,
    pair,
    positions_of,
    small,
)  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_padding_changes_nothing(side, share):
    _, sparse = pair(top_k=8, window=3, sinks=2, share=share)
    mask = padding(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batched = sparse(input_ids=ids(), attention_mask=mask, position_ids=positions).logits
        for b in range(3):
            alone = sparse(input_ids=ids()[b : b + 1, mask[b].bool()]).logits[0]
            close(batched[b, mask[b].bool()], alone)


def test_no_mask_of_all_pairs_is_made():
    _, sparse = pair(top_k=8)
    mask = padding("left")
    made = sparse_transformers.attention_mask(
        batch_size=3,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=transformers.masking_utils.causal_mask_function,
        attention_mask=mask.bool(),
    )
    assert made.mask is None
    assert made.padding is None
    assert made.starts.tolist() == [0, 4, 8]


def test_sliding_window_layers(no_shortcut):
    dense, sparse = pair(model=small(transformers.MistralConfig, sliding_window=8), window=4, sinks=1)
    for mask in (None, padding("left")):
        close(logits(sparse, ids(), mask), logits(dense, ids(), mask))


def test_packed_sequences(no_shortcut):
    dense, sparse = pair()
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    more = {"position_ids": positions, "use_cache": False}
    close(logits(sparse, ids(1), **more), logits(dense, ids(1), **more))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{"sinks": 2}, {"window": 3, "sinks": 2, "share": "all"}], ids=str)
def test_packed_documents_have_sinks_of_their_own(kind, options):
    """In sliding layers the first keys of the document, where they can still be seen."""
    model = llama() if kind == "llama" else small(transformers.MistralConfig, sliding_window=8)
    _, sparse = pair(top_k=6, model=model, **options)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    together = logits(sparse, ids(1), position_ids=positions, use_cache=False)
    for part in (slice(0, 10), slice(10, 24)):
        close(together[:, part], logits(sparse, ids(1)[:, part], use_cache=False))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_layers_decode_as_they_prefill(cache):
    """Their cache no longer holds the first keys: these are no sinks any more, and none takes their place."""
    model = small(transformers.MistralConfig, sliding_window=8)
    _, sparse = pair(top_k=6, model=model, window=2, sinks=2)
    kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
    past = kind(config=sparse.config, **({} if cache == "dynamic" else {"max_cache_len": 40}))
    parts = [logits(sparse, ids()[:, :5], **cached(past))]
    parts += [logits(sparse, ids()[:, t : t + 1], **cached(past)) for t in range(5, LENGTH)]
    close(torch.cat(parts, 1), logits(sparse, ids()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_an_encoder_changes_nothing(side):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, attention_probs_dropout_prob=0.0)
    sparse = sparse_transformers.configure(transformers.BertModel(config).eval(), top_k=6, sinks=2)
    mask = padding(side)
    with torch.no_grad():
        batched = sparse(ids(), attention_mask=mask, position_ids=positions_of(mask)).last_hidden_state
        for b in range(3):
            alone = sparse(ids()[b : b + 1, mask[b].bool()]).last_hidden_state[0]
            close(batched[b, mask[b].bool()], alone)


def test_a_mask_of_ones_own():
    """[B, 1, Tq, Tk]: a window is kept where the mask is causal; sinks are each query's first visible keys."""
    _, sparse = pair(top_k=6, window=3, sinks=2)
    packed = torch.zeros((1, 1, LENGTH, LENGTH), dtype=torch.bool)
    packed[..., :10, :10] = packed[..., 10:, 10:] = True
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        ours = sparse(input_ids=ids(1), attention_mask=packed.tril(), position_ids=positions)
    close(ours.logits, logits(sparse, ids(1), position_ids=positions, use_cache=False))


def test_padding_in_the_middle():
    """What right-padded sequences leave when they are continued; a hole is skipped by the window and the choice."""
    _, sparse = pair(top_k=10_000, sinks=2)
    dense, _ = pair()
    mask = padding("right")
    mask[:, -3:] = 1
    more = {"position_ids": positions_of(mask)}
    sparse.config.sparse_attn_top_k = (
        LENGTH - 1
    )  # not all, so not dense attention, and yet all that is visible
    real = mask.bool()
    with torch.no_grad():
        ours = sparse(input_ids=ids(), attention_mask=mask, **more).logits[1:]
        theirs = dense(input_ids=ids(), attention_mask=mask, **more).logits[1:]
    close(ours[real[1:]], theirs[real[1:]])
