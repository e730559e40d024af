"""The lists of a backward: which entries name a key, beside a stable sort."""

from __future__ import annotations

import pytest
import torch

from sparse_attn.triton_kernels.lib import key_lists


def sorted_lists(indices: torch.Tensor, keys: int) -> list[list[list[int]]]:
    """Of each set and key its entries, in order."""
    rows = indices.flatten(2).flatten(0, 1)
    return [[(row == key).nonzero().flatten().tolist() for key in range(keys)] for row in rows]


@pytest.mark.parametrize(
    "counters", [key_lists.COUNTERS, 40, 1]
)  # all keys at once, a few, one after the other
@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("budget", [1, 5, 40])
def test_entries_of_each_key_in_the_order_of_the_queries(wing, counters, size, budget, monkeypatch):
    """Beside empty slots and numbers that are no keys; a part of the queries as well as all."""
    monkeypatch.setattr(key_lists, "COUNTERS", counters)
    monkeypatch.setattr(key_lists, "SMALLEST", size)
    keys = 7
    indices = torch.randint(-2, keys + 2, (2, 3, 9, budget), dtype=torch.int32)
    indices[0, 0, 3, 0], indices[1, 2, 8, 0] = 2**31 - 1, -(2**31)
    for first, queries in ((0, None), (2, 5), (8, 1)):
        order, offsets = key_lists.key_lists(indices.mT.contiguous().mT, keys, first, queries)
        wanted = sorted_lists(indices[:, :, first : 9 if queries is None else first + queries], keys)
        for number, of_keys in enumerate(wanted):
            for key, entries in enumerate(of_keys):
                found = order[number, offsets[number, key] : offsets[number, key + 1]]
                assert found.tolist() == entries, f"set {number}, key {key}"
        assert offsets.dtype == order.dtype == torch.int32
