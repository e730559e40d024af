"""`variable_width_embedding`: what is refused, in which words, and that nothing is read first."""

from __future__ import annotations

import pytest
import torch
from helpers.embeddings import make_tables

import sparse_attn
from sparse_attn.wings import extension


def only_cpu(wing):
    if wing.device != "cpu":
        pytest.skip("the lookups of this file are on CPU tensors")


def lookup(wing, ids, e):
    return sparse_attn.variable_width_embedding(ids, *e.arguments, backend=wing.name)


@pytest.mark.parametrize("bad", [-1, 200, 2**40])
def test_ids_out_of_range(wing, bad):
    only_cpu(wing)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    ids[1, 2] = bad
    with pytest.raises(IndexError, match=rf"\[0, 200\).*got {bad} at position \[1, 2\] .*\[3, 4\]"):
        lookup(wing, ids, make_tables())


@pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
def test_the_kernel_reads_nothing_out_of_range():
    """A direct call of the op skips the checks in Python."""
    e = make_tables()
    projections = [torch.empty(0, 0) if p is None else p for p in e.projections]
    op = torch.ops.sparse_attn.variable_width_embedding.cpu
    with pytest.raises(RuntimeError):
        op(torch.tensor([200]), e.tables, projections, e.token_band, e.token_row, -1, False)
    with pytest.raises(RuntimeError):
        op(torch.tensor([0]), e.tables, projections, e.token_band + 3, e.token_row, -1, False)
    with pytest.raises(RuntimeError):
        op(torch.tensor([0]), e.tables, projections, e.token_band, e.token_row + 999, -1, False)


def _changed(**changes):
    e = make_tables()
    arguments = {
        "ids": torch.arange(5),
        "tables": e.tables,
        "projections": e.projections,
        "token_band": e.token_band,
        "token_row": e.token_row,
    }
    return arguments | {k: v(e) if callable(v) else v for k, v in changes.items()}


BAD = {
    "ids no tensor": ({"ids": [1, 2]}, TypeError, "ids must be an int32 or int64 tensor, got"),
    "ids float": ({"ids": torch.zeros(3)}, TypeError, "ids must be int32 or int64, got a float32 tensor"),
    "no tables": ({"tables": []}, ValueError, "tables must hold one table"),
    "tables one tensor": ({"tables": torch.zeros(2, 2)}, TypeError, "tables must be a sequence"),
    "table of ints": ({"tables": lambda e: [e.tables[0].long()]}, TypeError, r"tables\[0\] must be float32"),
    "table 1-D": (
        {"tables": lambda e: [e.tables[0][0]]},
        ValueError,
        r"tables\[0\] must have shape \[n, width\]",
    ),
    "two dtypes": (
        {"tables": lambda e: [e.tables[0], e.tables[1].half(), e.tables[2]]},
        TypeError,
        "all tables must have one dtype",
    ),
    "too few projections": ({"projections": [None]}, ValueError, "one entry per table"),
    "projection wrong way round": (
        {"projections": lambda e: [None, e.projections[1].t(), e.projections[2]]},
        ValueError,
        r"projections\[1\] must have shape \[D, width\] with width 10",
    ),
    "projection dtype": (
        {"projections": lambda e: [None, e.projections[1].half(), e.projections[2]]},
        TypeError,
        r"projections\[1\] must have the tables' dtype",
    ),
    "missing projection": (
        {"projections": lambda e: [None, None, e.projections[2]]},
        ValueError,
        "all bands must come to one width",
    ),
    "band map float": ({"token_band": torch.zeros(200)}, TypeError, "token_band must hold integers"),
    "maps of two lengths": (
        {"token_row": torch.zeros(9, dtype=torch.int32)},
        ValueError,
        "token_band and token_row must have one length V, got 200 and 9",
    ),
    "no such band": (
        {"token_band": torch.full((200,), 3, dtype=torch.int32)},
        ValueError,
        r"token_band must lie in \[0, 3\), the number of tables, got 3 for token 0",
    ),
    "no such row": (
        {"token_row": lambda e: e.token_row + 90},
        ValueError,
        r"token_row must lie in \[0, \d+\), the rows of the token's table",
    ),
    "padding": ({"padding_idx": 200}, ValueError, r"padding_idx must lie in \[-200, 200\)"),
    "sparse": ({"sparse": 1}, TypeError, "sparse must be True or False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(wing, case):
    only_cpu(wing)
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        sparse_attn.variable_width_embedding(**_changed(**changes), backend=wing.name)


def test_a_map_changed_in_place_is_checked_again(wing):
    only_cpu(wing)
    e = make_tables()
    lookup(wing, torch.arange(5), e)
    e.token_row[7] = 1000
    with pytest.raises(ValueError, match="token_row must lie in"):
        lookup(wing, torch.arange(5), e)
