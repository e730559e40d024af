"""`nn.VariableWidthHead`: logits, loss, predictions, tied weights trained like the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sparse_attn.nn import VariableWidthEmbedding, VariableWidthHead
from sparse_attn.planner import WidthPlan
from sparse_attn.wings import extension

D, V = 24, 90
NATIVE = pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
WINGS = pytest.mark.parametrize("name", [pytest.param("cpu", marks=NATIVE), "reference"])


def plan_of() -> WidthPlan:
    generator = torch.Generator().manual_seed(3)
    return WidthPlan(D, [D, 8, 3], torch.randint(3, (V,), generator=generator))


def tied(name: str = "reference", **options) -> VariableWidthHead:
    return VariableWidthHead(VariableWidthEmbedding(plan_of(), backend=name, **options), backend=name)


def test_logits_are_in_token_id_order():
    head = tied()
    hidden = torch.randn(2, 5, D)
    torch.testing.assert_close(head(hidden), hidden @ head.embedding.full_table().t())
    assert head(hidden[0, 0]).shape == (V,)
    assert head(hidden[:, :0]).shape == (2, 0, V)


def test_log_prob():
    head = tied()
    hidden = torch.randn(4, D)
    torch.testing.assert_close(head.log_prob(hidden).exp().sum(-1), torch.ones(4))
    half = tied(dtype=torch.bfloat16)
    assert half.log_prob(hidden.bfloat16()).dtype == torch.float32


@WINGS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss(name, reduction):
    head = tied(name)
    hidden, targets = torch.randn(2, 5, D), torch.randint(V, (2, 5))
    targets[0, 1] = -1
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": -1}
    loss = head.loss(hidden, targets, **options)
    want = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), **options)
    torch.testing.assert_close(loss, want.view(loss.shape))
    torch.testing.assert_close(
        head.loss(hidden, targets, ignore_index=-1, weight=torch.arange(V) / V, z_loss=0.1).isfinite().item(),
        True,
    )


@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("step", [1, 1 << 22])
def test_topk_and_predict(monkeypatch, k, step):
    monkeypatch.setattr("sparse_attn.nn.variable_width_head._LOGITS", step)
    head = tied()
    hidden = torch.randn(3, 4, D)
    values, tokens = head.topk(hidden, k)
    want = head(hidden).topk(k)
    torch.testing.assert_close(values, want.values.detach())
    assert torch.equal(tokens, want.indices)
    assert torch.equal(head.predict(hidden), head(hidden).argmax(-1))
    assert head.topk(hidden[:, :0], k)[1].shape == (3, 0, k)
    assert not values.requires_grad


def test_topk_over_several_pieces():
    plan = WidthPlan.from_cutoffs(5000, 8, [1000], [8, 2])
    head = VariableWidthHead.from_plan(plan)
    hidden = torch.randn(9000, 8)
    values, tokens = head.topk(hidden, 5)  # 1,024 classes at a time
    with torch.no_grad():
        torch.testing.assert_close(values, head(hidden).topk(5).values)
        torch.testing.assert_close(head(hidden).gather(1, tokens), values)


def test_weights_are_shared():
    head = tied()
    assert len(list(head.parameters())) == len(list(head.embedding.parameters()))
    assert head.num_parameters() == head.plan.num_parameters() == head.embedding.num_parameters()
    copied = copy.deepcopy(torch.nn.ModuleDict({"wte": head.embedding, "head": head}))
    assert copied["head"].embedding is copied["wte"]
    other = tied()
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(3, D)
    assert torch.equal(other(hidden), head(hidden))


def test_from_plan_has_weights_of_its_own():
    torch.manual_seed(0)
    plan = WidthPlan.from_cutoffs(3000, 64, [1000, 2000], [64, 16, 8])
    head = VariableWidthHead.from_plan(plan)
    logits = head(torch.randn(200, 64))
    for part in logits.split(1000, dim=1):
        assert 0.8 < part.std() < 1.2


@WINGS
def test_trained_tied_equals_the_dense_model(name):
    """The same steps as a model that assembles the whole table and its logits."""

    class Model(torch.nn.Module):
        def __init__(self, dense: bool) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.wte = VariableWidthEmbedding(plan_of(), backend=name)
            self.middle = torch.nn.Linear(D, D)
            self.head = VariableWidthHead(self.wte, backend=name)
            self.dense = dense

        def forward(self, ids, targets):
            if not self.dense:
                hidden = torch.tanh(self.middle(self.wte(ids)))
                return self.head.loss(hidden, targets, label_smoothing=0.1)
            parts = zip(self.wte.tables, self.wte.projection_list(), strict=True)
            rows = [t if p is None else t @ p.t() for t, p in parts]
            first = torch.tensor([0, *(len(r) for r in rows[:-1])]).cumsum(0)
            table = torch.cat(rows)[first[self.wte.token_band.long()] + self.wte.token_row]
            logits = torch.tanh(self.middle(F.embedding(ids, table))) @ table.t()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)

    torch.manual_seed(6)
    ids = torch.randint(V, (4, 17))
    losses = []
    for dense in (False, True):
        model = Model(dense)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    ours, dense = (torch.stack(x) for x in losses)
    assert dense[-1] < dense[0] / 2
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)


@WINGS
def test_compile_is_one_graph(name):
    torch._dynamo.reset()
    head = tied(name)
    hidden, targets = torch.randn(5, D), torch.randint(V, (5,))
    for function in (lambda h: head.loss(h, targets), lambda h: head(h)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden), function(hidden))


def test_bad_arguments():
    with pytest.raises(TypeError, match="embedding must be a VariableWidthEmbedding"):
        VariableWidthHead(torch.nn.Embedding(V, D))
    head = tied()
    with pytest.raises(ValueError, match=rf"hidden must be a tensor of shape \[..., {D}\]"):
        head(torch.randn(3, D + 1))
    with pytest.raises(ValueError, match="k must be at most 90"):
        head.topk(torch.randn(3, D), V + 1)
    with pytest.raises(IndexError, match="targets must lie in"):
        head.loss(torch.randn(1, D), torch.tensor([V]))
