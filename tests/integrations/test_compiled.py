"""Models under torch.compile: one graph, and what they say eagerly."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    LENGTH,
    cached,
    close,
    ids,
    llama,
    logits,
    padding,
    pair,
    positions_of,
)

README = {"top_k": 8, "window": 4, "sinks": 2, "share": "all"}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graph(model, backend="eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    _, sparse = pair(top_k=6)
    compiled = torch.compile(sparse, dynamic=False)
    close(logits(compiled, ids()), logits(sparse, ids()))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_prefill_is_one_graph(side):
    _, sparse = pair(**README)
    mask = padding(side) if side else None
    close(logits(graph(sparse), ids(), mask), logits(sparse, ids(), mask))


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_is_one_graph(cache, side):
    _, sparse = pair(**README)
    compiled = graph(sparse, dynamic=cache == "dynamic")
    mask = padding(side) if side else torch.ones_like(ids())
    positions = positions_of(mask)

    def steps(model):
        if cache == "dynamic":
            past = transformers.DynamicCache(config=sparse.config)
        else:
            past = transformers.StaticCache(config=sparse.config, max_cache_len=40)
        parts = []
        for step in [slice(0, 16), *(slice(t, t + 1) for t in range(16, 20))]:
            run = sparse if step.start == 0 else model  # the prefill fills the cache
            out = run(
                input_ids=ids()[:, step],
                attention_mask=mask[:, : step.stop],
                position_ids=positions[:, step],
                **cached(past),
            )
            parts.append(out.logits)
        return torch.cat(parts, 1)

    with torch.no_grad():
        close(steps(compiled)[mask[:, :20].bool()], steps(sparse)[mask[:, :20].bool()])


def test_training_on_packed_documents_is_one_graph():
    _, sparse = pair(**README)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    more = {"position_ids": positions, "use_cache": False}
    theirs = sparse(input_ids=ids(1), **more).logits
    ours = graph(sparse, "aot_eager")(input_ids=ids(1), **more).logits
    close(ours, theirs)
    weight = sparse.model.layers[0].self_attn.q_proj.weight
    grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"selector": "blocks"}, {"selector": "refined_blocks"}, {"residual": True}], ids=str
)
def test_other_selections_are_one_graph_of_any_length(options):
    model = sparse_transformers.configure(llama(max_position_embeddings=512), top_k=192, **options)
    compiled = graph(model, dynamic=True)
    for length in (256, 384):
        for cache in (False, True):
            tokens = ids(1, length)
            close(logits(compiled, tokens, use_cache=cache), logits(model, tokens, use_cache=cache))


def test_what_only_the_compiled_program_can_see_is_refused_there():
    """A window on a mask that shows what comes later: eagerly a sentence, compiled an assertion of the program."""
    _, sparse = pair(top_k=8, window=4)
    ahead = torch.ones((1, 1, LENGTH, LENGTH), dtype=torch.bool)
    with pytest.raises(ValueError, match="window=4 needs causal attention"):
        sparse(input_ids=ids(1), attention_mask=ahead)
    with pytest.raises(RuntimeError, match="window, blocks and residual need causal attention"):
        graph(sparse)(input_ids=ids(1), attention_mask=ahead)
    theirs = sparse(input_ids=ids(1)).logits
    close(graph(sparse)(input_ids=ids(1), attention_mask=ahead.tril()).logits, theirs)
