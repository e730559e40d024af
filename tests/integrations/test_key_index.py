"""Key indices beside the caches of Hugging Face models: the same tokens, and never an index of other keys."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import key_index as key_indices  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.ops.key_index import KeyIndex  # noqa: E402
from sparse_attn.wings import extension  # noqa: E402
from tests.integrations.models import cached, ids, llama, padding, small  # noqa: E402

pytestmark = pytest.mark.skipif(extension.module is None, reason="indices serve the CPU wing")
TOP_K = 6
STEPS = 12


@pytest.fixture(autouse=True)
def of_any_length(monkeypatch):
    monkeypatch.setattr(key_indices, "LEAST_KEYS", 1)


@pytest.fixture
def uses(monkeypatch):
    """Each use of an index: how many keys it knew. Its rows are compared with the keys that the call has."""
    seen = []
    check = KeyIndex.check

    def checked(index, key):
        check(index, key)
        error = (key.float() - _rows(index)).norm(dim=-1)
        assert bool((error <= index.bounds[:, :, :, 1].flatten(2)[:, :, : index.length]).all())
        seen.append(index.length)

    monkeypatch.setattr(KeyIndex, "check", checked)
    return seen


def _rows(index):
    numbers = (
        index.codes.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[..., : index.shift.shape[2]].float()
    )
    rows = numbers * index.bounds[:, :, :, 0].flatten(2).unsqueeze(-1) + index.shift.unsqueeze(2)
    return rows[:, :, : index.length]


def two(model=None, **options):
    """(the model with indices, without)."""
    model = llama() if model is None else model
    options = {"top_k": TOP_K, **options}
    with_index = sparse_transformers.configure(copy.deepcopy(model), **options)
    return with_index, sparse_transformers.configure(copy.deepcopy(model), key_index=False, **options)


def generated(model, tokens, **more):
    torch.manual_seed(0)
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    out = model.generate(tokens, **{**options, **more})
    return out.sequences, torch.stack([t.float() for t in out.logits])


def assert_same_generation(models, tokens, **more):
    ours, theirs = (generated(model, tokens, **more) for model in models)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])  # every logit, bit for bit


CACHES = [None, "static", "dynamic"]
OPTIONS = [{}, {"window": 3, "sinks": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(uses, cache, side, beams, options):
    models = two(**options)
    mask = padding(side) if side else torch.ones_like(ids())
    more = {"attention_mask": mask, "num_beams": beams, "cache_implementation": cache}
    assert_same_generation(models, ids(), **more)
    assert len(uses) >= 2 * (STEPS - 2)
    assert max(uses) == ids().shape[1] + STEPS - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(uses, dtype):
    assert_same_generation(two(llama().to(dtype)), ids(1))
    assert uses


@pytest.mark.parametrize("drafts", ["assistant", "prompt"])
def test_assisted_decoding(monkeypatch, uses, drafts):
    """Drafts of several tokens, and the cache cropped where they were wrong."""
    crop, cropped = KeyIndex.crop, []
    monkeypatch.setattr(KeyIndex, "crop", lambda i, n: cropped.append(n < i.length) or crop(i, n))
    models = two()
    more = (
        {"assistant_model": llama(num_hidden_layers=1)}
        if drafts == "assistant"
        else {"prompt_lookup_num_tokens": 3}
    )
    assert_same_generation(models, ids(1), **more)
    assert uses
    assert any(cropped)


def test_sampling_and_contrast(uses):
    assert_same_generation(two(), ids(2), do_sample=True, num_return_sequences=2, temperature=0.9)
    assert uses


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("MistralConfig", {"sliding_window": 30}),
        ("MistralConfig", {"sliding_window": 10}),
        ("Gemma2Config", {"sliding_window": 30, "head_dim": 8, "attn_logit_softcapping": 20.0}),
        ("JambaConfig", {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
                         "use_mamba_kernels": False}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cache", [None, "static"])
def test_sliding_windows_and_hybrids(uses, config, more, cache):
    models = two(small(getattr(transformers, config), **more))
    assert_same_generation(models, ids(2), cache_implementation=cache)


def test_sliding_window_that_is_not_full(uses):
    models = two(small(transformers.MistralConfig, sliding_window=60))
    assert_same_generation(models, ids(2))
    assert uses


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder(uses, beams):
    shape = {"d_model": 48, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 6, "decoder_attention_heads": 6, "vocab_size": 64, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None, "decoder_start_token_id": 1,
             "max_position_embeddings": 128}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape)).eval()
    models = two(model)
    mask = padding("right")
    assert_same_generation(models, ids(), attention_mask=mask, num_beams=beams)
    assert uses
    assert ids().shape[1] in uses  # cross-attention


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU")
def test_offloaded(uses):
    assert_same_generation([m.cuda() for m in two()], ids(1).cuda(), cache_implementation="offloaded")


def test_quantized_caches_have_none(uses):
    quantized = getattr(transformers.cache_utils, "Fp8QuantizedLayer", None)
    if quantized is None:
        pytest.skip("this transformers has no cache that is quantized without another package")

    def steps(model):
        cache = transformers.cache_utils.Cache(layers=[quantized() for _ in range(2)])
        return _decode(model, cache, ids(1), range(16, 24))

    ours, theirs = (steps(model) for model in two())
    assert torch.equal(ours, theirs)
    assert not uses


def _decode(model, cache, tokens, steps, first=16, change=None):
    """Logits of a prefill and of single steps; `change(cache, step)` happens between them."""
    parts = []
    with torch.no_grad():
        if first:
            model(input_ids=tokens[:, :first], **cached(cache))
        for step in steps:
            if change is not None:
                tokens = change(cache, step, tokens)
            at = torch.full((len(tokens), 1), step)
            parts.append(model(input_ids=tokens[:, step : step + 1], position_ids=at, **cached(cache)).logits)
    return torch.cat([p.flatten() for p in parts])


def new_cache(kind, model):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=40)
    return transformers.DynamicCache(config=model.config)


def scaled(cache, step, tokens):
    """The keys changed in place."""
    if step == 20:
        for layer in cache.layers:
            layer.keys.mul_(-1.0)
    return tokens


def exchanged(cache, step, tokens):
    """Other keys of the same sizes."""
    if step == 20:
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)
    return tokens


def view_exchanged(cache, step, tokens):
    if step == 20:
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)[:, :, :]
    return tokens


def reordered(cache, step, tokens):
    """By the cache's own method, of which nobody tells."""
    if step in (19, 20):
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
    return tokens


def repeated(cache, step, tokens):
    if step == 19 and hasattr(cache.layers[0], "batch_repeat_interleave"):
        cache.batch_repeat_interleave(2)
        return tokens.repeat_interleave(2, 0)
    return tokens


def selected(cache, step, tokens):
    if step == 19 and hasattr(cache.layers[0], "batch_select_indices"):
        cache.batch_select_indices(torch.tensor([2, 1]))
        return tokens[[2, 1]]
    return tokens


def gone_without_notice(cache, step, tokens):
    """A key and value more, that no attention has seen."""
    if step == 20:
        for number, layer in enumerate(cache.layers):
            more = layer.keys[:, :, :1] * 3
            cache.update(more, more, number)
    return tokens


CHANGES = [None, scaled, exchanged, view_exchanged, reordered, repeated, selected, gone_without_notice]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_changes_between_steps(uses, kind, change):
    """What an index does not follow leaves none; it comes back where the cache goes on again."""
    ours, theirs = (
        _decode(model, new_cache(kind, model), ids(), range(16, 24), change=change) for model in two()
    )
    assert torch.equal(ours, theirs)
    assert len(uses) >= 2 * 4
    if change is None:
        assert uses == [length for length in range(17, 25) for _ in range(2)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_crop_and_reset(uses, kind):
    def steps(model):
        cache = new_cache(kind, model)
        parts = [_decode(model, cache, ids(), range(16, 22))]
        if hasattr(cache.layers[0], "crop"):
            cache.crop(-4)
            parts.append(_decode(model, cache, ids().flip(0), range(18, 24), first=0))
        cache.reset()
        parts.append(_decode(model, cache, ids().flip(0), range(16, 22)))
        return torch.cat(parts)

    ours, theirs = (steps(model) for model in two())
    assert torch.equal(ours, theirs)
    assert uses[::2] == [17, 18, 19, 20, 21, 22, 19, 20, 21, 22, 23, 24, 17, 18, 19, 20, 21, 22]


def test_a_cropped_index_is_cropped_not_made_again(monkeypatch, uses):
    made = []
    of = KeyIndex.of.__func__
    monkeypatch.setattr(
        KeyIndex, "of", classmethod(lambda *given, **more: made.append(1) or of(*given, **more))
    )
    model, _ = two()
    cache = new_cache("dynamic", model)
    _decode(model, cache, ids(), range(16, 22))
    cache.crop(-4)
    _decode(model, cache, ids(), range(18, 24), first=0)
    assert len(made) == 2  # once per layer


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_cache(uses, kind, copied):
    """A prompt's cache is copied for each answer."""

    def steps(model):
        cache = new_cache(kind, model)
        parts = [_decode(model, cache, ids(), range(16, 20))]
        again = copied(cache)
        parts.append(_decode(model, again, ids().flip(0), range(20, 24), first=0))
        parts.append(_decode(model, cache, ids(), range(20, 24), first=0))
        return torch.cat(parts)

    ours, theirs = (steps(model) for model in two())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_a_class_that_nobody_knows(uses, kind):
    base = transformers.StaticCache if kind == "static" else transformers.DynamicCache

    class Own(base):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            keys, values = super().update(keys, values, layer_idx, *args, **kwargs)
            return keys * 1.0, values

    def steps(model):
        more = {"max_cache_len": 40} if kind == "static" else {}
        return _decode(model, Own(config=model.config, **more), ids(1), range(16, 22))

    ours, theirs = (steps(model) for model in two())
    assert torch.equal(ours, theirs)
    assert not uses


def test_a_layer_with_an_update_of_its_own(uses):
    layer = transformers.cache_utils.DynamicLayer

    class Own(layer):
        def update(self, keys, values, *args, **kwargs):
            self.keys = self.keys if self.keys is None else self.keys.flip(2)
            return super().update(keys, values, *args, **kwargs)

    def steps(model):
        cache = transformers.cache_utils.Cache(layers=[Own() for _ in range(2)])
        return _decode(model, cache, ids(1), range(16, 22))

    ours, theirs = (steps(model) for model in two())
    assert torch.equal(ours, theirs)
    assert not uses


def test_inference_mode_has_none(uses):
    """There nobody counts the changes of a tensor."""
    models = two()
    with torch.inference_mode():
        assert_same_generation(models, ids(1))
    assert not uses


def test_options_that_need_none(uses):
    for options in ({"share": "all"}, {"selector": "int8"}, {"residual": True}, {"backend": "reference"}):
        assert_same_generation(two(**options), ids(1))
    assert not uses


def test_off(uses):
    model, off = two()
    generated(off, ids(1))
    assert not uses
    assert off.config.sparse_attn_key_index is False
    sparse_transformers.configure(model, top_k=TOP_K, key_index=False)
    generated(model, ids(1))
    assert not uses
    with pytest.raises(TypeError, match="key_index"):
        sparse_transformers.configure(model, top_k=TOP_K, key_index=1)


def test_a_model_that_was_only_loaded(uses, tmp_path):
    """`configure` is not needed, but for beams."""
    model, off = two()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_generation([loaded, off], ids(2))
    assert uses
    uses.clear()
    assert_same_generation([loaded, off], ids(2), num_beams=2)


def test_indices_go_with_their_cache():
    import gc

    model, _ = two()
    cache = new_cache("dynamic", model)
    gc.collect()  # those of other tests
    before = len(key_indices._kept)
    _decode(model, cache, ids(1), range(16, 20))
    assert len(key_indices._kept) == before + 2
    del cache
    gc.collect()
    assert len(key_indices._kept) == before


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_compiled_after_eager_steps(uses, kind):
    """Under torch.compile there are none, and none that have missed a step are used afterwards."""
    model, off = two()
    torch._dynamo.reset()

    def steps(model, compiled):
        cache = new_cache(kind, model)
        parts = [_decode(model, cache, ids(1), range(16, 19))]
        parts.append(_decode(compiled, cache, ids(1), range(19, 21), first=0))
        parts.append(_decode(model, cache, ids(1), range(21, 24), first=0))
        return torch.cat(parts)

    graph = torch.compile(model, fullgraph=True, backend="eager", dynamic=kind == "dynamic")
    torch.testing.assert_close(steps(model, graph), steps(off, off), rtol=1e-4, atol=1e-5)
    assert len(uses) >= 2 * 5
    torch._dynamo.reset()
