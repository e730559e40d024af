"""Top-k attention inside transformers models: small models of random weights, against their own SDPA."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import sparse_attn  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    LENGTH,
    cached,
    close,
    ids,
    logits,
    padding,
    pair,
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 3}, {"share": "all"}], ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_budget_of_all_keys_is_dense_attention(no_shortcut, side, options):
    dense, sparse = pair(**options)
    mask = padding(side) if side else None
    close(logits(sparse, ids(), mask), logits(dense, ids(), mask))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 3}], ids=str)
def test_generation_equals_dense_generation(no_shortcut, cache, side, options):
    dense, sparse = pair(**options)
    mask = padding(side) if side else torch.ones_like(ids())
    more = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    if cache == "static":
        more["cache_implementation"] = "static"
        more["disable_compile"] = True
    theirs = dense.generate(ids(), attention_mask=mask, **more)
    ours = sparse.generate(ids(), attention_mask=mask, **more)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(torch.stack(ours.scores), torch.stack(theirs.scores))


@pytest.mark.parametrize(
    "options", [{"top_k": 6}, {"top_k": 9, "window": 4, "sinks": 2, "share": "kv"}], ids=str
)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_equals_prefill_token_by_token(cache, side, options):
    _, sparse = pair(**options)
    tokens = ids()
    mask = padding(side) if side else torch.ones_like(tokens)
    kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
    past = kind(config=sparse.config) if cache == "dynamic" else kind(config=sparse.config, max_cache_len=40)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = 10  # prefill, then a token at a time
    steps = [slice(0, first)] + [slice(t, t + 1) for t in range(first, LENGTH)]
    with torch.no_grad():
        whole = sparse(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        pieces = [
            sparse(
                input_ids=tokens[:, step],
                attention_mask=mask[:, : step.stop],
                position_ids=positions[:, step],
                **cached(past),
            ).logits
            for step in steps
        ]
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_in_chunks_equals_prefill(padded):
    _, sparse = pair(top_k=7, window=3, sinks=2)
    tokens, mask = ids(), padding("left") if padded else torch.ones_like(ids())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = transformers.DynamicCache(config=sparse.config)
    with torch.no_grad():
        whole = sparse(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        pieces = [
            sparse(
                input_ids=tokens[:, a : a + 8],
                attention_mask=mask[:, : a + 8],
                position_ids=positions[:, a : a + 8],
                **cached(past),
            ).logits
            for a in range(0, LENGTH, 8)
        ]
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


def test_sparse_is_what_topk_attention_says(monkeypatch):
    calls = []

    def spy(query, key, value, top_k, selector, rule, **more):
        calls.append(rule)
        indices = sparse_attn.topk_select(query, key, top_k, **rule.arguments())
        return sparse_attn.gathered_attention(query, key, value, indices, scale=rule.scale)

    monkeypatch.setattr(sparse_transformers, "select_and_attend", spy)
    dense, sparse = pair(top_k=8, window=3, sinks=2, share="kv", layers=[1])
    assert not torch.allclose(logits(sparse, ids()), logits(dense, ids()), atol=1e-4)
    (rule,) = calls  # layer 0 is dense
    assert (rule.window, rule.sinks) == (3, 2)
    assert rule.share == "kv"
    assert rule.attn_mask is None


def test_options_may_change_between_calls():
    dense, sparse = pair(top_k=4)
    few = logits(sparse, ids())
    sparse.config.sparse_attn_top_k = 12
    assert not torch.allclose(logits(sparse, ids()), few, atol=1e-5)
    sparse.config.sparse_attn_top_k = None
    close(logits(sparse, ids()), logits(dense, ids()))


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_equal_those_of_dense_attention(no_shortcut, residual):
    dense, sparse = pair(residual=residual)
    for model in (dense, sparse):
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
    for (name, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_gpt2(no_shortcut):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    dense, sparse = pair(model=transformers.GPT2LMHeadModel(config).eval())
    close(logits(sparse, ids(), padding("left")), logits(dense, ids(), padding("left")))


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17),
    reason="before 5.17 transformers' DeepSeek reads the mask as a tensor",
)
def test_a_selection_that_the_model_brings_itself():
    """DeepSeek's models choose the keys with an indexer of their own."""
    config = transformers.DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        mlp_layer_types=["dense", "dense"],
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs = logits(model, ids(2))
    theirs_padded = logits(model, ids(2), padding("left", 2))
    sparse_transformers.register()
    model.set_attn_implementation("sparse_attn")
    close(logits(model, ids(2)), theirs)
    close(logits(model, ids(2), padding("left", 2)), theirs_padded)
