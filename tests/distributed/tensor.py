"""Tensor parallelism against one process: attention modules, a selection of all heads, Hugging Face's own plan."""

from __future__ import annotations

import copy
import os
import tempfile
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse_attn as sa
from distributed.world import check
from sparse_attn.distributed import AcrossRanks, count_bytes, tensor_parallel
from sparse_attn.selection import Blocks, Refined, Rounded, Rule

C, H, HKV, T = 32, 8, 4, 37


def make(**options):
    torch.manual_seed(2)
    attention = sa.nn.TopKAttention(C, H, 6, num_kv_heads=HKV, **options)
    if attention.sink_logits is not None:
        torch.nn.init.normal_(attention.sink_logits)
    return attention


def compare(one, ours, tolerance=1e-4):
    torch.manual_seed(6)
    hidden, weights = torch.randn(2, T, C), torch.randn(2, T, C)
    found = []
    for module in (one, ours):
        given = hidden.clone().requires_grad_()
        out = module(given)
        (out * weights).sum().backward()
        found.append((out, given.grad))
    torch.testing.assert_close(*reversed(found), rtol=tolerance, atol=tolerance)
    for a, b in zip(ours.parameters(), one.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
            continue
        grad = a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad
        torch.testing.assert_close(grad, b.grad, rtol=tolerance, atol=tolerance)


@check
def a_plan_of_the_users_own(rank, size):
    mesh, ours = init_device_mesh("cpu", (size,)), make()
    columns = dict.fromkeys(("qkv.query", "qkv.key", "qkv.value"), ColwiseParallel())
    compare(make(), parallelize_module(ours, mesh, {**columns, "out": RowwiseParallel()}))
    shared = parallelize_module(make(share="all"), mesh, {**columns, "out": RowwiseParallel()})
    with pytest.raises(
        ValueError, match=r"share='all' is one selection of all heads, and tensor parallelism has left"
    ):
        shared(torch.randn(1, 4, C))


@check
def modules(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    for options in (
        {"bias": True, "window": 2, "sinks": 1}, {"share": "kv"}, {"share": "all"},
        {"sink_logits": True, "softcap": 2.0}, {"share": "all", "sink_logits": True},
        {"selector": Rounded()},
        {"selector": Refined(2, Blocks(2, 2))}, {"selector": "all"}, {"selector": "kv"},
    ):  # fmt: skip
        one, ours = ({**options} for _ in range(2))
        for each in (one, ours):
            if options.get("selector") in ("all", "kv"):
                torch.manual_seed(7)
                each["selector"] = sa.nn.Indexer(C, 2, 8, groups={"all": 1, "kv": HKV}[options["selector"]])
        compare(make(**one), tensor_parallel(make(**ours), mesh))
    for way in ("rows", "masses"):
        compare(make(share="all", sinks=2), tensor_parallel(make(share="all", sinks=2), mesh, way=way))
    dense = make()
    dense.top_k = None
    ours = tensor_parallel(make(), mesh)
    ours.top_k = None
    compare(dense, ours)


@check
def one_selection_of_all_heads(rank, size):
    """Bit for bit that of one process, ties included."""
    torch.manual_seed(3)
    for make in (torch.randn, lambda *s: torch.randint(-2, 3, s).float()):
        query, key = make(2, H, T, 16), make(2, HKV, T, 16)
        own_query, own_key = query.chunk(size, 1)[rank], key.chunk(size, 1)[rank]
        logits = torch.randn(H)
        mask = torch.rand(2, 1, T, T) < 0.5
        for parts in (
            {"is_causal": True}, {"is_causal": True, "window": 2, "sinks": 2}, {"attn_mask": mask},
            {"key_lengths": torch.tensor([30, 5])}, {"key_starts": torch.randint(0, 20, (2, T))},
            {"is_causal": True, "softcap": 1.0, "sink_logits": logits},
        ):  # fmt: skip
            right = sa.topk_select(query, key, 7, share="all", **parts)
            if "sink_logits" in parts:
                parts["sink_logits"] = logits.chunk(size)[rank]
            rule = Rule(share="all", **parts)
            assert torch.equal(AcrossRanks().select(own_query, own_key, 7, rule).indices, right)
            if make is torch.randn:  # no ties that another order of sums could break
                assert torch.equal(
                    AcrossRanks(way="masses").select(own_query, own_key, 7, rule).indices, right
                )
        mine = AcrossRanks(way="rank", source=1).select(
            own_query, own_key, 7, Rule(share="all", is_causal=True)
        )
        first = query.chunk(size, 1)[1], key.chunk(size, 1)[1]
        assert torch.equal(mine.indices, sa.topk_select(*first, 7, share="all", is_causal=True))
    query, key = torch.randn(2, H, T, 16), torch.randn(2, HKV, T, 16)
    with torch.autocast("cpu", torch.bfloat16):
        right = sa.topk_select(query, key, 7, share="all")
        for way in ("rows", "masses"):
            found = AcrossRanks(way=way).select(
                query.chunk(size, 1)[rank], key.chunk(size, 1)[rank], 7, Rule(share="all")
            )
            assert torch.equal(found.indices, right)
    own_query, own_key = query.chunk(size, 1)[rank], key.chunk(size, 1)[rank]
    few = AcrossRanks().select(own_query[:, :, :1], own_key, 7, Rule(share="all"))  # fewer queries than ranks
    assert torch.equal(few.indices, sa.topk_select(query[:, :, :1], key, 7, share="all"))
    with count_bytes() as traffic:
        AcrossRanks(way="masses").select(own_query, own_key, 7, Rule(share="all"))
    assert traffic.sent == {"masses": int(2 * (size - 1) / size * 2 * T * T) * 4}


def scattered(tensor, size):
    """[B, H, T / n, D] of all heads → [B, H / n, T, D] of all positions, as Ulysses exchanges them."""
    parts = [torch.empty_like(p) for p in tensor.chunk(size, 1)]
    torch.distributed.all_to_all(parts, [p.contiguous() for p in tensor.chunk(size, 1)])
    return torch.cat(parts, 2)


@check
def heads_scattered(rank, size):
    """Ulysses: each rank's part of the positions becomes some heads of all; one selection stays one of all heads."""
    torch.manual_seed(4)
    length = 12 * size
    query, key, value = (torch.randn(2, h, length, 16) for h in (H, HKV, HKV))
    own = [scattered(t.chunk(size, 2)[rank], size) for t in (query, key, value)]
    for share in ("none", "kv", "all"):
        rule = Rule(is_causal=True, window=2, share=share)
        out, right = sa.topk_attention(
            query, key, value, 7, is_causal=True, window=2, share=share, return_indices=True
        )
        if share == "all":
            indices = AcrossRanks().select(*own[:2], 7, rule).indices
            assert torch.equal(indices, right)
        else:
            indices = sa.selection.Exact().select(*own[:2], 7, rule).indices
            assert torch.equal(indices, right.chunk(size, 1)[rank])
        ours = sa.gathered_attention(*own, indices)
        torch.testing.assert_close(ours, out.chunk(size, 1)[rank])


@check
def what_is_refused(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    three = sa.nn.TopKAttention(48, 6, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match=f"has 3 key heads and 6 query heads, which {size} ranks do not divide"
    ):
        tensor_parallel(three, mesh)
    assert not isinstance(three.qkv.query.weight, DTensor)
    with pytest.raises(ValueError, match="which Rounded would make of a rank's own"):
        tensor_parallel(make(share="all", selector=Rounded()), mesh)
    hybrid = sa.nn.HybridAttention(C, H, approximated_heads=[0], max_length=8)
    with pytest.raises(ValueError, match="networks of approximated heads"):
        tensor_parallel(hybrid, mesh)
    with pytest.raises(ValueError, match="share='all', got 'kv'"):
        AcrossRanks().select(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 2, Rule(share="kv"))


@check
def hugging_face(rank, size):
    """A model's own plan (tp_plan="auto", applied by torch), every selector: right, or a sentence."""
    if size > 2:  # two show it, and four would import transformers twice as often
        return
    transformers = pytest.importorskip("transformers")
    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.LlamaConfig(
        vocab_size=50, num_key_value_heads=4, head_dim=8, max_position_embeddings=512, **shape
    )
    one = transformers.LlamaForCausalLM(config).eval()
    ours = copy.deepcopy(one)
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {f"model.{n}": styles[s]() for n, s in config.base_model_tp_plan.items() if s in styles}
    assert "model.layers.*.self_attn.q_proj" in plan
    parallelize_module(ours, init_device_mesh("cpu", (size,)), plan)
    ids = torch.arange(300)[None] % 50

    configured = integration.configure

    def logits(model):
        found = model(ids).logits
        return found.full_tensor() if isinstance(found, DTensor) else found

    for options in (
        {"share": "none"}, {"share": "kv", "window": 8, "sinks": 2}, {"selector": "int8"}, {"residual": True},
        {"selector": "blocks", "top_k": 192}, {"selector": "refined_blocks", "top_k": 192},
        {"selector": "indexer"},
    ):  # fmt: skip
        options = {"top_k": 16, **options}
        for model in (one, ours):
            if options.get("selector") == "indexer":
                torch.manual_seed(9)
                integration.add_indexers(model, share="all")
            integration.configure(model, **options)
        with torch.no_grad():
            torch.testing.assert_close(logits(ours), logits(one), rtol=1e-3, atol=1e-4, msg=str(options))
    for model, selector in ((one, "exact"), (ours, AcrossRanks())):
        integration.configure(model, top_k=16, share="all", selector=selector)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), logits(one), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="share='all' needs all heads in one place"):
        configured(ours, top_k=16, share="all")(ids)
    # What transformers' Ulysses calls a layer with: some heads of the whole sequence.
    layer = one.model.layers[0].self_attn
    some = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    configured(one, top_k=16, share="all")
    with pytest.raises(ValueError, match=r"share='all' needs all heads in one place.*left 4 of 8 here"):
        integration.attention_forward(layer, *some, None)
    integration.remove_indexers(ours)
    integration.remove_indexers(one)
    integration.fit_low_rank(one, [ids], rank=4)
    configured(one, top_k=16, selector="low_rank")
    with pytest.raises(ValueError, match="selector='low_rank' has components for all of them"):
        integration.attention_forward(layer, *some, None)
    integration.add_indexers(ours, share="kv")
    with pytest.raises(ValueError, match="indexers with share='kv' choose for all of them"):
        configured(ours, top_k=16, selector="indexer")(ids)


@check
def a_checkpoint_loaded_by_its_plan(rank, size):
    """from_pretrained(tp_plan="auto"): each rank reads its part of the weights, and generates what one process does."""
    if size > 2:
        return
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads a plan by it")
    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=4, head_dim=8, **shape)
    ids = torch.arange(40)[None] % 50
    launched = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}  # as torchrun says them
    with tempfile.TemporaryDirectory() as own, mock.patch.dict(os.environ, launched):
        transformers.LlamaForCausalLM(config).save_pretrained(own)  # only rank 0 writes
        folders = [own]
        dist.broadcast_object_list(folders, 0)
        (folder,) = folders
        one = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
        mesh = init_device_mesh("cpu", (size,))
        ours = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).eval()
        dist.barrier()  # both have read it
    projection = ours.model.layers[0].self_attn.q_proj.weight
    assert isinstance(projection, DTensor)
    assert projection.to_local().shape == (64 // size, 64)
    for options in ({"share": "none"}, {"share": "kv", "window": 4, "sinks": 2}, {"share": "all"}):
        integration.configure(one, top_k=8, **options)
        whole = AcrossRanks() if options["share"] == "all" else "exact"
        integration.configure(ours, top_k=8, selector=whole, **options)
        with torch.no_grad():
            torch.testing.assert_close(
                ours(ids).logits, one(ids).logits, rtol=1e-3, atol=1e-4, msg=str(options)
            )
        said = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (ours, one)]
        assert torch.equal(*said), options
