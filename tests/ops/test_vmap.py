"""vmap over the ops and the modules: what it is given is folded into the batch, what is wrong is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import bands as helper
from helpers.inputs import mask, normal, qkv
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn

SAMPLES = 3
ATTENTION = (
    {"query": 0},
    {"key": 3, "value": 1},
    {"query": -1, "key": 2, "value": 0},
    {"key_lengths": 1},
    {"attn_mask": 2},
    {"query": 1, "attn_mask": 0, "key_lengths": 0},
)


@pytest.mark.parametrize("mapped", ATTENTION, ids=" ".join)
def test_vmap_of_attention(wing, mapped):
    """Selection and attention over any of the inputs, in any dimension: the loop's bits, in one call of the op."""
    query, key, value = qkv(SAMPLES * 2, 4, 2, 5, 6, 4)
    every = {
        "query": query, "key": key, "value": value,
        "attn_mask": mask(SAMPLES * 2, 1, 5, 6), "key_lengths": torch.tensor([6, 3, 0, 2, 5, 1]),
    }  # fmt: skip
    every = {n: t.to(wing.device).unflatten(0, (SAMPLES, 2)) for n, t in every.items()}
    given = {n: t if n in mapped else t[0] for n, t in every.items()}

    def call(query, key, value, attn_mask, key_lengths):
        rule = {"attn_mask": attn_mask, "key_lengths": key_lengths, "backend": wing.name}
        selected = sparse_attn.topk_select(query, key, 2, share="all", **rule)
        out, lse, indices = sparse_attn.topk_attention(
            query, key, value, 2, return_lse=True, return_indices=True, **rule
        )
        staged = sparse_attn.gathered_attention(query, key, value, indices, backend=wing.name)
        return selected, out, lse, indices, staged

    want = [call(*(t[i] if n in mapped else t for n, t in given.items())) for i in range(SAMPLES)]
    dims = tuple(mapped.get(n) for n in given)
    moved = [t if d is None else t.movedim(0, d) for t, d in zip(given.values(), dims, strict=True)]
    for ours, true in zip(vmap(call, dims)(*moved), zip(*want, strict=True), strict=True):
        assert torch.equal(ours, torch.stack(true))


def test_vmap_folds_into_the_batch(wing):
    """One call of the op however many samples, nested too, and no copy of what is not mapped where B is 1."""
    query, key, value = (t.to(wing.device) for t in qkv(12, 2, 2, 5, 6, 4))
    query, key = (t.view(3, 4, 1, *t.shape[1:]) for t in (query, key))

    def call(query, key, value):
        return sparse_attn.topk_attention(query, key, value, 3, backend=wing.name)

    inner = vmap(call, in_dims=(0, 0, None))
    with Calls() as calls:
        ours = vmap(inner, in_dims=(1, 1, None), out_dims=1)(query, key, value[:1])
    assert calls.names == [f"topk_attention.{wing.name}"]
    assert calls.inputs[0].shape[0] == 12
    assert calls.inputs[2].stride(0) == 0
    want = [
        [call(q, k, value[:1]) for q, k in zip(*rows, strict=True)] for rows in zip(query, key, strict=True)
    ]
    assert torch.equal(ours, torch.stack([torch.stack(row) for row in want]))


class Calls(TorchDispatchMode):
    """The ops of ours that run, and the tensors that the last one got."""

    def __init__(self):
        super().__init__()
        self.names, self.inputs = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sparse_attn":
            self.names.append(str(function).removeprefix("sparse_attn."))
            self.inputs = list(args)
        return function(*args, **(kwargs or {}))


def test_selections_are_constants(wing):
    """Every way to select under vmap, and beside the gradients and tangents of what it was made from."""
    samples = normal(SAMPLES, 1, 2, 8, 4).to(wing.device)
    ways = {
        "topk_select": lambda x: sparse_attn.topk_select(x, x, 3, is_causal=True, backend=wing.name),
        "indexer_select": lambda x: sparse_attn.indexer_select(x, x[:, :1], x[..., 0], 3, backend=wing.name),
        "block_select": lambda x: sparse_attn.block_select(
            x, x, 3, block_size=2, query_tile=2, is_causal=True, backend=wing.name
        ),
    }
    for name, select in ways.items():
        want = torch.stack([select(x) for x in samples])
        assert torch.equal(vmap(select)(samples), want), name
        indices, move = jvp(select, (samples[0],), (samples[1],))
        assert torch.equal(indices, want[0])
        assert not move.any()
        _, indices = grad(lambda x, s=select: (x.sum(), s(x)), has_aux=True)(samples[0])
        assert torch.equal(indices, want[0])


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 1)])
def test_vmap_of_ids_and_targets(wing, shape):
    """Down to single numbers; with batched tables and maps, an ensemble, it is a loop that says the same."""
    models = [make_model(seed) for seed in range(SAMPLES)]
    model, ids = models[0], torch.tensor([3, 0, 8, 8, 1, 2])
    nested = ids.view(shape)
    with sparse_attn.use_backend(wing.name if wing.device == "cpu" else None):
        function = model.head.embedding
        for _ in shape:
            function = vmap(function)
        assert torch.equal(function(nested), model.head.embedding(nested))
        rows = ids.view(2, 3)
        torch.testing.assert_close(vmap(model)(rows, rows), torch.stack([model(r, r) for r in rows]))
        state = stack_module_state(models)
        ours = vmap(lambda p, b: functional_call(model, (p, b), (ids, ids)))(*state)
        torch.testing.assert_close(ours, torch.stack([m(ids, ids) for m in models]))


class LanguageModel(torch.nn.Module):
    """Embedding and tied head: the loss of `ids` as inputs and targets."""

    def __init__(self):
        super().__init__()
        plan = sparse_attn.WidthPlan.from_cutoffs(9, 8, cutoffs=[3], widths=[8, 4])
        # Under one name: torch.func.functional_call leaves its tensors in a module that stands under two.
        self.head = sparse_attn.nn.VariableWidthHead(sparse_attn.nn.VariableWidthEmbedding(plan))
        self.attention = sparse_attn.nn.TopKAttention(8, 2, top_k=2)

    def forward(self, ids, targets):
        hidden = self.head.embedding(ids)
        return self.head.loss(hidden + self.attention(hidden.unsqueeze(0))[0], targets)


def make_model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel()


def test_per_sample_gradients_of_modules(wing):
    """functional_call over the modules: those of a loop with backward."""
    model = make_model(0)
    ids = torch.tensor([[3, 0, 8, 8], [1, 2, 5, 7]])
    with sparse_attn.use_backend(wing.name if wing.device == "cpu" else None):
        parameters = dict(model.named_parameters())
        loss = lambda p, ids: functional_call(model, p, (ids, ids))  # noqa: E731
        ours = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
        for number, row in enumerate(ids):
            want = torch.autograd.grad(model(row, row), list(parameters.values()))
            torch.testing.assert_close([g[number] for g in ours.values()], list(want))


def test_checks_read_values_under_vmap():
    """What is wrong in one entry is refused as without vmap, before anything is read through it."""
    model = make_model(0)
    ids = torch.tensor([[3, 0], [8, 9]])
    with pytest.raises(
        IndexError, match=r"ids must lie in \[0, 9\), .* got 9 at position \[1\] of ids of shape \[2\]"
    ):
        vmap(model.head.embedding)(ids)
    with pytest.raises(
        IndexError, match=r"targets must lie in \[0, 9\), .* got -1 at position \[\] of targets of"
    ):
        vmap(vmap(model.head.loss))(normal(2, 2, 8), torch.tensor([[3, 0], [-1, 2]]))
    x = normal(SAMPLES, 1, 2, 4, 4)
    with pytest.raises(
        ValueError, match=r"key_lengths must lie in \[0, Tk\] = \[0, 4\], got values from 1 to 5"
    ):
        vmap(lambda x, n: sparse_attn.topk_select(x, x, 2, key_lengths=n))(x, torch.tensor([[1], [5], [2]]))
    masks = mask(SAMPLES, 1, 2, 4, 4)
    with pytest.raises(ValueError, match="attn_mask must not differ among query heads"):
        vmap(lambda x, m: sparse_attn.topk_select(x, x, 2, attn_mask=m, share="all"))(x, masks)
    table, hidden = normal(3, 4), normal(1, 4)
    maps = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([[0, 1, 2], [0, 3, 1]])
    with pytest.raises(ValueError, match=r"token_row must lie in \[0, 3\), .* got 3 for token 1"):
        vmap(lambda b, r: sparse_attn.variable_width_embedding(ids[0, 1:], [table], [None], b, r))(*maps)
    maps[1][1, 1] = 0
    with pytest.raises(
        ValueError, match="every token must have a row of its own, got tokens 0 and 1 both in row 0"
    ):
        vmap(
            lambda b, r: sparse_attn.variable_width_cross_entropy(hidden, ids[0, 1:], [table], [None], b, r)
        )(*maps)


def test_what_cannot_be_mapped_is_refused():
    bands = helper.make(8, (3, 2, 4), (8, 4, 2))
    ids = torch.tensor([[3, 0], [8, 8]])

    def table_of(table, ids):
        tables = table, *bands.tables[1:]
        maps = bands.token_band, bands.token_row
        return sparse_attn.variable_width_embedding(ids, tables, bands.projections, *maps, sparse=True).sum()

    with pytest.raises(NotImplementedError, match=r"sparse=True has no gradients under torch\.func\.vmap"):
        vmap(grad(table_of), in_dims=(None, 0))(bands.tables[0], ids)
    hidden = normal(2, 8)
    loss = lambda h: sparse_attn.variable_width_cross_entropy(  # noqa: E731
        h, ids[0], bands.tables, bands.projections, bands.token_band, bands.token_row, reduction="none"
    )
    with pytest.raises(NotImplementedError, match="does not take is_grads_batched=True or vectorize=True"):
        torch.autograd.functional.jacobian(loss, hidden, vectorize=True)
    x = normal(1, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="topk_attention_with_residual is for inference"):
        grad(lambda x: sparse_attn.topk_attention_with_residual(x, x, x, 2).sum())(x)
    ours = jvp(lambda x: sparse_attn.topk_attention_with_residual(x, x, x, 2), (x,), (x,))[1]
    ends = [sparse_attn.topk_attention_with_residual(*[x * (1 + step)] * 3, 2) for step in (1e-3, -1e-3)]
    torch.testing.assert_close(ours, (ends[0] - ends[1]) / 2e-3, rtol=1e-3, atol=1e-3)
