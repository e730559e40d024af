"""Layers with a sliding window: numbers in place of a mask, and so all that takes none: tails, blocks, long texts."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.integrations.masks import slides  # noqa: E402
from sparse_attn.selection import Blocks, Exact, Rule, attend  # noqa: E402
from tests.integrations.architectures import build  # noqa: E402
from tests.integrations.models import LENGTH, cached, close, ids, logits, padding, pair, small  # noqa: E402

MASKS = transformers.masking_utils


def mistral(window: int, **more):
    return small(transformers.MistralConfig, sliding_window=window, max_position_embeddings=2048, **more)


def mask_of(window: int, queries: int, keys: int, q_offset: int = 0, kv_offset: int = 0, **more):
    return sparse_transformers.attention_mask(
        batch_size=2,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        local_size=window,
        mask_function=MASKS.sliding_window_causal_mask_function(window),
        **more,
    )


@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "kv_offset"), [(9, 9, 0, 0), (3, 9, 6, 0), (4, 7, 13, 10), (6, 6, 0, 0)]
)
@pytest.mark.parametrize("window", [1, 4, 6])
def test_numbers_show_what_the_mask_shows(window, queries, keys, q_offset, kv_offset):
    seen = mask_of(window, queries, keys, q_offset, kv_offset)
    theirs = MASKS.sdpa_mask(
        batch_size=2,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        local_size=window,
        mask_function=MASKS.sliding_window_causal_mask_function(window),
        allow_is_causal_skip=False,
    )
    if seen is None:
        assert torch.equal(theirs[0, 0], torch.ones(queries, keys, dtype=torch.bool).tril())
        return
    assert seen.mask is None
    assert torch.equal(seen.spelled_out().mask.expand(2, -1, -1, -1), theirs) or seen.reach is None
    visible = torch.arange(keys) <= torch.arange(queries)[:, None] + seen.offset
    if seen.starts is not None:
        visible = visible & (torch.arange(keys) >= seen.starts[0][:, None])
    assert torch.equal(visible, theirs[0, 0])


def test_another_mask_is_no_sliding_window():
    for wrong in (
        MASKS.causal_mask_function,
        MASKS.sliding_window_causal_mask_function(5),
        MASKS.sliding_window_causal_mask_function(3),
        MASKS.sliding_window_bidirectional_mask_function(4),
        MASKS.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
    ):
        assert not slides(wrong, 4, 12, 0, "cpu")
    assert slides(MASKS.sliding_window_causal_mask_function(4), 4, 12, 0, "cpu")
    assert mask_of(4, 9, 9, attention_mask=padding("left", 2, 9).bool()).reach is None


@pytest.mark.parametrize("top_k", [None, 24], ids=["dense", "a budget that holds the window"])
@pytest.mark.parametrize("window", [24, 700])
def test_dense_layers_look_at_their_windows(window, top_k):
    dense, sparse = pair(model=mistral(window), top_k=700 if top_k else None)
    tokens = ids(2, 1300)
    close(logits(sparse, tokens), logits(dense, tokens))


def test_gradients_of_dense_layers():
    models = pair(model=mistral(24), top_k=24)
    for model in models:
        model(input_ids=ids(1, 1100), labels=ids(1, 1100)).loss.backward()
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def with_oracle(model, choose):
    """`model` with `choose(query, key, value, rule)` in the place of its attention; all layers have one window."""
    window, name = model.config.sliding_window, f"oracle_{id(choose)}"

    def attention(module, query, key, value, attention_mask, scaling=None, **others):
        starts = torch.arange(query.shape[2]).expand(query.shape[0], -1) - window + 1
        rule = Rule(True, 0, key_starts=starts, scale=scaling)
        return choose(query, key, value, rule).transpose(1, 2), None

    transformers.AttentionInterface.register(name, attention)
    transformers.masking_utils.AttentionMaskInterface.register(name, MASKS.sdpa_mask)
    oracle = copy.deepcopy(model)
    oracle.set_attn_implementation(name)
    return oracle


@pytest.mark.parametrize("share", ["none", "kv"])
def test_the_mean_of_what_is_left_out(share):
    """Against every score: the window's best keys, and the mean of its other values for the mass of the others."""

    def choose(query, key, value, rule):
        seen = torch.ones(len(query[0, 0]), len(key[0, 0]), dtype=torch.bool).tril()
        seen &= torch.arange(key.shape[2]) >= rule.key_starts[0][:, None]
        key, value = (t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        weights = (query.double() @ key.mT * rule.scale).masked_fill(~seen, -torch.inf).softmax(-1)
        rank = weights
        if share == "kv":
            rank = weights.unflatten(1, (2, -1)).sum(2, keepdim=True).expand(-1, -1, 3, -1, -1).flatten(1, 2)
        best = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, rank.topk(6).indices, True) & seen
        rest = (seen & ~best).double()
        mean = rest @ value / rest.sum(-1, keepdim=True).clamp(min=1)
        return ((weights * best) @ value + (weights * rest).sum(-1, keepdim=True) * mean).to(query)

    model = mistral(20)
    sparse = sparse_transformers.configure(copy.deepcopy(model), top_k=6, residual=True, share=share)
    close(logits(sparse, ids(2, 90)), logits(with_oracle(model, choose), ids(2, 90)))


@pytest.mark.parametrize(
    ("options", "choose"),
    [
        (
            {"top_k": 12, "residual": "blocks"},
            lambda q, k, v, rule: attend(
                q, k, v, Exact("reference").select(q, k, 12, rule), rule=rule, tail="blocks", backend="reference"
            ),
        ),
        (
            {"top_k": 192, "selector": "blocks"},
            lambda q, k, v, rule: attend(
                q, k, v, Blocks(backend="reference").select(q, k, 192, rule), rule=rule, backend="reference"
            ),
        ),
    ],
    ids=["tail of blocks", "blocks"],
)  # fmt: skip
def test_what_takes_no_mask(options, choose):
    model = mistral(300)
    sparse = sparse_transformers.configure(copy.deepcopy(model), **options)
    tokens = ids(2, 700)
    ours = logits(sparse, tokens)
    close(ours, logits(with_oracle(model, choose), tokens))
    assert not torch.allclose(ours, logits(model, tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"residual": True}, {"window": 2}, {"share": "all"}], ids=str)
@pytest.mark.parametrize("step", [1, 5])
def test_decoding_is_what_prefilling_is(options, step):
    model = mistral(8)
    _, sparse = pair(top_k=6, model=model, **options)
    past = transformers.DynamicCache(config=sparse.config)
    parts = [
        logits(sparse, ids()[:, t : t + step], **cached(past)) for t in range(0, LENGTH // step * step, step)
    ]
    close(torch.cat(parts, 1), logits(sparse, ids())[:, : LENGTH // step * step])


def test_sinks_are_the_sequences_and_no_tail_goes_with_them():
    sparse = sparse_transformers.configure(mistral(8), top_k=6, residual=True, sinks=1)
    with pytest.raises(ValueError, match=r"another mask \(a sliding window"):
        logits(sparse, ids())


def test_gemma_3():
    """Sliding and full layers by turns, rotary embeddings of their own; generation included."""
    model = build("Gemma 3")
    tokens = ids(2, 60)
    dense, sparse = pair(model=model, top_k=None)
    close(logits(sparse, tokens), logits(dense, tokens))
    for options in ({"share": "kv"}, {"residual": "blocks"}, {"window": 4, "sinks": 1}, {"selector": "int8"}):
        sparse_transformers.configure(sparse, top_k=59, **options)
        close(logits(sparse, tokens)[:, :-1], logits(dense, tokens)[:, :-1])
        sparse_transformers.configure(sparse, top_k=6, **options)
        more = {"max_new_tokens": 6, "do_sample": False}
        told = sparse.generate(tokens, **more)
        past = torch.cat([tokens, told[:, 60:]], 1)
        assert torch.equal(logits(sparse, past)[:, 59:-1].argmax(-1), told[:, 60:])
