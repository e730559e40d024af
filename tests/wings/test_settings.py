"""What torch is told to round it does not round in ours, and afterwards it is told so still."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.inputs import normal

import sparse_attn
from sparse_attn.wings import settings

MATMULS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def told() -> list[str]:
    return [matmul.fp32_precision for matmul in MATMULS]


@pytest.fixture
def precision():
    """Sets torch's precision of float32 products, for the test alone."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_the_reference_has_the_products_of_its_formula(precision, setting):
    query, key, value = (normal(1, 2, 300, 64, seed=s) for s in range(3))
    wing = {"is_causal": True, "backend": "reference"}
    want = sparse_attn.topk_attention(query, key, value, 8, return_indices=True, **wing)
    precision(setting)
    set_to = told()
    found = sparse_attn.topk_attention(query, key, value, 8, return_indices=True, **wing)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert told() == set_to
    assert torch.get_float32_matmul_precision() == setting


def test_a_call_that_fails_puts_it_back(precision):
    precision("high")
    set_to = told()
    with pytest.raises(RuntimeError, match=r"\['ieee', 'ieee'\]"), settings.FLOAT32.off():
        raise RuntimeError(told())
    assert told() == set_to


def test_the_last_of_several_threads_puts_it_back(precision):
    precision("high")
    set_to = told()
    inside, go_on = threading.Event(), threading.Event()

    def other():
        with settings.FLOAT32.off():
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=other)
    with settings.FLOAT32.off():
        thread.start()
        assert inside.wait(10)
    assert told() == ["ieee", "ieee"]  # the other one still runs
    go_on.set()
    thread.join(10)
    assert told() == set_to


def test_nothing_is_touched_where_nothing_is_rounded():
    before = told()
    with settings.FLOAT32.off():
        assert told() == before


def test_sums_of_bfloat16_products():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with settings.BFLOAT16_SUMS.off():
        assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_bf16_reduced_precision_reduction is before
