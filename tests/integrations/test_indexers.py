"""Indexers inside transformers models: with caches and padding, trained, saved, loaded."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers import oracle

import sparse_attn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.distillation import distill_indexers  # noqa: E402
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from tests.integrations.architectures import MODELS  # noqa: E402
from tests.integrations.models import LENGTH, cached, close, ids, llama, padding, positions_of  # noqa: E402


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def indexed(top_k=6, share="all", seed=0, **options):
    torch.manual_seed(seed)
    model = sparse_transformers.add_indexers(llama(), num_heads=2, head_dim=8, share=share)
    return sparse_transformers.configure(model, top_k=top_k, selector="indexer", **options)


@pytest.mark.parametrize("share", ["all", "kv"])
def test_the_layer_attends_to_what_its_indexer_selects(monkeypatch, share):
    seen, attend = [], sparse_attn.ops.gathered_attention.attend

    def spy(query, key, value, indices, **more):
        seen.append(indices)
        return attend(query, key, value, indices, **more)

    monkeypatch.setattr(sparse_attn.ops.gathered_attention, "attend", spy)
    model = indexed(window=2, sinks=1, share=share, layers=[0])
    captured = {}

    def capture(module, arguments, named):
        captured.update(named)

    model.model.layers[0].self_attn.register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids())
    (indices,) = seen
    indexer = sparse_transformers.indexers(model)[0]
    expected = indexer.select(
        captured["hidden_states"], 6, rope=captured["position_embeddings"], window=2, sinks=1
    )
    assert torch.equal(indices, expected)
    assert indices.shape == (3, 1 if share == "all" else 2, LENGTH, 6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("options", [{}, {"window": 3, "sinks": 2}], ids=str)
def test_decoding_equals_prefill_token_by_token(cache, side, options):
    model = indexed(**options)
    tokens = ids()
    mask = padding(side) if side else torch.ones_like(tokens)
    positions = positions_of(mask)
    past = (
        transformers.DynamicCache(config=model.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=40)
    )
    steps = [slice(0, 10)] + [slice(t, t + 1) for t in range(10, LENGTH)]
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        pieces = [
            model(
                input_ids=tokens[:, step],
                attention_mask=mask[:, : step.stop],
                position_ids=positions[:, step],
                **cached(past),
            ).logits
            for step in steps
        ]
    close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


def test_padding_changes_nothing():
    model = indexed(window=3, sinks=2)
    for side in ("left", "right"):
        mask = padding(side)
        with torch.no_grad():
            batched = model(input_ids=ids(), attention_mask=mask, position_ids=positions_of(mask)).logits
            for b in range(3):
                alone = model(input_ids=ids()[b : b + 1, mask[b].bool()]).logits[0]
                close(batched[b, mask[b].bool()], alone)


def test_beam_search_moves_the_index_keys_with_the_cache():
    model = indexed()
    more = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with torch.no_grad():
        cached = model.generate(ids(2), attention_mask=torch.ones_like(ids(2)), **more)
        fresh = model.generate(ids(2), attention_mask=torch.ones_like(ids(2)), use_cache=False, **more)
    assert torch.equal(cached, fresh)


def test_a_cropped_cache_goes_on():
    model = indexed()
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(), **cached(past))
        past.crop(-12)
        again = model(input_ids=ids()[:, 12:], **cached(past)).logits
        whole = model(input_ids=ids()).logits
    close(again, whole[:, 12:])


def test_a_cache_filled_without_the_indexers_is_refused():
    model = indexed()
    past = transformers.DynamicCache(config=model.config)
    model.config.sparse_attn_selector = "exact"
    with torch.no_grad():
        model(input_ids=ids(), **cached(past))
        model.config.sparse_attn_selector = "indexer"
        with pytest.raises(ValueError, match="24 keys of layer 0 but only 0 index keys"):
            model(input_ids=ids()[:, :1], **cached(past))


def test_a_cache_of_another_type_is_refused():
    class Keys:  # not one of transformers' caches, so the indexer cannot follow it
        def __init__(self):
            self.cache = transformers.DynamicCache()

        def __getattr__(self, name):
            return getattr(self.cache, name)

    model, past = indexed(), Keys()
    with torch.no_grad():
        model(input_ids=ids(), **cached(past))
        with pytest.raises(ValueError, match=r"has 1 index keys for 25 keys: .* no transformers\.Cache"):
            model(input_ids=ids()[:, :1], **cached(past))


def test_int8_selection_is_near_exact_selection():
    model = sparse_transformers.configure(llama(), top_k=8)
    with torch.no_grad():
        exact = model(input_ids=ids()).logits
        sparse_transformers.configure(model, top_k=8, selector="int8")
        rounded = model(input_ids=ids()).logits
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().mean() < 0.1 * exact.std()


def test_files_that_hold_no_indexers_change_nothing(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, target = tmp_path / "indexers.safetensors", indexed(seed=4)
    sparse_transformers.save_indexers(indexed(seed=3), path)
    whole, before = path.read_bytes(), copies(target)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = {"0": [2, 8, 1], "1": [2, 8, 1]}

    def write(tensors=tensors, sizes=sizes):
        text = sizes if isinstance(sizes, str) else json.dumps(sizes)
        save_file(tensors, path, metadata={"sparse_attn_indexers": text})

    def without(name):
        return {key: tensor for key, tensor in tensors.items() if key != name}

    write()
    sparse_transformers.load_indexers(indexed(), path)
    for spoil in (
        lambda: path.write_bytes(whole[:-100]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:]),
        lambda: write(sizes="{"),
        lambda: write(sizes="[" * 100_000),
        lambda: write(sizes=[1]),
        lambda: write(sizes={"0": [2, 8, 1], "1": [2, 8]}),
        lambda: write(sizes={"0": [2, 8, 1], "1": [2, "8", 1]}),
        lambda: write(sizes={"0": [2, 8, 1], "1": [1 << 40, 1 << 40, 1 << 40]}),
        lambda: write(sizes={"0": [2, 8, 1], "1": [1 << 20, 1 << 20, 1]}),
        lambda: write(sizes={"0": [2, 8, 1], "7": [2, 8, 1]}),
        lambda: write(sizes={"0": [2, 8, 1], "x": [2, 8, 1]}),
        lambda: write(without("1.key.weight")),
        lambda: write(without("1.weight.weight")),
        lambda: write({**tensors, "1.key.weight": torch.ones(3)}),
        lambda: write({**tensors, "1.weight.weight": torch.ones(3, 48)}),
        lambda: write({**tensors, "1.more": torch.ones(3)}),
    ):
        spoil()
        with pytest.raises(ValueError, match=r"indexers\.safetensors (holds no|has an) indexer"):
            sparse_transformers.load_indexers(target, path)
        assert_same(before, copies(target))
    with pytest.raises(OSError):
        sparse_transformers.load_indexers(target, tmp_path / "none")


def test_save_and_load(tmp_path):
    model = indexed(share="kv", seed=3)
    sparse_transformers.save_indexers(model, tmp_path / "indexers.safetensors")
    other = sparse_transformers.load_indexers(llama(), tmp_path / "indexers.safetensors")
    sparse_transformers.configure(other, top_k=6, selector="indexer")
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids()).logits, model(input_ids=ids()).logits)
    with pytest.raises(ValueError, match="which this model of 2 layers does not have"):
        sparse_transformers.load_indexers(llama(hidden_size=24), tmp_path / "indexers.safetensors")
    sparse_transformers.remove_indexers(other)
    assert not sparse_transformers.indexers(other)
    with pytest.raises(ValueError, match="needs an indexer in layer 0"):
        other(input_ids=ids())


class TestDistillation:
    def stream(self, count, seed=5):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(2, 64, (2, 32), generator=generator) for _ in range(count)]

    def model(self):
        torch.manual_seed(7)
        model = llama()
        with torch.no_grad():  # sharp attention: there is something to learn
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(30)
                layer.self_attn.k_proj.weight.mul_(30)
        return sparse_transformers.add_indexers(model, num_heads=4, head_dim=16)

    def recall(self, model):
        """Attention mass that the indexers' 4 keys of 32 hold, mean over layers."""
        held = []

        def look(module, arguments, named):
            hidden, rope = named["hidden_states"], named["position_embeddings"]
            indices = module.sparse_attn_indexer.select(hidden, 4, rope=rope)
            shape = (*hidden.shape[:2], -1, module.head_dim)
            query = module.q_proj(hidden).view(shape).transpose(1, 2)
            key = module.k_proj(hidden).view(shape).transpose(1, 2)
            query, key = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(query, key, *rope)
            _, some = sparse_attn.gathered_attention(query, key, key, indices, return_lse=True)
            _, full = sparse_attn.topk_attention(query, key, key, 32, is_causal=True, return_lse=True)
            held.append(float((some - full).exp()[:, :, 8:].mean()))

        layers = [layer.self_attn for layer in model.model.layers]
        hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
        with torch.no_grad():
            for tokens in self.stream(4, seed=99):
                model(input_ids=tokens)
        for hook in hooks:
            hook.remove()
        return sum(held) / len(held)

    def test_it_learns_and_leaves_the_model_alone(self):
        model = self.model()
        frozen = {n: p.clone() for n, p in model.named_parameters() if "indexer" not in n}
        before = self.recall(model)
        history = distill_indexers(model, self.stream(150), 150, top_k=8, learning_rate=5e-3)
        assert len(history) == 150
        assert self.recall(model) > before + 0.1
        for name, parameter in model.named_parameters():
            if "indexer" not in name:
                assert torch.equal(parameter, frozen[name])
                assert parameter.grad is None
        assert model.config._attn_implementation == "sdpa"

    def test_a_resumed_training_equals_an_uninterrupted_one(self, tmp_path):
        whole, parts = self.model(), self.model()
        parts.load_state_dict(whole.state_dict())
        options = {"top_k": 8, "dense_steps": 4, "queries": 10, "updates": 2, "save_every": 2}
        expected = distill_indexers(whole, self.stream(8), 8, **options)
        file = tmp_path / "training.pt"

        def stop(step, *_):
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            distill_indexers(parts, self.stream(8), 8, checkpoint=file, progress=stop, **options)
        history = distill_indexers(parts, self.stream(8), 8, checkpoint=file, **options)
        assert history == expected
        for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_more_updates_a_step_learn_more_from_as_many_sequences(self):
        losses = []
        for updates in (1, 6):
            model = self.model()
            history = distill_indexers(
                model, self.stream(20), 20, dense_steps=20, queries=8, updates=updates, learning_rate=5e-3
            )
            assert len(history) == 20
            losses.append(sum(history[-4:]))
        assert losses[1] < losses[0]
        with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
            distill_indexers(self.model(), self.stream(1), 1, updates=0)

    def test_a_checkpoint_that_does_not_fit_changes_nothing(self, tmp_path):
        model, file = self.model(), tmp_path / "training.pt"
        options = {"top_k": 8, "checkpoint": file}
        distill_indexers(model, self.stream(2), 2, **options)
        good, before = torch.load(file, weights_only=True), copies(model)

        def changed(change):
            bad = copy.deepcopy(good)
            change(bad)
            return bad

        last = max(good["indexers"])
        bad = [
            [1, 2],
            changed(lambda state: state.pop("history")),
            changed(lambda state: state["history"].append("x")),
            changed(lambda state: state["indexers"].pop(last)),
            changed(lambda state: state["indexers"][last].pop("key.weight")),
            changed(lambda state: state["indexers"][last].update({"weight.weight": torch.ones(3)})),
            changed(lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3))),
            changed(lambda state: state["optimizer"].pop("param_groups")),
        ]
        for state in bad:
            if isinstance(state, dict):  # what could be loaded is another's
                for tensors in state.get("indexers", {}).values():
                    for tensor in tensors.values():
                        tensor.fill_(7)
            torch.save(state, file)
            with pytest.raises(ValueError, match=r"training\.pt holds no checkpoint of these indexers: "):
                distill_indexers(model, self.stream(3), 3, **options)
            assert_same(before, copies(model))
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(ValueError, match=r"training\.pt holds no checkpoint of these indexers: "):
            distill_indexers(model, self.stream(3), 3, **options)

    def test_gradients_are_kept_as_they_were(self):
        model = self.model()
        parameter = next(sparse_transformers.indexers(model)[0].parameters()).requires_grad_()
        parameter.grad = torch.ones_like(parameter)

        def stop(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            distill_indexers(model, self.stream(2), 2, top_k=8, progress=stop)
        assert parameter.requires_grad
        assert bool((parameter.grad == 1).all())
        others = [p for i in sparse_transformers.indexers(model).values() for p in i.parameters()][1:]
        assert not any(p.requires_grad or p.grad is not None for p in others)

    @pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "gpt-oss"])
    @pytest.mark.parametrize("queries", [None, 9])
    def test_the_lesson_is_the_models_own_attention(self, name, queries):
        """Soft caps, sinks and sliding windows included: against what eager attention says of itself."""
        torch.manual_seed(3)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith(("q_proj.weight", "k_proj.weight", "sinks")):
                    p.normal_(std=0.3)
        sparse_transformers.add_indexers(model, num_heads=2, head_dim=8)
        tokens, captured = ids(2), {}

        def capture(module, arguments, named):
            captured[module.layer_idx] = named["hidden_states"], named["position_embeddings"]

        layers = sparse_transformers.indexers(model)
        hooks = [
            layer.self_attn.register_forward_pre_hook(capture, with_kwargs=True)
            for layer in model.model.layers
        ]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
        for hook in hooks:
            hook.remove()
        first, expected = 0, []
        if queries is not None:
            first = int(torch.randint(LENGTH - queries + 1, (), generator=torch.Generator().manual_seed(0)))
        rows = slice(first, first + (queries or LENGTH))
        for number, indexer in layers.items():
            hidden, rope = captured[number]
            mass = weights[number].double().mean(1)
            seen = mass > 0
            with torch.no_grad():
                query, of_heads = indexer.queries(hidden, rope)
                guess = oracle.indexer_scores(query, indexer.keys(hidden, rope), of_heads)[:, 0]
            mass = (mass / mass.sum(-1, keepdim=True))[:, rows]
            log = guess.masked_fill(~seen, -torch.inf).log_softmax(-1)[:, rows]
            expected.append(torch.where(mass > 0, mass * (mass.log() - log), 0.0).sum(-1))
            if queries is not None:
                break  # the next layer draws another run of queries
        model.set_attn_implementation("sdpa" if name in ("Llama", "Mistral") else "eager")
        if queries is not None:
            for layer in model.model.layers[1:]:
                sparse_transformers.remove_indexers(layer)
        (found,) = distill_indexers(model, [tokens], 1, top_k=4, dense_steps=1, queries=queries)
        assert found == pytest.approx(float(torch.stack(expected).mean((1, 2)).mean()), rel=1e-4)
        assert math.isfinite(distill_indexers(model, [tokens], 1, top_k=4, dense_steps=0)[0])

    def test_errors(self):
        with pytest.raises(ValueError, match="no indexers to train"):
            distill_indexers(llama(), self.stream(1), 1)
        with pytest.raises(ValueError, match="one batch per step, 3, got 2"):
            distill_indexers(self.model(), self.stream(2), 3, top_k=4)
        with pytest.raises(TypeError, match=r"token ids, int64 \[B, T\]"):
            distill_indexers(self.model(), [torch.zeros(2, 3)], 1, top_k=4)
