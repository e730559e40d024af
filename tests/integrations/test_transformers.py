"""Top-k attention inside transformers models: small models of random weights, against their own SDPA."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch

import sparse_attn
from sparse_attn.selection import Selection

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LENGTH = 24


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def pair(top_k=10_000, model=None, **options):
    """The same weights with scaled_dot_product_attention and with ours."""
    dense = llama() if model is None else model
    dense.set_attn_implementation("sdpa")
    return dense, sparse_transformers.configure(copy.deepcopy(dense), top_k=top_k, **options)


@pytest.fixture
def no_shortcut(monkeypatch):
    """A budget that holds all keys goes to SDPA; here it has to go through our kernels."""
    monkeypatch.setattr(
        sparse_transformers, "_is_dense", lambda module, key, options: options["top_k"] is None
    )


def ids(batch=3, length=LENGTH):
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side, batch=3, length=LENGTH):
    mask = torch.ones((batch, length), dtype=torch.int64)
    for b in range(1, batch):
        where = slice(0, 4 * b) if side == "left" else slice(length - 4 * b, length)
        mask[b, where] = 0
    return mask


def cached(past):
    """The argument of a model that takes its key/value cache, by the name of this transformers version."""
    taken = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": past}


def logits(model, tokens, mask=None, **more):
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, **more).logits
    return out if mask is None else out[mask.bool()]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 3}, {"share": "all"}], ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_budget_of_all_keys_is_dense_attention(no_shortcut, side, options):
    dense, sparse = pair(**options)
    mask = padding(side) if side else None
    close(logits(sparse, ids(), mask), logits(dense, ids(), mask))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 3}], ids=str)
def test_generation_equals_dense_generation(no_shortcut, cache, side, options):
    dense, sparse = pair(**options)
    mask = padding(side) if side else torch.ones_like(ids())
    more = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    if cache == "static":
        more["cache_implementation"] = "static"
        more["disable_compile"] = True
    theirs = dense.generate(ids(), attention_mask=mask, **more)
    ours = sparse.generate(ids(), attention_mask=mask, **more)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(torch.stack(ours.scores), torch.stack(theirs.scores))


@pytest.mark.parametrize(
    "options", [{"top_k": 6}, {"top_k": 9, "window": 4, "sinks": 2, "share": "kv"}], ids=str
)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_equals_prefill_token_by_token(cache, side, options):
    _, sparse = pair(**options)
    tokens = ids()
    mask = padding(side) if side else torch.ones_like(tokens)
    kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
    past = kind(config=sparse.config) if cache == "dynamic" else kind(config=sparse.config, max_cache_len=40)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = 10  # prefill, then a token at a time
    steps = [slice(0, first)] + [slice(t, t + 1) for t in range(first, LENGTH)]
    with torch.no_grad():
        whole = sparse(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        pieces = [
            sparse(
                input_ids=tokens[:, step],
                attention_mask=mask[:, : step.stop],
                position_ids=positions[:, step],
                **cached(past),
            ).logits
            for step in steps
        ]
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_in_chunks_equals_prefill(padded):
    _, sparse = pair(top_k=7, window=3, sinks=2)
    tokens, mask = ids(), padding("left") if padded else torch.ones_like(ids())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = transformers.DynamicCache(config=sparse.config)
    with torch.no_grad():
        whole = sparse(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        pieces = [
            sparse(
                input_ids=tokens[:, a : a + 8],
                attention_mask=mask[:, : a + 8],
                position_ids=positions[:, a : a + 8],
                **cached(past),
            ).logits
            for a in range(0, LENGTH, 8)
        ]
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_padding_changes_nothing(side, share):
    _, sparse = pair(top_k=8, window=3, sinks=2, share=share)
    mask = padding(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batched = sparse(input_ids=ids(), attention_mask=mask, position_ids=positions).logits
        for b in range(3):
            alone = sparse(input_ids=ids()[b : b + 1, mask[b].bool()]).logits[0]
            close(batched[b, mask[b].bool()], alone)


def test_sparse_is_what_topk_attention_says(monkeypatch):
    calls = []

    def spy(query, key, value, top_k, selector, rule, **more):
        calls.append(rule)
        indices = sparse_attn.topk_select(query, key, top_k, **rule.arguments())
        return sparse_attn.gathered_attention(query, key, value, indices, scale=rule.scale)

    monkeypatch.setattr(sparse_transformers, "select_and_attend", spy)
    dense, sparse = pair(top_k=8, window=3, sinks=2, share="kv", layers=[1])
    assert not torch.allclose(logits(sparse, ids()), logits(dense, ids()), atol=1e-4)
    (rule,) = calls  # layer 0 is dense
    assert (rule.window, rule.sinks) == (3, 2)
    assert rule.share == "kv"
    assert rule.attn_mask is None


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


def test_options_may_change_between_calls():
    dense, sparse = pair(top_k=4)
    few = logits(sparse, ids())
    sparse.config.sparse_attn_top_k = 12
    assert not torch.allclose(logits(sparse, ids()), few, atol=1e-5)
    sparse.config.sparse_attn_top_k = None
    close(logits(sparse, ids()), logits(dense, ids()))


def test_options_are_saved_with_the_model(tmp_path):
    _, sparse = pair(top_k=8, window=2)
    sparse.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_attn")
    close(logits(loaded, ids()), logits(sparse, ids()))


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_equal_those_of_dense_attention(no_shortcut, residual):
    dense, sparse = pair(residual=residual)
    for model in (dense, sparse):
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
    for (name, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_no_mask_of_all_pairs_is_made():
    _, sparse = pair(top_k=8)
    mask = padding("left")
    made = sparse_transformers.attention_mask(
        batch_size=3,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=transformers.masking_utils.causal_mask_function,
        attention_mask=mask.bool(),
    )
    assert made.padding.numel() == 3 * LENGTH


def small(config_class, **more):
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_sliding_window_layers(no_shortcut):
    dense, sparse = pair(model=small(transformers.MistralConfig, sliding_window=8), window=4, sinks=1)
    for mask in (None, padding("left")):
        close(logits(sparse, ids(), mask), logits(dense, ids(), mask))


def test_packed_sequences(no_shortcut):
    dense, sparse = pair()
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    more = {"position_ids": positions, "use_cache": False}
    close(logits(sparse, ids(1), **more), logits(dense, ids(1), **more))


def test_gpt2(no_shortcut):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    dense, sparse = pair(model=transformers.GPT2LMHeadModel(config).eval())
    close(logits(sparse, ids(), padding("left")), logits(dense, ids(), padding("left")))


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17),
    reason="before 5.17 transformers' DeepSeek reads the mask as a tensor",
)
def test_a_selection_that_the_model_brings_itself():
    """DeepSeek's models choose the keys with an indexer of their own."""
    config = transformers.DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        mlp_layer_types=["dense", "dense"],
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs = logits(model, ids(2))
    theirs_padded = logits(model, ids(2), padding("left", 2))
    sparse_transformers.register()
    model.set_attn_implementation("sparse_attn")
    close(logits(model, ids(2)), theirs)
    close(logits(model, ids(2), padding("left", 2)), theirs_padded)


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    _, sparse = pair(top_k=6)
    compiled = torch.compile(sparse, dynamic=False)
    close(logits(compiled, ids()), logits(sparse, ids()))


class TestErrors:
    def test_no_budget(self):
        sparse_transformers.register()
        model = llama()
        model.set_attn_implementation("sparse_attn")
        with pytest.raises(
            ValueError, match=r"config\.sparse_attn_top_k is not set.*configure\(model, top_k=…\)"
        ):
            logits(model, ids())

    def test_dropout(self):
        _, sparse = pair(top_k=4, model=llama(attention_dropout=0.1))
        with pytest.raises(ValueError, match=r"no attention dropout, got dropout=0\.1"):
            sparse.train()(input_ids=ids())

    def test_softcap(self):
        config = transformers.Gemma2Config(**{**SHAPE, "head_dim": 8})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(ValueError, match="no softcap"):
            logits(sparse_transformers.configure(model, top_k=4), ids())

    def test_additive_mask(self):
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
        ],
    )
    def test_configure(self, options, error):
        with pytest.raises(ValueError, match=error):
            sparse_transformers.configure(llama(), **options)

    def test_not_a_model(self):
        with pytest.raises(TypeError, match="model must be a transformers model"):
            sparse_transformers.configure(torch.nn.Linear(2, 2), top_k=4)


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
        for where in (slice(0, 40), slice(250, 300)):
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

    def test_errors(self):
        with pytest.raises(ValueError, match="residual=True needs selector='exact', got 'int8'"):
            sparse_transformers.configure(llama(), top_k=6, selector="int8", residual=True)
        with pytest.raises(TypeError, match="residual"):
            sparse_transformers.configure(llama(), top_k=6, residual=1)
