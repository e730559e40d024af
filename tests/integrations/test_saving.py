"""Models that are saved and loaded again: sparse as they were, or one sentence says what is missing."""

from __future__ import annotations

import copy

import pytest
import torch

import sparse_attn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import close, ids, llama, logits, pair  # noqa: E402


def loaded(folder, **more):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)


def test_a_configured_model(tmp_path):
    """Also of a model that was loaded itself; an implementation that is asked for goes before what was saved."""
    dense, sparse = pair(top_k=8, window=2)
    for _ in range(2):
        sparse.save_pretrained(tmp_path)
        sparse, before = loaded(tmp_path), sparse
        assert torch.equal(logits(sparse, ids()), logits(before, ids()))
    close(logits(loaded(tmp_path, attn_implementation="sdpa"), ids()), logits(dense, ids()))


def test_a_loaded_model_that_never_ran(tmp_path):
    """Saved as it came; also its config alone, and a copy."""
    dense, sparse = pair(top_k=8, window=2)
    for _ in range(3):
        sparse.save_pretrained(tmp_path)
        sparse, before = copy.deepcopy(loaded(tmp_path)), sparse
    assert sparse.config._attn_implementation == "sparse_attn"
    assert torch.equal(logits(sparse, ids()), logits(before, ids()))
    assert transformers.AutoConfig.from_pretrained(tmp_path)._attn_implementation == "sparse_attn"
    dense.save_pretrained(tmp_path)
    assert loaded(tmp_path).config._attn_implementation == "sdpa"


def test_another_attention_is_saved_as_such(tmp_path):
    """Whatever it was before, and back again; options stay in the config, where they do nothing."""
    dense, sparse = pair(top_k=8, window=2)
    wanted = logits(sparse, ids())
    sparse.set_attn_implementation("sdpa")
    sparse.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again, ids()), logits(dense, ids()))
    again.set_attn_implementation("sparse_attn")
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path), ids()), wanted)
    loaded(tmp_path, attn_implementation="eager").save_pretrained(tmp_path)
    assert loaded(tmp_path).config._attn_implementation == "sdpa"


def test_a_part_of_a_model(tmp_path):
    """LLaVA: a config within a config."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlavaConfig(
        text_config=llama().config,
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=16),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    language = model.model.language_model
    sparse_transformers.configure(language, top_k=8)
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sparse_attn"
    assert again.model.vision_tower.config._attn_implementation == "sdpa"
    again.set_attn_implementation("sdpa")
    again.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sdpa"


def test_a_program_that_does_not_know_this_package_refuses_it(tmp_path, monkeypatch):
    """Rather than run a dense model: transformers' own error names the implementation."""
    pair(top_k=8)[1].save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "sparse_attn")
    with pytest.raises(ValueError, match="sparse_attn"):
        loaded(tmp_path)


@pytest.mark.parametrize("share", ["all", "kv"])
@pytest.mark.parametrize("size", ["1MB", "20KB"])
def test_indexers(tmp_path, share, size):
    model = sparse_transformers.add_indexers(llama(), num_heads=3, head_dim=8, share=share)
    sparse_transformers.configure(model, top_k=6, selector="indexer", sinks=1)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    again = loaded(tmp_path)
    with pytest.raises(ValueError, match=r"an indexer in layer 0: .* load_indexers: .* save_pretrained"):
        logits(again, ids())
    sparse_transformers.load_indexers(again, tmp_path)
    assert torch.equal(logits(again, ids()), logits(model, ids()))


@pytest.mark.parametrize("int8", [False, True])
def test_low_rank_scorers(tmp_path, int8):
    model = sparse_transformers.fit_low_rank(llama(), [ids()], rank=3, int8=int8)
    sparse_transformers.configure(model, top_k=6, selector="low_rank")
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    with pytest.raises(ValueError, match=r"a scorer in layer 0: .* load_low_rank from the folder"):
        logits(again, ids())
    sparse_transformers.load_low_rank(again, tmp_path)
    assert torch.equal(logits(again, ids()), logits(model, ids()))


def test_folders_without_any(tmp_path):
    llama().save_pretrained(tmp_path)
    for load in (sparse_transformers.load_indexers, sparse_transformers.load_low_rank):
        with pytest.raises(ValueError, match="holds nothing called sparse_attn_"):
            load(llama(), tmp_path)


def test_indexers_of_layers_that_the_model_does_not_have(tmp_path):
    sparse_transformers.add_indexers(llama(num_hidden_layers=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has something for model\.layers\.2\.self_attn"):
        sparse_transformers.load_indexers(llama(), tmp_path)


def test_an_embedding_of_variable_width():
    """A model runs with one; what transformers would do to its weight is refused, and changes nothing."""
    model = llama()
    embedding = sparse_attn.nn.VariableWidthEmbedding(
        sparse_attn.WidthPlan.from_cutoffs(64, 48, cutoffs=[16], widths=[48, 8])
    )
    model.set_input_embeddings(embedding)
    before = logits(model, ids())
    model.config.tie_word_embeddings = True  # after which transformers looks for `embed_tokens.weight`
    refusals = {
        r"no `weight`: VariableWidthHead\(embedding\)": (
            AttributeError,
            lambda: model.resize_token_embeddings(80),
        ),
        r"no `weight` that could be tied: .*VariableWidthHead": (NotImplementedError, model.tie_weights),
    }
    for words, (error, call) in refusals.items():
        with pytest.raises(error, match=words):
            call()
        assert model.get_input_embeddings() is embedding
        assert torch.equal(logits(model, ids()), before)


def test_tying_is_refused_also_by_whom_our_words_do_not_reach():
    """Transformers asks for the weight by its name; where that is not seen, its own error says that there is none."""

    class Wrapped(sparse_attn.nn.VariableWidthEmbedding):
        def __getattr__(self, name):
            return super().__getattr__(name)

    plan = sparse_attn.WidthPlan.from_cutoffs(64, 48, cutoffs=[16], widths=[48, 8])
    for kind, error in (
        (sparse_attn.nn.VariableWidthEmbedding, NotImplementedError),
        (Wrapped, AttributeError),
    ):
        model = llama(tie_word_embeddings=True)
        embedding = kind(plan)
        model.set_input_embeddings(embedding)
        head, before = model.lm_head.weight, logits(model, ids())
        with pytest.raises(error, match=r"weight"):
            model.tie_weights()
        assert model.lm_head.weight is head
        assert torch.equal(logits(model, ids()), before)
        # All others are told that there is none.
        assert not hasattr(embedding, "weight")
        assert getattr(embedding, "weight", None) is None
        with pytest.raises(NotImplementedError, match="could be tied"):
            embedding.weight = head
        assert [n for n, _ in embedding.named_parameters() if n == "weight"] == []


def test_an_embedding_of_variable_width_with_a_tied_head():
    """As the refusal says: it runs, trains, and nothing ties it to anything else."""
    model = llama(tie_word_embeddings=True)
    embedding = sparse_attn.nn.VariableWidthEmbedding(
        sparse_attn.WidthPlan.from_cutoffs(64, 48, cutoffs=[16], widths=[48, 8])
    )
    model.set_output_embeddings(sparse_attn.nn.VariableWidthHead(embedding))
    with pytest.raises(NotImplementedError, match="could be tied"):
        model.tie_weights()  # would leave the head a parameter that nothing reads
    model.set_input_embeddings(embedding)
    model.config.tie_word_embeddings = False
    model.tie_weights()
    assert not hasattr(embedding, "weight")
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert all(bool(t.grad.any()) for t in embedding.tables)
    hidden = model.model(input_ids=ids()).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids()).logits, hidden @ embedding.full_table().T)
