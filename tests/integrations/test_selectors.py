"""How keys are chosen in a Hugging Face model: blocks, few components, an object of one's own; and the residual."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.selection import Exact, Selection  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    LENGTH,
    cached,
    close,
    ids,
    llama,
    logits,
    padding,
    pair,
)  # fmt: skip


class LastKeys:
    """A user's own selector: the latest keys."""

    def __init__(self) -> None:
        self.calls = 0

    def select(self, query, key, top_k, rule):
        self.calls += 1
        last = torch.arange(query.shape[2]).view(1, 1, -1, 1) + (rule.causal_offset or 0)
        indices = last - torch.arange(top_k - 1, -1, -1)
        return Selection(torch.where(indices >= 0, indices, -1).int().expand(query.shape[0], 1, -1, -1))


def test_a_selector_of_the_users_own(tmp_path):
    """An object chooses as a name does; it is not saved, and without it there is an error, not another choice."""
    own = LastKeys()
    _, sparse = pair(top_k=8, selector=own)
    _, window = pair(top_k=8, window=8)  # the same keys
    close(logits(sparse, ids()), logits(window, ids()))
    assert own.calls == sparse.config.num_hidden_layers
    close(sparse.generate(ids(), max_new_tokens=4).float(), window.generate(ids(), max_new_tokens=4).float())
    sparse.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_attn")
    with pytest.raises(ValueError, match="an object that is not saved with a model: pass it again"):
        logits(again, ids())
    with pytest.raises(TypeError, match="selector must have a method select"):
        sparse_transformers.configure(sparse, top_k=8, selector=3)


class TestBlocks:
    LENGTH = 300

    def tokens(self, batch=2):
        return ids(batch, self.LENGTH)

    def model(self, **options):
        return sparse_transformers.configure(llama(max_position_embeddings=512), **options)

    def test_enough_blocks_are_dense_attention(self, no_shortcut):
        sparse = self.model(top_k=320, selector="blocks")
        dense = llama(max_position_embeddings=512)
        close(logits(sparse, self.tokens()), logits(dense, self.tokens()))
        sparse_transformers.configure(sparse, top_k=320, selector="refined_blocks")
        close(logits(sparse, self.tokens()), logits(dense, self.tokens()))

    @pytest.mark.parametrize("selector", ["blocks", "refined_blocks"])
    def test_padding_at_the_ends_changes_nothing(self, selector):
        sparse = self.model(top_k=192, selector=selector)
        # Blocks are counted from the first token; refined ones from the row's beginning, and whole blocks move nothing.
        for where in (slice(0, 64 if selector == "refined_blocks" else 37), slice(250, 300)):
            mask = torch.ones((2, self.LENGTH), dtype=torch.int64)
            mask[1, where] = 0
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                batched = sparse(input_ids=self.tokens(), attention_mask=mask, position_ids=positions).logits
                alone = sparse(input_ids=self.tokens()[1:, mask[1].bool()]).logits[0]
            close(batched[1, mask[1].bool()], alone)

    def test_generation(self):
        sparse = self.model(top_k=192, selector="blocks")
        out = sparse.generate(self.tokens(), attention_mask=torch.ones_like(self.tokens()), max_new_tokens=4)
        assert out.shape == (2, self.LENGTH + 4)

    def test_errors(self):
        with pytest.raises(ValueError, match="a multiple of 64, at least 192, got 100"):
            self.model(top_k=100, selector="blocks")
        with pytest.raises(ValueError, match="window and sinks go without, got window=0, sinks=4"):
            self.model(top_k=192, selector="blocks", sinks=4)
        mask = torch.ones((2, self.LENGTH), dtype=torch.int64)
        mask[0, 100:110] = 0
        with pytest.raises(ValueError, match="padding at the ends of a sequence, got some within"):
            logits(self.model(top_k=192, selector="blocks"), self.tokens(), mask)


class TestLowRank:
    def model(self, **options):
        model = sparse_transformers.fit_low_rank(llama(), [ids()], rank=options.pop("rank", 8))
        return sparse_transformers.configure(model, selector="low_rank", **options)

    def test_all_components_are_exact_selection(self):
        ours = self.model(top_k=6, window=2, sinks=1)
        exact = sparse_transformers.configure(llama(), top_k=6, window=2, sinks=1)
        for side in ("left", "right"):
            close(logits(ours, ids(), padding(side)), logits(exact, ids(), padding(side)))

    def test_fewer_components_select_otherwise_and_decode_alike(self):
        ours = self.model(rank=2, top_k=6)
        whole = logits(ours, ids())
        assert (whole - logits(sparse_transformers.configure(llama(), top_k=6), ids())).abs().max() > 1e-3
        past, parts = transformers.DynamicCache(), []
        for t in range(LENGTH):
            parts.append(logits(ours, ids()[:, t : t + 1], **cached(past)))
        close(torch.cat(parts, 1), whole)

    def test_the_model_keeps_its_attention_and_its_scorers(self):
        model = llama()
        before = logits(model, ids())
        sparse_transformers.fit_low_rank(model, [ids()], rank=4, layers=[1])
        assert torch.equal(logits(model, ids()), before)
        assert any("sparse_attn_low_rank" in name for name in model.state_dict())

    def test_errors(self):
        with pytest.raises(ValueError, match="needs a scorer in layer 0: fit_low_rank gives it one"):
            sparse_transformers.configure(llama(), top_k=6, selector="low_rank")
        with pytest.raises(ValueError, match="at least one batch of token ids, got none"):
            sparse_transformers.fit_low_rank(llama(), [])
        with pytest.raises(TypeError, match="batches must hold token ids"):
            sparse_transformers.fit_low_rank(llama(), [torch.randn(2, 3)])
        with pytest.raises(ValueError, match="layers must be among 0 … 1, got 2"):
            sparse_transformers.fit_low_rank(llama(), [ids()], layers=[2])
        for call in (
            lambda: sparse_transformers.fit_low_rank(llama(), [ids()], layers=1),
            lambda: sparse_transformers.add_indexers(llama(), layers=1),
            lambda: sparse_transformers.configure(llama(), top_k=4, layers=1),
        ):
            with pytest.raises(TypeError, match=r"layers must be numbers of layers or None, got 1 \(int\)"):
                call()
        with pytest.raises(IndexError, match=r"ids in 0 … 63, the model's vocabulary, got 1002"):
            sparse_transformers.fit_low_rank(llama(), [torch.tensor([[5, 1002]])])
        with pytest.raises(ValueError, match=r"batches must hold at least one token, got shape \[2, 0\]"):
            sparse_transformers.fit_low_rank(llama(), [ids(2, 0)])
        with pytest.raises(ValueError, match="rank"):
            sparse_transformers.fit_low_rank(llama(), [ids()], rank=9)


class TestResidual:
    def test_it_is_nearer_to_dense_attention(self):
        dense, plain = pair(top_k=6)
        _, residual = pair(top_k=6, residual=True)
        target = logits(dense, ids())
        nearer = (logits(residual, ids()) - target).norm()
        assert 0 < nearer < (logits(plain, ids()) - target).norm()

    @pytest.mark.parametrize("selector", ["int8", "low_rank", "indexer", "own"])
    def test_the_tail_of_other_selections(self, selector):
        """All that is left out goes to its mean: with every key but the own left out, a mean of values."""
        dense, sparse = pair(top_k=6)
        sparse_transformers.add_indexers(sparse, num_heads=2, head_dim=8)
        sparse_transformers.fit_low_rank(sparse, [ids()], rank=4)
        chosen = Exact() if selector == "own" else selector
        found = {}
        for residual in (False, True):
            sparse_transformers.configure(sparse, top_k=6, selector=chosen, residual=residual)
            found[residual] = logits(sparse, ids())
        target = logits(dense, ids())
        assert (found[True] - found[False]).norm() > 0
        # An untrained indexer leaves out what matters; the others leave out little.
        if selector != "indexer":
            assert (found[True] - target).norm() < (found[False] - target).norm()
        past, parts = transformers.DynamicCache(), []
        for t in range(LENGTH):
            parts.append(logits(sparse, ids()[:, t : t + 1], **cached(past)))
        close(torch.cat(parts, 1), found[True])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_at_the_ends_changes_nothing(self, side):
        _, sparse = pair(top_k=6, residual=True)
        mask = padding(side)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            batched = sparse(input_ids=ids(), attention_mask=mask, position_ids=positions).logits
            alone = sparse(input_ids=ids()[2:, mask[2].bool()]).logits[0]
        close(batched[2, mask[2].bool()], alone)

    def test_decoding_equals_prefill(self):
        _, sparse = pair(top_k=6, residual=True)
        past, parts = transformers.DynamicCache(), []
        for t in range(LENGTH):
            parts.append(logits(sparse, ids()[:, t : t + 1], **cached(past)))
        close(torch.cat(parts, 1), logits(sparse, ids()))

    def test_means_of_blocks(self):
        """Over several blocks: another result than the mean's, nearer than none's, and the same in decoding."""
        found = {}
        for residual in (False, True, "blocks"):
            dense, sparse = pair(top_k=6, residual=residual)
            found[residual] = logits(sparse, ids(1, 150))
        target = logits(dense, ids(1, 150))
        assert 0 < (found["blocks"] - target).norm() < (found[False] - target).norm()
        assert (found["blocks"] - found[True]).norm() > 0
        past = transformers.DynamicCache()
        parts = [logits(sparse, ids(1, 150)[:, :126], **cached(past))]
        for t in range(126, 150):
            parts.append(logits(sparse, ids(1, 150)[:, t : t + 1], **cached(past)))
        close(torch.cat(parts, 1), found["blocks"])

    def test_errors(self):
        with pytest.raises(
            ValueError, match="residual=True needs a selection of tokens, got selector='blocks'"
        ):
            sparse_transformers.configure(llama(), top_k=192, selector="blocks", residual=True)
        with pytest.raises(TypeError, match="residual"):
            sparse_transformers.configure(llama(), top_k=6, residual=1)
