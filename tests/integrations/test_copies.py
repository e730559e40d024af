"""Copies, pickles and threads: each model and each cache speaks of itself alone, whatever was made from it."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import key_index as key_indices  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.models import SHAPE, cached, ids, llama  # noqa: E402

ORDER = torch.tensor([2, 0, 0])


def saved(thing):
    """Through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


@pytest.fixture(autouse=True)
def indices_of_any_length(monkeypatch):
    monkeypatch.setattr(key_indices, "LEAST_KEYS", 1)


def exact(**options):
    return sparse_transformers.configure(llama(), top_k=6, **options)


def indexed():
    torch.manual_seed(0)
    model = sparse_transformers.add_indexers(llama(), num_heads=2, head_dim=8)
    return sparse_transformers.configure(model, top_k=6, selector="indexer")


MODELS = {"exact": exact, "indexer": indexed}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
each_cache = pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])


def cache(model, kind="dynamic"):
    if kind == "lazy":  # its layers come with their first keys
        return transformers.DynamicCache()
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=40)
    return transformers.DynamicCache(config=model.config)


def step(model, tokens, past):
    with torch.no_grad():
        return model(input_ids=tokens, **cached(past)).logits


def filled(model, kind="dynamic", tokens=None):
    past = cache(model, kind)
    step(model, ids() if tokens is None else tokens, past)
    return past


CHANGES = {
    "reorder_cache": lambda past: past.reorder_cache(ORDER),
    "reorder_cache of each layer": lambda past: [layer.reorder_cache(ORDER) for layer in past.layers],
    "batch_repeat_interleave": lambda past: past.batch_repeat_interleave(2),
    "batch_select_indices": lambda past: past.batch_select_indices(torch.tensor([1, 2])),
    "crop": lambda past: past.crop(-9),
}


@each_cache
@each_copy
@each_model
@pytest.mark.parametrize("change", CHANGES)
def test_a_copied_cache_goes_its_own_way(make, copied, kind, change):
    """What is done to a copy is done to no other, and the original's changes do not reach it."""
    if kind == "static" and change.startswith("batch"):
        pytest.skip("static caches do not have it")
    model = make()
    past, fresh = filled(model, kind), filled(model, kind)
    other = copied(past)
    CHANGES[change](other)
    CHANGES[change](fresh)
    batch = {"batch_repeat_interleave": 6, "batch_select_indices": 2}.get(change, 3)
    tokens = ids(batch)[:, :1]
    assert torch.equal(step(model, tokens, other), step(model, tokens, fresh))
    assert torch.equal(step(model, ids()[:, :1], past), step(model, ids()[:, :1], filled(model, kind)))


@each_model
def test_a_cache_that_is_emptied_and_filled_again(make):
    model, other = make(), ids().flip(1)
    past = filled(model)
    past.reset()
    step(model, other, past)
    assert torch.equal(
        step(model, ids()[:, :1], past), step(model, ids()[:, :1], filled(model, tokens=other))
    )


@pytest.mark.parametrize("by", ["another selector", "another model"])
def test_index_keys_of_what_a_cache_held_before(by):
    """Filled again by what makes none: old ones would choose keys that are gone."""
    model = indexed()
    past, filler = filled(model), model if by == "another selector" else exact()
    past.reset()
    filler.config.sparse_attn_selector = "exact"
    step(filler, ids().flip(1), past)
    model.config.sparse_attn_selector = "indexer"
    with pytest.raises(ValueError, match="24 keys of layer 0 but only 0 index keys"):
        step(model, ids()[:, :1], past)


@each_copy
@each_model
def test_a_copied_model(make, copied):
    """After calls with a cache; also where its attention has been another's since."""
    model = make()
    wanted = step(model, ids(), cache(model))
    past = filled(model)
    step(model, ids()[:, :1], past)
    assert torch.equal(step(copied(model), ids(), cache(model)), wanted)
    for change in (
        lambda: sparse_transformers.configure(model, top_k=10_000),
        lambda: sparse_transformers.configure(model, top_k=6, key_index=False),
        lambda: model.set_attn_implementation("sdpa"),
    ):
        change()
        assert torch.equal(step(copied(model), ids()[:, :1], copied(past)), step(model, ids()[:, :1], past))


def test_a_copy_without_indexers():
    model = indexed()
    wanted, other = step(model, ids(), cache(model)), copy.deepcopy(model)
    sparse_transformers.remove_indexers(other)
    assert len(sparse_transformers.indexers(model)) == 2
    assert torch.equal(step(model, ids(), cache(model)), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@each_model
def test_gradient_checkpointing(make, reentrant):
    model = make().train()

    def gradients():
        model.zero_grad()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())


def in_threads(*functions):
    """What each returns; the first error is raised here."""
    results, errors = [None] * len(functions), []

    def run(number):
        try:
            results[number] = functions[number]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return results


@each_model
def test_threads_share_a_model(make):
    """Each with a text and a cache of its own."""
    model = make()
    texts = [torch.randint(2, 64, (1, 60), generator=torch.Generator().manual_seed(s)) for s in range(4)]

    def generate(text):
        return [model.generate(text, max_new_tokens=8, do_sample=False) for _ in range(3)]

    wanted = [generate(text)[0] for text in texts]
    found = in_threads(*(lambda text=text: generate(text) for text in texts))
    for each, one in zip(found, wanted, strict=True):
        assert all(torch.equal(tokens, one) for tokens in each)


def test_threads_configure_models_of_their_own():
    before = set(transformers.AttentionInterface._global_mapping)

    def configure():
        for _ in range(5):
            exact(window=2, sinks=1)

    in_threads(*[configure] * 4)
    left = set(transformers.AttentionInterface._global_mapping) - before
    assert left <= {"sparse_attn"}


def test_configs():
    """Copies and pickles have this attention; configs of others, and classes of their own, stay as they are."""
    config = exact().config
    kind = type(config)

    class Other(kind):
        def to_dict(self):
            return {**super().to_dict(), "more": 1}

    class Without(kind):
        def to_dict(self):
            return {"model_type": "without"}

    assert "attn_implementation" not in llama().config.to_dict()
    for change in (copy.copy, copy.deepcopy, COPIES["pickle"], lambda c: kind.from_dict(c.to_dict())):
        assert change(config)._attn_implementation == "sparse_attn"
        assert change(config).to_dict() == config.to_dict()
    other = Other(**SHAPE)
    assert "attn_implementation" not in other.to_dict()
    other._attn_implementation = "sparse_attn"
    assert other.to_dict().items() >= {"more": 1, "attn_implementation": "sparse_attn"}.items()
    assert Without(**SHAPE).to_dict() == {"model_type": "without"}
    for _ in range(2):
        sparse_transformers.register()
    assert not hasattr(transformers.PreTrainedConfig.to_dict.__wrapped__, "__wrapped__")
