"""The module: initialisation, state dicts, growing, conversion, and training like the dense table."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers.embeddings import make_ids

from sparse_attn.nn import VariableWidthEmbedding
from sparse_attn.planner import WidthPlan
from sparse_attn.planner.low_rank import factorize


def plan_of(vocabulary=300, dim=32, widths=(32, 12, 4), seed=0) -> WidthPlan:
    generator = torch.Generator().manual_seed(seed)
    bands = torch.randint(len(widths), (vocabulary,), generator=generator)
    return WidthPlan(dim, widths, bands)


def assembled(module: VariableWidthEmbedding) -> torch.Tensor:
    """The dense table [V, D], row by row, without the op."""
    rows = []
    projections = module.projection_list()
    for token in range(module.num_embeddings):
        band = int(module.plan.token_band[token])
        row = module.tables[band][int(module.plan.token_row[token])]
        rows.append(row if projections[band] is None else projections[band] @ row)
    table = torch.stack(rows)
    if module.padding_idx is not None:
        table = table * (torch.arange(len(table)) != module.padding_idx).to(table.dtype)[:, None]
    return table


@pytest.mark.parametrize("padding_idx", [None, 5])
def test_forward(padding_idx):
    module = VariableWidthEmbedding(plan_of(), padding_idx=padding_idx)
    ids = make_ids("zipf", 300, 120).view(4, 30)
    torch.testing.assert_close(module(ids), F.embedding(ids, assembled(module)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.full_table(), assembled(module), rtol=1e-5, atol=1e-5)


def test_variance_of_every_band_is_that_of_nn_embedding():
    plan = plan_of(6000, 64, (64, 16, 8, 1))
    table = VariableWidthEmbedding(plan).full_table().detach()
    for band, width in enumerate(plan.widths):
        rows = table[plan.tokens_of(band)]
        # width · D products decide the variance: a narrow band's own varies by some of its standard errors.
        assert rows.var().item() == pytest.approx(1.0, abs=5 * (2 / (64 * width)) ** 0.5 + 0.02)
        assert abs(rows.mean().item()) < 0.3


def test_expected_variance_over_many_initialisations():
    plan = plan_of(90, 16, (16, 4, 1))
    variances = torch.stack(
        [
            torch.stack([table[plan.tokens_of(b)].square().mean() for b in range(3)])
            for table in (VariableWidthEmbedding(plan).full_table().detach() for _ in range(300))
        ]
    ).mean(0)
    torch.testing.assert_close(variances, torch.ones(3), atol=0.12, rtol=0)


def test_number_of_parameters():
    module = VariableWidthEmbedding(plan_of())
    assert sum(p.numel() for p in module.parameters()) == module.num_parameters()
    assert len(module.projections) == 2
    assert [p is None for p in module.projection_list()] == [True, False, False]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_the_parameters(sparse):
    module = VariableWidthEmbedding(plan_of(), padding_idx=3, sparse=sparse)
    ids = torch.cat([make_ids("zipf", 300, 200), torch.tensor([3])])
    dense = copy.deepcopy(module)
    weight = torch.randn(201, 32)
    (module(ids) * weight).sum().backward()
    (F.embedding(ids, assembled(dense)) * weight).sum().backward()
    for ours, theirs in zip(module.parameters(), dense.parameters(), strict=True):
        grad = ours.grad.to_dense() if ours.grad.is_sparse else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert all(t.grad.is_sparse == sparse for t in module.tables)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_equals_the_dense_assembled_model(sparse):
    """A tied model, hidden @ table.T, trained for some steps by SGD on both."""
    ours = VariableWidthEmbedding(plan_of(), sparse=sparse).double()
    dense = copy.deepcopy(ours)
    linear = torch.nn.Linear(32, 32).double()
    other = copy.deepcopy(linear)
    optimizers = [
        torch.optim.SGD([*m.parameters(), *head.parameters()], lr=0.05)
        for m, head in ((ours, linear), (dense, other))
    ]
    generator = torch.Generator().manual_seed(5)
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(12):
        ids = torch.randint(300, (64,), generator=generator)
        targets = (ids * 7 + 1) % 300
        if sparse:  # the tied head would add a dense gradient to the sparse one
            loss = F.mse_loss(
                torch.tanh(linear(ours(ids))), torch.sin(targets.double())[:, None].expand(-1, 32)
            )
            table = assembled(dense)
            want = F.mse_loss(
                torch.tanh(other(F.embedding(ids, table))),
                torch.sin(targets.double())[:, None].expand(-1, 32),
            )
        else:
            loss = F.cross_entropy(linear(ours(ids)) @ ours.full_table().t() / 32, targets)
            table = assembled(dense)
            want = F.cross_entropy(other(F.embedding(ids, table)) @ table.t() / 32, targets)
        for optimizer, value in zip(optimizers, (loss, want), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), start, strict=True))
    for a, b in zip(ours.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---- state ---------------------------------------------------------------------------------------------


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_dict_round_trip():
    module = VariableWidthEmbedding(plan_of(), padding_idx=3)
    state = saved_and_loaded(module.state_dict())
    other = VariableWidthEmbedding(plan_of(), padding_idx=3)
    other.load_state_dict(state)
    assert torch.equal(other.full_table(), module.full_table())
    made = VariableWidthEmbedding.from_state_dict(state, padding_idx=3)
    assert made.plan == module.plan
    assert torch.equal(made.full_table(), module.full_table())


def test_from_the_state_dict_of_a_model_that_holds_it():
    model = torch.nn.ModuleDict({"wte": VariableWidthEmbedding(plan_of(), dtype=torch.bfloat16)})
    state = saved_and_loaded(model.state_dict())
    made = VariableWidthEmbedding.from_state_dict(state, prefix="wte.")
    assert made.tables[0].dtype == torch.bfloat16
    assert torch.equal(made.full_table(), model["wte"].full_table())


def test_loading_takes_over_the_bands_of_the_tokens():
    plan = plan_of()
    module = VariableWidthEmbedding(plan)
    shuffled = WidthPlan(32, plan.widths, plan.token_band[torch.randperm(300)])
    other = VariableWidthEmbedding(shuffled)
    other.load_state_dict(module.state_dict())
    assert other.plan == plan
    assert torch.equal(other.full_table(), module.full_table())


def test_loading_another_plan_is_refused():
    module = VariableWidthEmbedding(plan_of(seed=1))
    with pytest.raises(RuntimeError, match=r"size mismatch for tables\.0"):
        VariableWidthEmbedding(plan_of()).load_state_dict(module.state_dict())


def test_copies_and_dtypes():
    module = VariableWidthEmbedding(plan_of())
    ids = torch.arange(300)
    assert torch.equal(copy.deepcopy(module)(ids), module(ids))
    half = copy.deepcopy(module).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert half.token_band.dtype == half.token_row.dtype == torch.int32
    assert VariableWidthEmbedding(plan_of(), device="meta")(ids.to("meta")).shape == (300, 32)


def test_empty_after_meta():
    module = VariableWidthEmbedding(plan_of())
    other = VariableWidthEmbedding(plan_of(), device="meta").to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.full_table(), module.full_table())


# ---- growing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [None, 0, 1])
def test_resize_keeps_every_old_row(band):
    module = VariableWidthEmbedding(plan_of(), padding_idx=4)
    old = module.full_table().detach()
    assert module.resize(341, band=band) is module
    assert module.num_embeddings == 341
    new = module.full_table().detach()
    assert torch.equal(new[:300], old)
    assert bool((new[300:].abs().sum(1) > 0).all())
    assert set(module.plan.token_band[300:].tolist()) == {2 if band is None else band}
    assert sum(p.numel() for p in module.parameters()) == module.num_parameters()
    module(torch.tensor([340])).sum().backward()
    assert torch.equal(module.resize(341).full_table(), new)
    with pytest.raises(ValueError, match="new_num_embeddings must be at least 341"):
        module.resize(300)


def test_resize_keeps_a_frozen_band_frozen():
    module = VariableWidthEmbedding(plan_of()).requires_grad_(False).resize(310)
    assert not any(p.requires_grad for p in module.parameters())


# ---- conversion ----------------------------------------------------------------------------------------


def trained(vocabulary=400, dim=32, rank=12):
    """A table with a decaying spectrum, and Zipf counts in no order."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(rank, dim, generator=generator) / torch.arange(1, rank + 1)[:, None]
    weight = torch.randn(vocabulary, rank, generator=generator) @ basis
    weight += 0.05 * torch.randn(vocabulary, dim, generator=generator)
    counts = (1e6 / torch.arange(1, vocabulary + 1))[torch.randperm(vocabulary, generator=generator)]
    return torch.nn.Embedding.from_pretrained(weight, freeze=False), counts


def test_from_embedding_keeps_the_budget_and_reports_its_error():
    embedding, counts = trained()
    module = VariableWidthEmbedding.from_embedding(embedding, counts, ratio=0.5)
    assert module.num_parameters() <= 400 * 32 // 2
    lost = (module.full_table() - embedding.weight).detach().double().square().sum(1)
    whole = embedding.weight.detach().double().square().sum(1)
    p = counts.double() / counts.sum()
    assert module.report.weighted == pytest.approx(((p * lost).sum() / (p * whole).sum()).item(), rel=1e-3)
    assert module.report.weighted < 0.2
    assert "error" in str(module.report)
    assert all(q.requires_grad for q in module.parameters())


def test_from_embedding_of_a_plan_is_its_factorization():
    embedding, counts = trained()
    plan = plan_of(400, 32, (32, 8))
    module = VariableWidthEmbedding.from_embedding(embedding, counts, plan=plan)
    tables, projections, _ = factorize(embedding.weight, counts, plan)
    assert all(torch.equal(a, b) for a, b in zip(module.tables, tables, strict=True))
    assert torch.equal(module.projections[0], projections[1])
    tokens = plan.tokens_of(0)
    assert torch.equal(module(tokens), embedding(tokens))


def test_from_embedding_takes_over_the_options():
    source = torch.nn.Embedding(400, 32, padding_idx=7, sparse=True, dtype=torch.bfloat16).requires_grad_(
        False
    )
    module = VariableWidthEmbedding.from_embedding(source, torch.ones(400), ratio=0.5)
    assert (module.padding_idx, module.sparse, module.tables[0].dtype) == (7, True, torch.bfloat16)
    assert not any(p.requires_grad for p in module.parameters())
    with pytest.raises(ValueError, match="max_norm=None"):
        VariableWidthEmbedding.from_embedding(
            torch.nn.Embedding(4, 4, max_norm=1.0), torch.ones(4), ratio=0.5
        )
    with pytest.raises(ValueError, match="together with budget or ratio"):
        VariableWidthEmbedding.from_embedding(source, torch.ones(400), ratio=0.5, plan=plan_of(400))
    with pytest.raises(TypeError, match=r"embedding must be an nn\.Embedding"):
        VariableWidthEmbedding.from_embedding(source.weight, torch.ones(400), ratio=0.5)


def test_from_counts():
    counts = 1e6 / torch.arange(1, 1001)
    module = VariableWidthEmbedding.from_counts(counts, 64, budget=20000, padding_idx=0)
    assert 0.97 * 20000 <= sum(p.numel() for p in module.parameters()) <= 20000
    assert module.padding_idx == 0
    assert module.report is None


def test_repr_says_the_plan():
    text = repr(VariableWidthEmbedding(plan_of(), padding_idx=3, sparse=True))
    assert text.startswith("VariableWidthEmbedding(\n  WidthPlan(num_embeddings=300, embedding_dim=32")
    assert "padding_idx=3" in text
    assert "sparse=True" in text
    assert "ParameterList" not in text


def test_bad_arguments():
    with pytest.raises(TypeError, match="plan must be a WidthPlan"):
        VariableWidthEmbedding(300)
    with pytest.raises(ValueError, match="padding_idx must lie in"):
        VariableWidthEmbedding(plan_of(), padding_idx=300)
    with pytest.raises(TypeError, match="sparse must be True or False"):
        VariableWidthEmbedding(plan_of(), sparse=1)
    with pytest.raises(ValueError, match="state_dict must hold"):
        VariableWidthEmbedding.from_state_dict({})


def test_fullgraph_compile():
    torch._dynamo.reset()
    module = VariableWidthEmbedding(plan_of(), padding_idx=3)
    ids = make_ids("zipf", 300, 64)
    out = torch.compile(module, fullgraph=True)(ids)
    torch.testing.assert_close(out, module(ids))
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
