"""What a model cannot do is refused at once, by name, and nothing is changed."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.architectures import build  # noqa: E402
from tests.integrations.models import LENGTH, ids, llama, logits, pair  # noqa: E402


def test_no_budget():
    sparse_transformers.register()
    model = llama()
    model.set_attn_implementation("sparse_attn")
    with pytest.raises(
        ValueError, match=r"config\.sparse_attn_top_k is not set.*configure\(model, top_k=…\)"
    ):
        logits(model, ids())


def test_dropout():
    """A model in training is refused at once, one in evaluation when it is trained."""
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.self_attn: .* no attention dropout, got dropout=0\.1"
    ):
        sparse_transformers.configure(llama(attention_dropout=0.1).train(), top_k=4)
    _, sparse = pair(top_k=4, model=llama(attention_dropout=0.1))
    with pytest.raises(ValueError, match=r"no attention dropout, got dropout=0\.1"):
        sparse.train()(input_ids=ids())


def test_additive_mask():
    _, sparse = pair(top_k=4)
    mask = torch.zeros((3, 1, LENGTH, LENGTH))
    with pytest.raises(TypeError, match=r"attention_mask must be boolean .* got torch\.float32"):
        sparse(input_ids=ids(), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 4, "window": 3, "sinks": 2}, "top_k is the whole budget"),
        ({"top_k": 4, "share": "some"}, "share must be one of"),
        ({"top_k": 4, "layers": [-1]}, "layers must be at least 0, got -1"),
        (
            {"top_k": 4, "layers": [2]},
            r"attention layers of this LlamaForCausalLM \(0, 1\), got 2",
        ),
        ({"top_k": 4, "self_test": 1}, "self_test must be True or False, got 1"),
        ({"top_k": 4, "backend": "gpu"}, "backend must be one of .*, got 'gpu'"),
        ({"top_k": 4, "key_index": None}, r"key_index must be True or False, got None \(NoneType\)"),
        ({"top_k": 4, "key_index": "auto"}, r"key_index must be True or False, got 'auto' \(str\)"),
        ({"top_k": "6"}, r"top_k must be an int, got '6' \(str\)"),
        ({"top_k": 4, "selector": 3}, "selector"),
        ({"top_k": 4, "layers": "0"}, "layers must be numbers of layers or None, got '0'"),
        ({"top_k": 4, "residual": "yes"}, "residual must be True, False or 'blocks', got 'yes'"),
    ],
)
def test_configure(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        sparse_transformers.configure(llama(), **options)


def test_not_a_model():
    with pytest.raises(TypeError, match="model must be a transformers model"):
        sparse_transformers.configure(torch.nn.Linear(2, 2), top_k=4)


def test_layers_without_attention():
    with pytest.raises(ValueError, match=r"attention layers of this JambaForCausalLM \(1\), got 0"):
        sparse_transformers.configure(build("Jamba (a Mamba hybrid)"), top_k=4, layers=[0])
    with pytest.raises(ValueError, match="none of its layers has a number"):
        sparse_transformers.configure(build("ViT"), top_k=4, layers=[0])


def test_layers_that_tokens_do_not_reach():
    """Named, with what would work: other layers, another forward, or none."""
    model = build("LLaVA")
    with pytest.raises(ValueError, match=r"model\.vision_tower\.\S+, .* choose among layers=\[0, 1\], give"):
        sparse_transformers.configure(model, top_k=4)
    image = torch.zeros(1, 3, 32, 32)
    tokens = torch.tensor([[1, 5, 5, 5, 5, 7]])
    sparse_transformers.configure(model, top_k=4, self_test={"input_ids": tokens, "pixel_values": image})
    sparse_transformers.configure(model, top_k=4, self_test=False)
    sparse_transformers.configure(model, top_k=4, window=2, layers=[0, 1])
    with pytest.raises(ValueError, match=r"the self-test, a forward with words, failed in the model"):
        sparse_transformers.configure(model, top_k=4, self_test={"words": tokens})


def test_a_refused_configuration_leaves_the_one_before():
    model = sparse_transformers.configure(llama(), top_k=6, window=2)
    before = logits(model, ids())
    with pytest.raises(ValueError, match="needs an indexer"):
        sparse_transformers.configure(model, top_k=4, selector="indexer")
    assert torch.equal(logits(model, ids()), before)


def test_one_attention_module_per_layer():
    with pytest.raises(TypeError, match="BartForConditionalGeneration with several for layer 0"):
        sparse_transformers.add_indexers(build("BART"))


class TestSharded:
    """Tensor parallelism leaves each rank some of the heads."""

    @pytest.fixture
    def world(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def half(self, **options):
        model = llama()
        if options.get("selector") == "indexer":
            sparse_transformers.add_indexers(model, share=options.pop("of"))
        if options.get("selector") == "low_rank":
            sparse_transformers.fit_low_rank(model, [ids()], rank=4)
        model = sparse_transformers.configure(model, top_k=4, **options)
        for layer in model.model.layers:  # as if there were two ranks
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(attention, name)
                linear.weight = torch.nn.Parameter(linear.weight[: len(linear.weight) // 2])
            attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :24])
        return model

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (
                {"share": "all"},
                "share='all' needs all heads in one place, .* left 3 of 6 here: share='kv' or",
            ),
            ({"selector": "indexer", "of": "kv"}, r"split the heads, .*: add_indexers\(share='all'\)"),
            ({"selector": "low_rank"}, "split the heads, and selector='low_rank' has components for all"),
        ],
        ids=str,
    )
    def test_a_choice_of_all_heads(self, world, options, error):
        with pytest.raises(ValueError, match=error):
            logits(self.half(**options), ids())

    @pytest.mark.parametrize("options", [{"share": "kv"}, {"selector": "indexer", "of": "all"}], ids=str)
    def test_a_choice_of_its_own_heads(self, world, options):
        logits(self.half(**options), ids())
