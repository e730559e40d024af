"""What a module's state goes through: meta devices, refused loads, copies, half types; and what it keeps."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import skip_init

from sparse_attn import WidthPlan, variable_width_cross_entropy, variable_width_embedding
from sparse_attn.nn import (
    HeadApproximator,
    HybridAttention,
    Indexer,
    KeySelector,
    LowRankScorer,
    TopKAttention,
    VariableWidthEmbedding,
    VariableWidthHead,
)

PLAN = WidthPlan(16, [16, 4, 2], torch.randperm(90, generator=torch.Generator().manual_seed(0)) % 3)
MODULES = {
    "VariableWidthEmbedding": lambda: VariableWidthEmbedding(PLAN, padding_idx=5),
    "VariableWidthHead": lambda: VariableWidthHead.from_plan(PLAN),
    "KeySelector": lambda: KeySelector(8, 32, 4, num_heads=2),
    "HeadApproximator": lambda: HeadApproximator(8, 4, num_heads=2),
    "Indexer": lambda: Indexer(16, 2, 8),
    "LowRankScorer": lambda: LowRankScorer(2, 8, 4),
    "TopKAttention": lambda: TopKAttention(16, 2, 4, selector=Indexer(16, 2, 8)),
    "HybridAttention": lambda: HybridAttention(16, 2, 4, approximated_heads=[1], max_length=32),
}


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def reset(module: torch.nn.Module) -> None:
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


# ---- from the meta device ------------------------------------------------------------------------------


def poisoned(module: torch.nn.Module) -> torch.nn.Module:
    """`to_empty`, with memory that holds nonsense."""
    module.to_empty(device="cpu")
    for name, tensor in tensors(module).items():
        if not name.endswith(("token_band", "token_row", "fitted", "moment", "projection")):
            with torch.no_grad():
                tensor.fill_(torch.nan)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_after_meta_and_reset_a_module_is_as_if_it_had_been_made(name):
    """As FSDP, torchtitan and others build a model; every tensor of every module is written."""
    with torch.device("meta"):
        module = MODULES[name]()
    assert all(t.is_meta for t in tensors(module).values())
    poisoned(module)
    torch.manual_seed(3)
    reset(module)
    torch.manual_seed(3)
    made = MODULES[name]()
    if name == "VariableWidthHead":  # from_plan draws in the constructor
        torch.manual_seed(3)
        reset(made)
    for key, tensor in tensors(made).items():
        assert tensor.dtype == tensors(module)[key].dtype
        sizes = [t.double().square().mean() for t in (tensors(module)[key], tensor)]
        torch.testing.assert_close(*sizes, rtol=0.5, atol=0)
        if not tensor.is_floating_point():
            assert torch.equal(tensors(module)[key], tensor)


def test_a_head_is_initialised_alike_by_reset():
    """Logits of variance 1, not of variance D."""
    head = VariableWidthHead.from_plan(WidthPlan(256, [256, 64], torch.arange(2000) % 2))
    reset(head)
    logits = head(torch.randn(64, 256))
    assert logits.var().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("how", ["to_empty", "skip_init", "type"])
def test_maps_are_rebuilt_wherever_memory_is_replaced(how):
    if how == "skip_init":
        embedding = skip_init(VariableWidthEmbedding, PLAN)
    else:
        embedding = VariableWidthEmbedding(PLAN)
        embedding = embedding.to_empty(device="cpu") if how == "to_empty" else embedding.type(torch.bfloat16)
    assert torch.equal(embedding.token_band, PLAN.token_band)
    assert torch.equal(embedding.token_row, PLAN.token_row)
    assert embedding.token_band.dtype == embedding.token_row.dtype == torch.int32
    reset(embedding)
    out = embedding(torch.arange(90)).detach()
    assert len(torch.unique(out, dim=0)) == 90


def test_sharing_and_moving_keep_the_maps_as_they_are():
    embedding = VariableWidthEmbedding(PLAN)
    maps = embedding.token_band, embedding.token_row
    embedding.half().to("cpu").share_memory()
    assert embedding.token_band is maps[0]
    assert embedding.token_row is maps[1]
    assert embedding.token_band.is_shared()


# ---- loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_state_that_does_not_fit_changes_nothing(name):
    module = torch.nn.ModuleDict({"part": MODULES[name]()})
    before, state = copies(module), {}
    for key, tensor in module.state_dict().items():
        state[key] = torch.ones_like(tensor)
    last = list(state)[-1]
    for bad in (torch.ones(3, 1, 2), 7):
        with pytest.raises(RuntimeError, match=last.replace(".", r"\.")):
            module.load_state_dict({**state, last: bad})
        assert_same(before, copies(module))


def maps(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_band": PLAN.token_band.clone(), "token_row": PLAN.token_row.clone()} | changed


BAD_MAPS = {
    "all zeros": (maps(token_band=torch.zeros(90), token_row=torch.zeros(90)), "must hold integers"),
    "all in one band": (
        maps(token_band=torch.zeros(90, dtype=torch.int32)), r"token_band puts \[90, 0, 0\] tokens"
    ),
    "one row for all": (maps(token_row=torch.zeros(90, dtype=torch.int32)), "token_row must number the tokens"),
    "a row twice": (maps(token_row=PLAN.token_row.clone().index_fill_(0, torch.tensor(7), 0)), "token 7"),
    "a band too many": (
        maps(token_band=PLAN.token_band.clone().index_fill_(0, torch.tensor(4), 3)), r"lie in \[0, 3\)"
    ),
    "a negative band": (
        maps(token_band=PLAN.token_band.clone().index_fill_(0, torch.tensor(4), -1)), "got -1 for token 4"
    ),
    "a row out of range": (
        maps(token_row=PLAN.token_row.clone().index_fill_(0, torch.tensor(8), 1 << 20)), "got 1048576 for token 8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MAPS)
@pytest.mark.parametrize("tied", [False, True])
def test_impossible_maps_are_refused_and_change_nothing(name, tied):
    bad, words = BAD_MAPS[name]
    embedding = VariableWidthEmbedding(PLAN)
    module = VariableWidthHead(embedding) if tied else embedding
    before, plan = copies(module), embedding.plan
    prefix = "embedding." if tied else ""
    state = {key: torch.ones_like(t) for key, t in module.state_dict().items()}
    state |= {f"{prefix}{key}": t for key, t in bad.items()}
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict(state)
    assert_same(before, copies(module))
    assert embedding.plan is plan
    if not tied:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
            VariableWidthEmbedding.from_state_dict(state)


def test_a_state_of_other_sizes_is_refused_before_anything_is_allocated():
    """As a file may claim it: a table whose 2^40 rows lie in one element."""
    state = VariableWidthEmbedding(PLAN).state_dict()
    state["tables.1"] = torch.zeros(1, 1).expand(1 << 40, 4)
    with pytest.raises(ValueError, match=r"tables\.1 claims 17,592,186,044,416 bytes and holds 4"):
        VariableWidthEmbedding.from_state_dict(state)
    state["tables.1"] = torch.zeros(7, 4)
    with pytest.raises(ValueError, match="whose tables have"):
        VariableWidthEmbedding.from_state_dict(state)
    with pytest.raises(ValueError, match=r"tables\.0 must be a tensor \[n, width\]"):
        VariableWidthEmbedding.from_state_dict({**state, "tables.0": torch.zeros(())})


def test_a_map_that_takes_the_place_of_a_checked_one_is_checked():
    """In the same memory too, and where it is changed behind the tensor's back."""
    tables, band = [torch.randn(4, 2)], torch.zeros(4, dtype=torch.int32)
    ids, row = torch.arange(4), torch.arange(4, dtype=torch.int32)
    variable_width_embedding(ids, tables, [None], band, row)
    address = row.data_ptr()
    del row
    row = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    if row.data_ptr() != address:  # the allocator decides
        row = torch.frombuffer(bytearray(row.numpy().tobytes()), dtype=torch.int32)
    with pytest.raises(ValueError, match="got 9 for token 3"):
        variable_width_embedding(ids, tables, [None], band, row)
    row = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    hidden = torch.randn(2, 2)
    variable_width_cross_entropy(hidden, ids[:2], tables, [None], band, row)
    band.data = torch.tensor([0, 0, 0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="got 5 for token 3"):
        variable_width_cross_entropy(hidden, ids[:2], tables, [None], band, row)


# ---- copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles_are_equal_and_their_own(name):
    module = MODULES[name]()
    before = copies(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same(copies(other), before)
        reset(other)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert_same(copies(module), before)


def test_a_scorer_keeps_its_sums_in_float64():
    """In half types they would overflow: the sum of squares of 70,000 ones."""
    scorer, one = LowRankScorer(1, 2, 1).half(), torch.ones(1, 1, 70_000, 2)
    scorer.calibrate(one, one).half().calibrate(one, one)
    assert scorer.query_moment.dtype == torch.float64
    assert bool((scorer.query_moment == 140_000).all())
    assert scorer.fit().query_projection.dtype == torch.float16


def test_a_scorer_from_the_meta_device_is_not_fitted():
    with torch.device("meta"):
        scorer = LowRankScorer(1, 4, 2)
    scorer.to_empty(device="cpu")
    query = torch.randn(1, 1, 9, 4)
    with pytest.raises(RuntimeError, match="needs fit"):
        scorer.select(query, query, 3)
    with pytest.raises(RuntimeError, match="needs calibrate"):
        scorer.fit()
    scorer.calibrate(query, query)
    wrong = query.clone()
    wrong[0, 0, 3, 1] = torch.nan
    before = copies(scorer)
    for query_, key in ((wrong, query), (query, wrong)):
        with pytest.raises(ValueError, match="must be finite"):
            scorer.calibrate(query_, key)
        assert_same(before, copies(scorer))
    assert scorer.fit().select(query, query, 3).shape == (1, 1, 9, 3)


def test_an_interrupted_resize_changes_nothing(monkeypatch):
    embedding = VariableWidthEmbedding(PLAN)
    before, plan = copies(embedding), embedding.plan

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "normal_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedding.resize(100)
    monkeypatch.undo()
    assert_same(before, copies(embedding))
    assert embedding.plan is plan
    assert embedding.resize(100)(torch.arange(100)).shape == (100, 16)
