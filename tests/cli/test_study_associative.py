"""`sparse-attn study associative`: from the command line to the results in miniature, and the task itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks.studies import associative
from tests.helpers.studies import in_miniature

for package in ("matplotlib", "rich", "scipy"):
    pytest.importorskip(package, reason=f"{package} is not installed")

TINY = associative.Settings(
    symbols=16, pairs=(4, 16), tokens=64, steps=4, indexer_steps=2, budgets=(8, 32), seeds=2
)


@pytest.mark.slow
@pytest.mark.torch_defaults
def test_in_miniature(tmp_path, capsys):
    result, _ = in_miniature(associative, TINY, tmp_path)
    printed = capsys.readouterr().out
    for arm in (
        "dense (ceiling)",
        "exact (oracle)",
        "indexer, per head",
        "low rank 8",
        "hierarchical",
        "window",
    ):
        assert arm in printed
    # Whole blocks of 8 keys need three of them.
    assert len(result["rows"]) == 2 * (1 + 6 + 9)
    for seed in (0, 1):
        found = {(r["arm"], r["keys"]): r["accuracy"] for r in result["rows"] if r["seed"] == seed}
        # 32 keys are all that there are, whoever chooses them.
        assert {found[arm, 32] for arm, keys in found if keys == 32} == {found["dense", None]}


def test_a_sequence_asks_for_what_it_told():
    pairs, symbols = 16, TINY.symbols
    ids, values = associative.sequences(TINY, pairs, torch.Generator().manual_seed(0))
    assert ids.shape == (2, 2 * pairs)
    keys, told = ids // (symbols + 1), ids % (symbols + 1)
    for b in range(2):
        pair = dict(zip(keys[b, :pairs].tolist(), told[b, :pairs].tolist(), strict=True))
        assert len(pair) == pairs  # no key twice
        assert max(pair.values()) < symbols
        assert told[b, pairs:].tolist() == [symbols] * pairs  # asked for, not told again
        assert [pair[k] for k in keys[b, pairs:].tolist()] == values[b].tolist()
    assert keys[0, pairs:].tolist() != keys[0, :pairs].tolist()


def test_arms_leave_the_dense_model_as_it_was():
    model = associative.train(TINY, 0)
    ids, _ = associative.sequences(TINY, 16, torch.Generator().manual_seed(1))
    dense = model(ids)
    arms = associative.Arms(model, TINY, 0)
    for arm in arms.names(24):
        arms.use(arm, 24)
        assert (model(ids) - dense).abs().max() > 0, arm
    arms.use(associative.DENSE, None)
    assert torch.equal(model(ids), dense)
