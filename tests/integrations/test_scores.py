"""Scores that are bounded (Gemma 2) and heads with a logit of their own (gpt-oss): against the models' eager code."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.architectures import build  # noqa: E402
from tests.integrations.models import close, ids, logits, padding, positions_of  # noqa: E402

KINDS = ["Gemma 2", "gpt-oss"]
OPTIONS = [{}, {"window": 3, "sinks": 2, "share": "all"}]


def eager_and_sparse(kind, **options):
    eager = build(kind)
    eager.set_attn_implementation("eager")
    return eager, sparse_transformers.configure(copy.deepcopy(eager), top_k=10_000, **options)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "selected"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_all_keys_is_eager_attention(kind, options, side, dense, request):
    """Whether all keys are a layer's own wish, or what its budget selects."""
    if not dense:
        request.getfixturevalue("no_shortcut")
    eager, sparse = eager_and_sparse(kind, **options)
    mask = padding(side) if side else None
    more = {} if mask is None else {"position_ids": positions_of(mask)}
    close(logits(sparse, ids(), mask, **more), logits(eager, ids(), mask, **more))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_eager_attention(no_shortcut, kind, options, side, cache):
    eager, sparse = eager_and_sparse(kind, **options)
    mask = padding(side) if side else torch.ones_like(ids())
    more = {"max_new_tokens": 8, "do_sample": False}
    if cache == "static":
        more |= {"cache_implementation": "static", "disable_compile": True}
    theirs = eager.generate(ids(), attention_mask=mask, **more)
    assert torch.equal(sparse.generate(ids(), attention_mask=mask, **more), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(no_shortcut, kind):
    models = eager_and_sparse(kind)
    for model in models:
        model(input_ids=ids(), labels=ids()).loss.backward()
    for (name, theirs), ours in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_keys_decode_as_they_prefill(kind):
    eager, sparse = eager_and_sparse(kind)
    sparse_transformers.configure(sparse, top_k=5, window=2, sinks=1, share="kv")
    whole = logits(sparse, ids())
    assert (whole - logits(eager, ids())).abs().max() > 1e-3
    longer = sparse.generate(ids()[:, :12], max_new_tokens=6, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
    again = logits(sparse, longer.sequences[:, :-1])[:, 11:]
    close(torch.stack(longer.logits, 1), again)
