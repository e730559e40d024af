"""The same bits for the same inputs, whatever the number of threads and however often."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.inputs import index_rows, mask, normal, qkv

# Deterministic mode would hide a wing that leaves its order to chance.
pytestmark = pytest.mark.torch_defaults

CASES = {
    "causal": ((2, 4, 2, 200, 200, 32), 16, {"is_causal": True}),
    "shared": ((1, 8, 2, 150, 150, 24), 12, {"is_causal": True, "share": "kv", "window": 4, "sinks": 2}),
    "shared by all": ((1, 6, 3, 70, 190, 16), 20, {"share": "all"}),
    "masked": ((2, 2, 1, 130, 90, 40), 9, {"attn_mask": mask(2, 1, 130, 90)}),
    "few queries": ((1, 2, 2, 3, 3000, 32), 100, {}),
    "one query": ((1, 1, 1, 1, 3000, 64), 64, {}),
    "tiles of queries": ((1, 2, 1, 1100, 1100, 64), 48, {"is_causal": True}),
    "popular keys": ((1, 2, 1, 400, 16, 16), 8, {}),  # every key is used by hundreds of queries
}


def run(wing, dtype, case):
    sizes, top_k, options = CASES[case]
    inputs = [t.requires_grad_() for t in qkv(*sizes, dtype=dtype)]
    out, lse, indices = wing.topk_attention(*inputs, top_k, return_lse=True, return_indices=True, **options)
    grads = (normal(*out.shape, dtype=dtype, seed=8), normal(*lse.shape, seed=9).where(lse > -torch.inf, 0.0))
    fused = torch.autograd.grad((out, lse), inputs, grads)
    staged, staged_lse = wing.gathered_attention(*inputs, indices, return_lse=True)
    again = torch.autograd.grad((staged, staged_lse), inputs, grads)
    garbage = index_rows((*indices.shape[:3], 11), sizes[4], garbage=True)
    odd = torch.autograd.grad(wing.gathered_attention(*inputs, garbage), inputs, grads[0])
    return [indices, out, lse, *fused, staged, staged_lse, *again, *odd]


def assert_same_bits(results, want):
    for number, (ours, true) in enumerate(zip(results, want, strict=True)):
        assert torch.equal(ours, true), f"result {number} differs by {(ours - true).abs().max()}"


@pytest.mark.parametrize("case", CASES)
def test_number_of_threads(wing, dtype, case):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(wing, dtype, case))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("case", CASES)
def test_twice(wing, dtype, case):
    assert_same_bits(run(wing, dtype, case), run(wing, dtype, case))


def test_batch_entries_and_heads_are_independent(wing, dtype):
    """The selection of one head of one batch entry does not depend on what else is in the call."""
    query, key, value = qkv(3, 4, 2, 40, 60, 16, dtype=dtype)
    whole = wing.topk_attention(query, key, value, 8, return_indices=True)
    for batch in range(3):
        part = [t[batch : batch + 1] for t in (query[:, 2:], key[:, 1:], value[:, 1:])]
        out, indices = wing.topk_attention(*part, 8, return_indices=True)
        assert torch.equal(indices, whole[1][batch : batch + 1, 2:])
        torch.testing.assert_close(out, whole[0][batch : batch + 1, 2:])


def test_calls_from_several_python_threads(wing):
    """Calls at the same time do not disturb each other."""
    cases = list(CASES)[:4]
    want = {case: run(wing, torch.float32, case) for case in cases}
    failures = []

    def work(case):
        try:
            for _ in range(3):
                assert_same_bits(run(wing, torch.float32, case), want[case])
        except BaseException as error:
            failures.append((case, error))

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
