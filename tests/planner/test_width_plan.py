"""WidthPlan: bands, rows, sizes, round trips, and what it refuses."""

import copy
import io
import json
import pickle

import numpy
import pytest
import torch

import sparse_attn
from sparse_attn.planner import WidthPlan


def test_rows_are_ranks_within_the_band_in_id_order():
    plan = WidthPlan(8, [8, 2], [1, 0, 1, 1, 0])
    assert plan.token_band.dtype == plan.token_row.dtype == torch.int32
    assert plan.token_band.tolist() == [1, 0, 1, 1, 0]
    assert plan.token_row.tolist() == [0, 0, 1, 2, 1]
    assert plan.band_sizes == (2, 3)
    assert [plan.tokens_of(b).tolist() for b in range(2)] == [[1, 4], [0, 2, 3]]


def test_rows_of_many_tokens():
    generator = torch.Generator().manual_seed(0)
    plan = WidthPlan(8, [8, 4, 2], torch.randint(3, (10_000,), generator=generator))
    for band, size in enumerate(plan.band_sizes):
        assert plan.token_row[plan.tokens_of(band)].tolist() == list(range(size))


def test_cutoffs():
    plan = WidthPlan.from_cutoffs(50257, 512, [2000, 10000], [512, 128, 32])
    assert plan.band_sizes == (2000, 8000, 40257)
    assert plan.num_embeddings == 50257
    assert plan.num_bands == 3
    assert plan.token_band[[0, 1999, 2000, 9999, 10000, 50256]].tolist() == [0, 0, 1, 1, 2, 2]
    tables = 2000 * 512 + 8000 * 128 + 40257 * 32
    assert plan.num_parameters() == tables + 512 * (128 + 32)
    assert plan.compression == pytest.approx(50257 * 512 / plan.num_parameters())


def test_cutoffs_none():
    plan = WidthPlan.from_cutoffs(1, 4, [], [4])
    assert plan.band_sizes == (1,)
    assert plan.num_parameters() == 4


def test_an_empty_band_is_a_band():
    plan = WidthPlan(8, [8, 4], torch.zeros(3, dtype=torch.int64))
    assert plan.band_sizes == (3, 0)
    assert plan.token_row.tolist() == [0, 1, 2]


def test_the_plan_keeps_its_own_copy():
    band = torch.zeros(3, dtype=torch.int32)
    plan = WidthPlan(8, [8, 4], band)
    band.fill_(1)
    assert plan.token_band.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [list, tuple, numpy.array, torch.tensor])
def test_token_band_from(kind):
    assert WidthPlan(8, [8, 2], kind([1, 0])).token_band.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_token_band_dtypes(dtype):
    assert WidthPlan(8, [8, 2], torch.tensor([1, 0], dtype=dtype)).token_band.dtype == torch.int32


PLAN = WidthPlan(12, (12, 5, 2), [2, 0, 1, 2, 2])


def _saved(plan):
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    file.seek(0)
    return WidthPlan.from_state(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda plan: WidthPlan.from_state(plan.state_dict()),
        _saved,
        lambda plan: WidthPlan.from_json(plan.to_json()),
        lambda plan: pickle.loads(pickle.dumps(plan)),
        copy.deepcopy,
    ],
    ids=["state", "torch.save", "json", "pickle", "deepcopy"],
)
def test_round_trips(there_and_back):
    again = there_and_back(PLAN)
    assert again == PLAN
    assert hash(again) == hash(PLAN)
    assert again.widths == PLAN.widths
    assert torch.equal(again.token_row, PLAN.token_row)


def test_json_file(tmp_path):
    text = PLAN.to_json(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text("utf-8") == text
    assert WidthPlan.from_json(tmp_path / "plan.json") == PLAN
    assert WidthPlan.from_json(str(tmp_path / "plan.json")) == PLAN
    assert json.loads(text)["num_parameters"] == PLAN.num_parameters()


def test_plans_differ():
    assert WidthPlan(12, (12, 5, 2), [2, 0, 1, 2, 1]) != PLAN
    assert WidthPlan(13, (12, 5, 2), [2, 0, 1, 2, 2]) != PLAN
    assert WidthPlan(12, (12, 5, 3), [2, 0, 1, 2, 2]) != PLAN
    assert PLAN != 3


def test_repr_is_a_table():
    lines = repr(WidthPlan.from_cutoffs(50257, 512, [2000, 10000], [512, 128, 32])).splitlines()
    assert "50,257" in lines[0]
    assert "3,418,144" in lines[0]
    assert lines[3].split() == ["1", "8,000", "128", "1,089,536"]


def test_from_counts_is_plan_widths():
    counts = 1e6 / torch.arange(1, 501)
    assert WidthPlan.from_counts(counts, 64, budget=9000) == sparse_attn.plan_widths(counts, 64, budget=9000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, [9], [0]), ValueError, "at most embedding_dim = 8, got widths=\\[9\\]"),
        ((8, [0], [0]), ValueError, "every width must be at least 1, got 0"),
        ((8, [], [0]), ValueError, "at least one, got none"),
        ((8, "8", [0]), TypeError, "widths must be a sequence"),
        ((8, 8, [0]), TypeError, "widths must be a sequence"),
        ((8, [8.5], [0]), TypeError, "every width must be an int"),
        ((0, [1], [0]), ValueError, "embedding_dim must be at least 1"),
        ((8.0, [1], [0]), TypeError, "embedding_dim must be an int"),
        ((8, [8, 4], [0, 2]), ValueError, "\\[0, 2\\).* got 2 for token 1"),
        ((8, [8, 4], [-1]), ValueError, "got -1 for token 0"),
        ((8, [8], [0.5]), TypeError, "integers"),
        ((8, [8], torch.tensor([True])), TypeError, "integers"),
        ((8, [8], [[0]]), ValueError, "shape \\[V\\]"),
        ((8, [8], torch.zeros(0, dtype=torch.int32)), ValueError, "at least 1"),
        ((8, [8], "ab"), TypeError, "tensor of integers"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        WidthPlan(*arguments)


@pytest.mark.parametrize(
    ("cutoffs", "widths", "message"),
    [
        ([0], [4, 2], "ascend strictly between 0 and num_embeddings = 10"),
        ([10], [4, 2], "ascend strictly"),
        ([5, 5], [4, 2, 1], "ascend strictly"),
        ([5, 3], [4, 2, 1], "ascend strictly"),
        ([5], [4], "len\\(cutoffs\\) \\+ 1 = 2, got 1"),
    ],
)
def test_refuses_cutoffs(cutoffs, widths, message):
    with pytest.raises(ValueError, match=message):
        WidthPlan.from_cutoffs(10, 4, cutoffs, widths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "format"),
        ('{"format": "sparse_attn.WidthPlan", "version": 9}', "version 1, got 9"),
        (
            '{"format": "sparse_attn.WidthPlan", "version": 1, "widths": [1]}',
            "lacks embedding_dim, token_band",
        ),
    ],
)
def test_refuses_json(text, message):
    with pytest.raises(ValueError, match=message):
        WidthPlan.from_json(text)


def test_refuses_a_json_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        WidthPlan.from_json(tmp_path / "none.json")
