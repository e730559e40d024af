"""One selection for several layers of a Hugging Face model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import continuous, parts, reuse  # noqa: E402
from sparse_attn.integrations import key_index as key_indices  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.integrations.options import options_of  # noqa: E402
from sparse_attn.selection import Exact  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    LENGTH,
    cached,
    close,
    ids,
    llama,
    logits,
    padding,
    positions_of,
    small,
)  # fmt: skip

LAYERS = 5


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not reuse._kept.of


class Replays:
    """Selects for itself in some layers and says the same again in those behind: each layer asks it."""

    def __init__(self, firsts, layers=LAYERS) -> None:
        self.firsts, self.layers, self.calls = firsts, layers, 0

    def select(self, query, key, top_k, rule):
        if self.calls % self.layers in self.firsts:
            self.chosen = Exact().select(query, key, top_k, rule)
        self.calls += 1
        return self.chosen


def both(firsts=(0, 2, 4), reuse=2, **options):
    """(ours, a model that does the same by a selector of the user's own)."""
    theirs = sparse_transformers.configure(
        llama(num_hidden_layers=LAYERS), selector=Replays(firsts), **options
    )
    return sparse_transformers.configure(llama(num_hidden_layers=LAYERS), reuse=reuse, **options), theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": "kv", "window": 2, "sinks": 1},
        {"share": "all", "residual": True},
        {"residual": "blocks"},
    ],
)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_layers_behind_attend_to_the_same_keys(options, side):
    ours, theirs = both(top_k=6, **options)
    mask = padding(side) if side else None
    more = {"position_ids": positions_of(mask)} if side else {}
    close(logits(ours, ids(), mask, **more), logits(theirs, ids(), mask, **more))
    every = sparse_transformers.configure(llama(num_hidden_layers=LAYERS), top_k=6, **options)
    assert (logits(every, ids()) - logits(ours, ids())).abs().max() > 1e-4


def test_which_layers_select():
    for given, groups in (
        (3, [[0, 1, 2], [3, 4]]),
        (9, [[0, 1, 2, 3, 4]]),
        ([0, 1, 4], [[0], [1, 2, 3], [4]]),
        ((3, 0), [[0, 1, 2], [3, 4]]),
    ):
        ours, theirs = both([group[0] for group in groups], given, top_k=6)
        assert ours.config.sparse_attn_reuse == groups
        close(logits(ours, ids()), logits(theirs, ids()))
    # Counted among sparse layers: 1 and 3 share, 4 is alone, 0 and 2 are dense.
    ours = sparse_transformers.configure(llama(num_hidden_layers=LAYERS), top_k=6, layers=[4, 3, 1], reuse=2)
    assert ours.config.sparse_attn_reuse == [[1, 3], [4]]
    replays = Replays([0, 2], 3)
    theirs = sparse_transformers.configure(
        llama(num_hidden_layers=LAYERS), top_k=6, layers=[1, 3, 4], selector=replays
    )
    close(logits(ours, ids()), logits(theirs, ids()))
    sparse_transformers.configure(ours, top_k=6)
    assert ours.config.sparse_attn_reuse is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{}, {"window": 3, "sinks": 1, "share": "all"}])
def test_decoding_equals_prefill(cache, options):
    ours, theirs = both(top_k=6, **options)
    kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
    more = {} if cache == "dynamic" else {"max_cache_len": LENGTH + 5}
    past, made = kind(config=ours.config, **more), []
    for step in [slice(0, 10), *(slice(t, t + 1) for t in range(10, LENGTH))]:
        made.append(logits(ours, ids()[:, step], **cached(past)))
    close(torch.cat(made, 1), logits(ours, ids()))
    for beams in (1, 2):
        tokens = [m.generate(ids(), max_new_tokens=5, num_beams=beams) for m in (ours, theirs)]
        assert torch.equal(*tokens)


def test_a_key_index_stands_beside_the_layers_that_select(monkeypatch):
    monkeypatch.setattr(key_indices, "LEAST_KEYS", 8)
    model = llama(num_hidden_layers=LAYERS)
    told = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = []
    for kept in (True, False):
        sparse_transformers.configure(model, top_k=6, reuse=2, key_index=kept)
        found.append(model.generate(ids(), **told))
    assert torch.equal(torch.stack(found[0].logits), torch.stack(found[1].logits))
    layers = found[0].past_key_values.layers
    kept = [n for n in range(LAYERS) if layers[n] in key_indices._kept and key_indices._kept[layers[n]].index]
    assert kept == [0, 2, 4]


@pytest.mark.parametrize("selector", ["int8", "low_rank", "indexer", "blocks", "refined_blocks"])
def test_other_selections(selector):
    """Layers that select have what that takes; those behind need none."""
    model = llama(num_hidden_layers=4, max_position_embeddings=512)
    length = 300 if "blocks" in selector else LENGTH
    top_k = 192 if "blocks" in selector else 6
    sparse_transformers.add_indexers(model, num_heads=2, head_dim=8, share="kv", layers=[0, 2])
    sparse_transformers.fit_low_rank(model, [ids()], rank=4, layers=[0, 2])
    sparse_transformers.configure(model, top_k=top_k, selector=selector, reuse=2)
    asked = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: asked.append((n, len(reuse._kept.of))))
    whole = logits(model, ids(2, length))
    assert asked == [(0, 1), (1, 0), (2, 1), (3, 0)]  # kept from the first of a group to its last
    if selector in ("low_rank", "indexer"):
        with pytest.raises(ValueError, match="in layer 1"):
            sparse_transformers.configure(model, top_k=top_k, selector=selector)
    if "blocks" not in selector:
        past, made = transformers.DynamicCache(config=model.config), []
        for t in range(LENGTH):
            made.append(logits(model, ids(2)[:, t : t + 1], **cached(past)))
        close(torch.cat(made, 1), whole)


@pytest.mark.parametrize(
    "options", [{"top_k": 6, "sinks": 1, "window": 2}, {"top_k": 192, "selector": "blocks"}]
)
def test_packed_documents(options):
    """Each is what it is alone."""
    ours = llama(num_hidden_layers=4, max_position_embeddings=512)
    sparse_transformers.configure(ours, reuse=2, **options)
    tokens, lengths = ids(1, 500), [220, 280]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(ours, tokens, position_ids=positions, use_cache=False)
    alone = torch.cat([logits(ours, part) for part in tokens.split(lengths, 1)], 1)
    close(packed, alone)


def test_gradients():
    ours, theirs = both(top_k=6)
    found = []
    for model in (ours.train(), theirs.train()):
        model(input_ids=ids(), labels=ids()).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        close(mine, other)
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    loss = ours(input_ids=ids(), labels=ids()).loss
    with pytest.raises(
        ValueError, match=r"layer 3 reuses the selection of layer 2, .*gradient checkpointing"
    ):
        loss.backward()


def test_saved_copied_and_in_threads(tmp_path):
    ours, _ = both(top_k=6)
    whole = logits(ours, ids())
    ours.save_pretrained(tmp_path)
    sparse_transformers.register()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.sparse_attn_reuse == [[0, 1], [2, 3], [4]]
    assert torch.equal(logits(again, ids()), whole)
    assert torch.equal(logits(copy.deepcopy(ours), ids()), whole)
    found: dict[int, torch.Tensor] = {}

    def run(n: int) -> None:
        for _ in range(5):
            found[n] = logits(ours, ids(1, 10 + n))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, said in found.items():
        assert torch.equal(said, logits(ours, ids(1, 10 + n)))


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_k": 8, "window": 4, "sinks": 2, "share": "all"}])
def test_one_graph(options):
    torch._dynamo.reset()
    ours = sparse_transformers.configure(llama(), reuse=2, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for mask in (None, padding("left")):
        close(logits(compiled, ids(), mask), logits(ours, ids(), mask))
    # Layers that are graphs of their own, the second of them eager.
    broken = copy.deepcopy(ours)
    attention = broken.model.layers[0].self_attn
    attention.forward = torch.compile(attention.forward, fullgraph=True, backend="eager")
    close(logits(broken, ids()), logits(ours, ids()))
    past = transformers.StaticCache(config=ours.config, max_cache_len=LENGTH)
    made = [logits(ours, ids()[:, :10], **cached(past))]
    for t in range(10, 12):
        made.append(logits(compiled, ids()[:, t : t + 1], **cached(past)))
    close(torch.cat(made, 1), logits(ours, ids()[:, :12]))
    assert not [name for name in vars(ours.config) if name.startswith(reuse._ATTRIBUTE)]
    torch._dynamo.reset()


class TestRefusals:
    def test_arguments(self):
        model = llama()
        for wrong, kind, match in (
            (0, ValueError, "reuse must be at least 1, got 0"),
            ("2", TypeError, "reuse must be an int"),
            (True, TypeError, "reuse must be an int"),
            ([0, 7], ValueError, r"numbers of sparse layers \(0, 1\), got 7"),
            ([1], ValueError, "begin with the first sparse layer, 0, got 1"),
            ([], ValueError, "begin with the first sparse layer, 0, got none"),
        ):
            with pytest.raises(kind, match=match):
                sparse_transformers.configure(model, top_k=4, reuse=wrong)
        assert not hasattr(model.config, "sparse_attn_reuse")
        sparse_transformers.configure(model, top_k=4).config.sparse_attn_reuse = 2
        with pytest.raises(ValueError, match=r"must be lists of numbers of layers, .* got 2"):
            logits(model, ids())

    def test_layers_of_several_kinds(self):
        shape = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
        model = small(transformers.Gemma2Config, num_hidden_layers=4, head_dim=8, **shape)
        with pytest.raises(
            ValueError, match="layers 0 and 1 cannot have one selection, the sliding window of"
        ):
            sparse_transformers.configure(model, top_k=4, reuse=2)
        sparse_transformers.configure(model, top_k=4, reuse=2, layers=[1, 3])
        assert logits(model, ids()).shape[1] == LENGTH

    def test_several_attentions_in_a_layer(self):
        config = transformers.BartConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        )  # fmt: skip
        with pytest.raises(TypeError, match="one attention module per layer"):
            sparse_transformers.configure(transformers.BartModel(config), top_k=4, reuse=2)

    def layers_of(self, share="none"):
        """(layers, calls the attention of one of them)."""
        ours = sparse_transformers.configure(llama(), top_k=4, reuse=2, share=share)
        layers = [layer.self_attn for layer in ours.model.layers]

        def attend(number, heads=6, key_heads=2, keys=20, mask=None):
            query = torch.randn(1, heads, 20, 8)
            key = torch.randn(1, key_heads, keys, 8)
            return sparse_transformers.attention_forward(layers[number], query, key, key, mask)[0]

        return attend

    def test_what_was_chosen_for_others(self):
        attend = self.layers_of()
        with pytest.raises(ValueError, match="layer 1 reuses the selection of layer 0, which has made none"):
            attend(1)
        seen = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        for other in ({"keys": 24}, {"mask": seen}):
            attend(0)
            with pytest.raises(
                ValueError, match="layer 1 cannot reuse the selection of layer 0: it sees other"
            ):
                attend(1, **other)
        attend(0, mask=seen)
        attend(1, mask=seen)
        attend(0)
        with pytest.raises(
            ValueError, match="it has 4 query and 2 key heads, the other 6 and 2: share='all'"
        ):
            attend(1, heads=4)
        attend = self.layers_of("all")
        attend(0)
        assert attend(1, heads=4).shape == (1, 20, 4, 8)

    def test_elsewhere(self):
        model = sparse_transformers.configure(llama(), top_k=4, reuse=2)
        layer, options = model.model.layers[0].self_attn, options_of(model.config)
        tensor = torch.randn(1, 6, 4, 8)
        with pytest.raises(NotImplementedError, match="selects in every layer: reuse=1"):
            parts.refuse(layer, tensor, tensor, None, True, {}, options, None)
        with pytest.raises(ValueError, match="continuous batching selects in every layer: reuse=1"):
            continuous.refuse(options)
