"""`sparse-attn study leak`: its data and models, and from the command line to the results in miniature."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.studies import leak
from benchmarks.studies.statistics import interval
from tests.helpers.studies import in_miniature

for package in ("matplotlib", "rich", "scipy"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.slow
def test_in_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leak, "LONGER", 3)
    monkeypatch.setattr(leak, "TESTED", 50)
    sizes = leak.Sizes(scaling_seeds=2, longer_seeds=2, mask_seeds=1, mask_steps=2)
    result, _ = in_miniature(leak, sizes, tmp_path)
    assert "causal mask, bands" in capsys.readouterr().out
    assert len(result["rows"]) == 4 * 2 + 2 * 2 + 4
    assert result["about"]["entropy_mask"] == pytest.approx(4.2275, abs=1e-4)


def test_bands_have_their_widths_and_all_tokens():
    tokens = torch.tensor([3] * 5 + [1] * 4 + [0] * 2 + [2])
    bands = leak.bands_by_rank(tokens, 5, (0.2, 0.6))
    assert [b.tolist() for b in bands] == [[3], [1, 0], [2, 4]]
    embedding = leak.Bands(bands, [6, 4, 2], 4)
    assert [tuple(t.weight.shape) for t in embedding.tables] == [(1, 6), (2, 4), (2, 2)]
    ids = torch.tensor([[3, 0, 4]])
    found = embedding(ids)
    assert torch.equal(found[0, 1], embedding.tables[1].weight[1])
    assert torch.allclose(found[0, 0], embedding.out[0].weight @ embedding.tables[0].weight[0])
    assert torch.allclose(found[0, 2], embedding.out[2].weight @ embedding.tables[2].weight[1])


@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_hides_the_next_token(causal):
    torch.manual_seed(0)
    model = leak.Encoder(torch.nn.Embedding(leak.VOCABULARY, leak.WIDTH), causal=causal).eval()
    ids = torch.randint(leak.VOCABULARY, (1, leak.CONTEXT))
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 1) % leak.VOCABULARY
    moved = (model(ids) - model(other)).abs().amax(-1)[0]
    assert bool((moved[:10] > 1e-5).any()) == (not causal)


def test_batches_of_the_scaling_test():
    corpus = torch.arange(1000)
    batches = list(leak.published_batches(corpus, 5))
    assert len(batches) == 5
    assert batches[1][2].tolist() == list(range(64 + 16, 64 + 16 + 64))
    assert len(list(leak.published_batches(corpus, 100))) == 8  # the eighth ends before the corpus does


def test_intervals():
    found = interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # Student's t for three degrees of freedom
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert interval([1.0]).low is None
    assert interval([-1.0, 1.0]).p == pytest.approx(1.0)
