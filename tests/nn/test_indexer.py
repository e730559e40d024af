"""nn.Indexer: its parts against the ops, rotary embedding, caches, and that training finds the attention's keys."""

from __future__ import annotations

import pytest
import torch

import sparse_attn
from sparse_attn.nn import Indexer


def rope_of(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, width], the two halves alike, as language models make them."""
    frequencies = 100.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)[None]
    return angles.cos(), angles.sin()


def test_select_is_the_op_on_its_parts():
    indexer, hidden = Indexer(24, 3, 8, groups=2), torch.randn(2, 19, 24)
    (query, weights), key = indexer.queries(hidden), indexer.keys(hidden)
    assert query.shape == (2, 6, 19, 8)
    assert weights.shape == (2, 6, 19)
    assert key.shape == (2, 2, 19, 8)
    want = sparse_attn.indexer_select(query, key, weights, 5, is_causal=True, window=2, sinks=1)
    assert torch.equal(indexer.select(hidden, 5, window=2, sinks=1), want)
    assert torch.equal(indexer(hidden, 5, window=2, sinks=1), want)
    masked = indexer.select(hidden, 5, is_causal=False, key_lengths=torch.tensor([19, 3]))
    assert int(masked[1].max()) == 2


def test_int8():
    torch.manual_seed(1)
    exact, hidden = Indexer(64, 4, 32), torch.randn(1, 500, 64)
    rounded = Indexer(64, 4, 32, int8=True)
    rounded.load_state_dict(exact.state_dict())
    one, two = exact.select(hidden, 50), rounded.select(hidden, 50)
    common = (one.unsqueeze(-1) == two.unsqueeze(-2)).any(-1)[:, :, 100:].double().mean()
    assert 0.9 < common < 1


@pytest.mark.parametrize("width", [8, 16, 32])
def test_cached_keys_give_the_same_selection(width):
    """Prefill of a part, then token by token, as with a key/value cache; narrower, equal and wider rotary parts."""
    indexer, hidden, positions = Indexer(24, 2, 16), torch.randn(1, 30, 24), torch.arange(30.0)
    rope = rope_of(positions, width)
    whole = indexer.select(hidden, 6, rope=rope, sinks=1)
    cache = torch.zeros(1, 1, 0, 16)
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
        part, part_rope = hidden[:, start:end], tuple(t[:, start:end] for t in rope)
        cache = torch.cat((cache, indexer.keys(part, part_rope)), dim=2)
        indices = indexer.select(part, 6, keys=cache, rope=part_rope, sinks=1)
        want = whole[:, :, start:end, : indices.shape[-1]]
        assert torch.equal(indices, want)


def test_rotary_scores_depend_on_distance_alone():
    """The same hidden state everywhere: a score is a function of how far apart two positions are."""
    indexer = Indexer(12, 1, 8)
    hidden = torch.randn(1, 1, 12).expand(1, 40, 12)
    scores = []
    for start in (0.0, 700.0):
        rope = rope_of(torch.arange(40) + start, 16)
        (query, _), key = indexer.queries(hidden, rope), indexer.keys(hidden, rope)
        scores.append(query @ key.mT)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    assert scores[0].std() > 0.01


def test_training_finds_the_attention_s_keys():
    """Attention that looks for one part of the hidden state: the trained indexer holds its mass, a fresh one not."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 96, 32)
    project = torch.randn(32, 8) * 0.5
    query = key = (hidden @ project).unsqueeze(1)  # [B, 1, T, 8]
    indexer = Indexer(32, 4, 16)

    def mass() -> float:
        indices = indexer.select(hidden, 8)
        _, chosen = sparse_attn.gathered_attention(query, key, key, indices, return_lse=True)
        _, every = sparse_attn.topk_attention(query, key, key, 96, is_causal=True, return_lse=True)
        return (chosen - every).exp().mean().item()

    before, optimizer = mass(), torch.optim.Adam(indexer.parameters(), 1e-2)
    losses = []
    for step in range(60):
        indices = indexer.select(hidden, 24) if step >= 45 else None
        loss = indexer.loss(hidden, query, key, indices=indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[44] < 0.5 * losses[0]
    assert mass() > before + 0.1


def test_errors():
    indexer = Indexer(24, 2, 8)
    with pytest.raises(ValueError, match=r"hidden must have shape \[B, T, 24\]"):
        indexer.select(torch.randn(1, 5, 23), 2)
    with pytest.raises(ValueError, match="rope must be"):
        indexer.keys(torch.randn(1, 5, 24), rope_of(torch.arange(4.0), 8))
    with pytest.raises(ValueError, match="at most head_dim = 8"):
        indexer.keys(torch.randn(1, 5, 24), rope_of(torch.arange(5.0), 12))
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        Indexer(24, 0)
    with pytest.raises(TypeError, match="int8 must be True or False"):
        Indexer(24, int8=1)
