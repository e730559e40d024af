"""Continuous batching: each request gets what it gets alone, and every layer's keys are chosen."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
continuous_batching = pytest.importorskip(
    "transformers.generation.continuous_batching", reason="this transformers has no continuous batching"
)
if not hasattr(continuous_batching.ContinuousBatchingManager, "switch_to_cb_friendly_attn"):
    pytest.skip("continuous batching of another transformers", allow_module_level=True)
from sparse_attn.integrations import continuous  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import ids, llama, small  # noqa: E402

LENGTHS = (40, 3, 21, 60, 33)
NEW = 6


def batch_config(**more):
    return transformers.ContinuousBatchingConfig(
        **{"page_size": 16, "num_blocks": 64, "max_batch_tokens": 32, "default_compile_level": 0, **more}
    )


def generated(model, prompts, **more):
    config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    out = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batch_config(**more), progress_bar=False
    )
    return [found.generated_tokens for found in out.values()]


def alone(model, prompt):
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()


def prompts():
    return [ids(1, length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 8},
        {"top_k": 8, "window": 2, "sinks": 1, "share": "kv"},
        {"top_k": 8, "selector": "int8", "share": "all"},
        {"top_k": 8, "layers": [1]},
        {"top_k": None},
    ],
    ids=str,
)
def test_each_request_gets_what_it_gets_alone(options):
    """Prompts longer than the 32 tokens of a step are read in parts, beside others' steps."""
    model = sparse_transformers.configure(llama(), **options)
    found = generated(model, prompts())
    assert model.config._attn_implementation == "sparse_attn"
    assert found == [alone(model, prompt) for prompt in prompts()]


def test_keys_are_chosen(monkeypatch):
    """By packed calls in every layer and step, none of them over more keys than the budget."""
    seen = []
    attend = continuous.select_and_attend

    def watched(query, key, value, top_k, selector, rule, **others):
        seen.append((query.shape[2], key.shape[2], top_k, tuple(rule.key_starts.shape)))
        return attend(query, key, value, top_k, selector, rule, **others)

    monkeypatch.setattr(continuous, "select_and_attend", watched)
    model = sparse_transformers.configure(llama(), top_k=8)
    generated(model, prompts())
    assert len(seen) >= 2 * NEW
    assert all(top_k == 8 and starts == (1, queries) for queries, _, top_k, starts in seen)
    assert any(1 < queries <= 5 and keys > 100 for queries, keys, _, _ in seen)  # all of them decode


def test_low_rank_scorers_and_selectors_of_ones_own():
    from sparse_attn.selection import Rounded

    model = llama()
    sparse_transformers.fit_low_rank(model, [ids()], rank=4)
    for selector in ("low_rank", Rounded()):
        sparse_transformers.configure(model, top_k=8, selector=selector)
        assert generated(model, prompts()[:3]) == [alone(model, prompt) for prompt in prompts()[:3]]


def test_other_models_are_left_alone():
    """Models with another attention go the way that they went."""
    sparse_transformers.register()
    sparse_transformers.register()
    model = llama()
    model.set_attn_implementation("eager")
    found = generated(model, prompts()[:2])
    assert found == [alone(model, prompt) for prompt in prompts()[:2]]


CALL = {"read_index": [], "write_index": [], "cu_seq_lens_q": torch.tensor([0, 2]), "max_length_q": 2,
        "cu_seq_lens_k": torch.tensor([0, 70]), "max_length_k": 70}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (
            {"top_k": 192, "selector": "blocks"},
            {"length": 200},
            "takes selector='exact', 'int8', 'low_rank' or",
        ),
        ({"top_k": 8, "residual": True}, {}, "takes residual=False"),
        ({"top_k": 8}, {"block_table": torch.zeros(1, 1)}, "set max_blocks_per_request=0"),
        ({"top_k": 8}, {"indices": torch.zeros(1, 2, 8, dtype=torch.int32)}, "has no indices, which"),
    ],
    ids=str,
)
def test_what_it_has_not_is_refused(options, given, message):
    model = sparse_transformers.configure(llama(), **options)
    length = given.pop("length", 70)
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 6, 2, 8), torch.randn(1, 2, length, 8)
    call = {**CALL, "cu_seq_lens_k": torch.tensor([0, length]), "max_length_k": length, **given}
    with pytest.raises(ValueError, match=message):
        sparse_transformers.attention_forward(layer, query, key, key, None, **call)


def test_sliding_windows_are_refused():
    model = sparse_transformers.configure(small(transformers.MistralConfig, sliding_window=8), top_k=4)
    layer = model.model.layers[0].self_attn
    key = torch.randn(1, 2, 70, 8)
    with pytest.raises(ValueError, match="has a sliding window"):
        sparse_transformers.attention_forward(
            layer, torch.randn(1, 6, 2, 8), key, key, None, sliding_window=8, **CALL
        )


@pytest.mark.filterwarnings("ignore:.*paged.*:FutureWarning")
def test_the_name_with_a_prefix():
    """`paged|sparse_attn` is this attention, with the options that the model has."""
    model = sparse_transformers.configure(llama(), top_k=8)
    expected = generated(model, prompts()[:2])
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("paged|sparse_attn")
    assert generated(model, prompts()[:2]) == expected
