"""Packed documents, by `position_ids` that restart or by `cu_seq_lens_q`: each is what it is alone, training too."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.distillation import distill_indexers  # noqa: E402
from sparse_attn.integrations import masks  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.architectures import MODELS  # noqa: E402
from tests.integrations.models import close, ids, llama, logits, pair, small  # noqa: E402

LENGTHS = (9, 1, 14, 6)
TOTAL = sum(LENGTHS)
OPTIONS = [{}, {"sinks": 2}, {"window": 3, "sinks": 1, "share": "all"}, {"residual": True}]


def bounds(dtype=torch.int32):
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(dtype)


def positions():
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def told(how):
    """What a model is told of the documents: by DataCollatorWithFlattening, with and without its flash kwargs."""
    flash = {"cu_seq_lens_q": bounds(), "cu_seq_lens_k": bounds(), "max_length_q": 14, "max_length_k": 14}
    return {
        "positions": {"position_ids": positions(), "use_cache": False},
        "positions, with a cache": {"position_ids": positions(), "use_cache": True},
        "both": {"position_ids": positions(), "use_cache": False, **flash},
        "both, with a cache": {"position_ids": positions(), **flash},
        "queries' bounds alone": {"position_ids": positions(), "cu_seq_lens_q": bounds(torch.int64)},
    }[how]


def parts():
    return [slice(a, b) for a, b in zip(bounds()[:-1].tolist(), bounds()[1:].tolist(), strict=True)]


HOW = ["positions", "positions, with a cache", "both", "both, with a cache", "queries' bounds alone"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_each_document_is_what_it_is_alone(how, options, kind):
    if kind == "mistral" and "residual" in options:
        pytest.skip("refused: a sliding window is a mask")
    model = llama() if kind == "llama" else small(transformers.MistralConfig, sliding_window=8)
    _, sparse = pair(top_k=5, model=model, **options)
    together = logits(sparse, ids(1, TOTAL), **told(how))
    for part in parts():
        close(together[:, part], logits(sparse, ids(1, TOTAL)[:, part], use_cache=False))


@pytest.mark.parametrize("selector", ["int8", "low_rank", "indexer"])
@pytest.mark.parametrize("how", ["positions", "both"])
def test_other_selections(selector, how):
    model = llama()
    if selector == "low_rank":
        sparse_transformers.fit_low_rank(model, [ids()], rank=4)
    if selector == "indexer":
        sparse_transformers.add_indexers(model, num_heads=2, head_dim=8)
    sparse_transformers.configure(model, top_k=5, selector=selector, sinks=1)
    together = logits(model, ids(1, TOTAL), **told(how))
    for part in parts():
        close(together[:, part], logits(model, ids(1, TOTAL)[:, part], use_cache=False))


@pytest.mark.parametrize("share", ["none", "all"])
def test_whole_blocks(share):
    """Counted from each document's first token; with gradients."""
    lengths = 300, 90, 1, 410
    model = llama(max_position_embeddings=512)
    sparse_transformers.configure(model, top_k=192, selector="blocks", share=share)
    tokens = ids(1, sum(lengths))
    where = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seq = torch.tensor([0, *lengths]).cumsum(0)
    for more in ({"position_ids": where}, {"position_ids": where, "cu_seq_lens_q": cu_seq.int()}):
        together = model(tokens, use_cache=False, **more).logits
        weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
        model.zero_grad()
        (together * weights).sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for begin, end in zip(cu_seq[:-1].tolist(), cu_seq[1:].tolist(), strict=True):
            alone = model(tokens[:, begin:end], use_cache=False).logits
            close(together[:, begin:end].detach(), alone.detach())
            (alone * weights[:, begin:end]).sum().backward()
        for a, p in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 1000])
def test_dense_layers(top_k):
    """A budget that holds all keys, and None, are dense within a document."""
    dense, sparse = pair(top_k=top_k)
    more = {"cu_seq_lens_q": bounds(), "position_ids": positions()}
    together = logits(sparse, ids(1, TOTAL), **more)
    for part in parts():
        close(together[:, part], logits(dense, ids(1, TOTAL)[:, part], use_cache=False))


def test_bounds_without_positions():
    """Rotary positions go on then, which attention does not see; before, one document saw another without a word."""
    _, sparse = pair(top_k=5, sinks=1)
    together = logits(sparse, ids(1, TOTAL), cu_seq_lens_q=bounds(), cu_seq_lens_k=bounds())
    for part in parts():
        close(together[:, part], logits(sparse, ids(1, TOTAL)[:, part], use_cache=False))


@pytest.mark.parametrize("name", ["Gemma 2", "gpt-oss", "Qwen 3", "GPT-2"])
def test_other_models(name):
    torch.manual_seed(0)
    model = sparse_transformers.configure(MODELS[name]().eval(), top_k=5, sinks=1, window=2)
    together = logits(model, ids(1, TOTAL), **told("both"))
    for part in parts():
        close(together[:, part], logits(model, ids(1, TOTAL)[:, part], use_cache=False))


@pytest.mark.parametrize("how", ["positions", "both"])
def test_training_is_that_of_the_documents(how):
    _, sparse = pair(top_k=5, window=2, sinks=1)
    weight = [*sparse.model.layers[0].self_attn.parameters()]
    together = sparse(input_ids=ids(1, TOTAL), **told(how)).logits
    mine = torch.autograd.grad(together.square().sum(), weight)
    alone = sum(sparse(input_ids=ids(1, TOTAL)[:, p], use_cache=False).logits.square().sum() for p in parts())
    for ours, theirs in zip(mine, torch.autograd.grad(alone, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["positions", "both", "both, with a cache"])
@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_it_is_one_graph(how, options):
    """And the same one where documents lie otherwise."""
    _, sparse = pair(top_k=5, **options)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    more = told(how)
    close(logits(compiled, ids(1, TOTAL), **more), logits(sparse, ids(1, TOTAL), **more))
    if "cu_seq_lens_q" in more:
        others = torch.tensor([0, 3, 12, 29, 30], dtype=torch.int32)
        more |= {
            "cu_seq_lens_q": others,
            "cu_seq_lens_k": others.clone(),
            "max_length_q": 17,
            "max_length_k": 17,
        }
        more["position_ids"] = torch.cat([torch.arange(n) for n in others.diff().tolist()])[None]
        close(logits(compiled, ids(1, TOTAL), **more), logits(sparse, ids(1, TOTAL), **more))


def test_no_matrix_of_all_pairs_is_stored(monkeypatch):
    """The mask function is asked for a few rows at a time, to the same starts."""
    made = []
    monkeypatch.setattr(masks, "_PAIRS", 4 * TOTAL)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda **given: made.append(given))
    _, sparse = pair(top_k=5, sinks=2)
    together = logits(sparse, ids(1, TOTAL), **told("positions"))
    assert not made
    for part in parts():
        close(together[:, part], logits(sparse, ids(1, TOTAL)[:, part], use_cache=False))


def test_the_collators_batch():
    """DataCollatorWithFlattening as it comes, labels too: the loss is that of the documents."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids(1, TOTAL)[0, p].tolist()} for p in parts()], return_tensors="pt")
    _, sparse = pair(top_k=5, sinks=1)
    loss = sparse(**batch).loss
    losses = []
    for part in parts():
        tokens = ids(1, TOTAL)[:, part]
        if tokens.shape[1] > 1:
            losses.append(
                (sparse(input_ids=tokens, labels=tokens, use_cache=False).loss, tokens.shape[1] - 1)
            )
    wanted = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_distillation_stays_within_documents():
    """Its batches are rows of one text each; what the model is told otherwise it has no way to hear."""
    model = sparse_transformers.add_indexers(llama(), num_heads=1, head_dim=8)
    assert len(distill_indexers(model, [ids(1, TOTAL)], 1, top_k=4)) == 1


REFUSED = {
    "in one row": {"cu_seq_lens_q": bounds(), "input_ids": ids(2, TOTAL)},
    "cu_seq_lens_k must be cu_seq_lens_q": {"cu_seq_lens_q": bounds(), "cu_seq_lens_k": bounds() + 1},
    "cu_seq_lens_k needs cu_seq_lens_q": {"cu_seq_lens_k": bounds()},
    "cu_seq_lens_q must be int32 or int64": {"cu_seq_lens_q": bounds().float()},
    "cu_seq_lens_q must rise from 0 to at most 30": {"cu_seq_lens_q": bounds() * 2},
    "max_length_q must be at least the longest sequence": {"cu_seq_lens_q": bounds(), "max_length_q": 3},
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_refusals(words):
    _, sparse = pair(top_k=5)
    given = {"input_ids": ids(1, TOTAL), **REFUSED[words]}
    if words.startswith("cu_seq_lens_k must"):
        given["cu_seq_lens_k"] = torch.tensor([0, 4, 10, 24, 30])
    with pytest.raises((ValueError, TypeError), match=words):
        sparse(**given)


def test_an_encoder_refuses_bounds():
    torch.manual_seed(0)
    bert = sparse_transformers.configure(MODELS["BERT"]().eval(), top_k=5)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs causal attention"):
        bert(ids(1, TOTAL), cu_seq_lens_q=bounds())


def test_a_question_after_a_cache_is_filled():
    """Several queries behind a cache are no packed documents, whatever their positions begin with."""
    _, sparse = pair(top_k=5, window=2)
    with torch.no_grad():
        past = sparse(input_ids=ids(1, 12), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without a cache"):
            sparse(input_ids=ids(1, 4), past_key_values=past, cu_seq_lens_q=torch.tensor([0, 4]))
