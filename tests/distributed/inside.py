"""context_parallel around functions of blocks and around models, against one process: nn and Hugging Face's."""

from __future__ import annotations

import pytest
import torch

import sparse_attn as sa
from distributed.whole import T, inputs, layouts
from distributed.world import check
from sparse_attn.distributed import Layout, context_parallel


def tiled(size: int) -> dict[str, Layout]:
    """Layouts of 130 positions whose ranges begin at multiples of 16."""
    lengths = [48, 0, 32, 50] if size == 4 else [80, 50]
    ends = [16, 32, 64, 80, 96, 112, 128][: 2 * size - 1]
    chunks = list(zip([0, *ends], [*ends, 130], strict=True))
    crossed = Layout(tuple((chunks[r], chunks[-1 - r]) for r in range(size)))
    return {"uneven": Layout.contiguous(lengths), "crossed": crossed}


@check
def blocks_of_keys(rank, size):
    """Chosen for tiles of queries that no boundary splits; refined; attended to, with gradients."""
    tensors = inputs(queries=130, keys=130)
    sizes = {"block_size": 16, "query_tile": 16}
    for layout in tiled(size).values():
        here = [layout.local(t, rank, 2) for t in tensors]
        for options in (
            {"is_causal": True}, {}, {"is_causal": True, "pool": "bound", "share": "kv"}, {"share": "all"}
        ):  # fmt: skip
            visible = {"is_causal": options.get("is_causal", False)}
            right = sa.block_select(*tensors[:2], 4, **sizes, **options)
            tiles = torch.arange(-(-130 // 16)).repeat_interleave(16)[:130]
            tiles = layout.local(tiles, rank, 0).unique()
            leaves, parts = ([t.clone().requires_grad_() for t in each] for each in (tensors, here))
            out, lse = sa.block_attention(*leaves, right, **sizes, **visible, return_lse=True)
            weights = torch.randn_like(out)
            ((out * weights).sum() + lse.sum()).backward()
            refined = sa.refine_blocks(
                *tensors[:2], right, 9, **sizes, **visible, share=options.get("share", "none")
            )
            with context_parallel(layout):
                found = sa.block_select(*here[:2], 4, **sizes, **options)
                ours, our_lse = sa.block_attention(*parts, found, **sizes, **visible, return_lse=True)
                again = sa.refine_blocks(
                    *here[:2], found, 9, **sizes, **visible, share=options.get("share", "none")
                )
            assert torch.equal(found, right[:, :, tiles])
            assert torch.equal(again, layout.local(refined, rank, 2))
            ((ours * layout.local(weights, rank, 2)).sum() + our_lse.sum()).backward()
            torch.testing.assert_close(ours, layout.local(out, rank, 2))
            torch.testing.assert_close(our_lse, layout.local(lse, rank, 2))
            for part, leaf in zip(parts, leaves, strict=True):
                torch.testing.assert_close(part.grad, layout.local(leaf.grad, rank, 2), rtol=1e-4, atol=1e-5)
    layout = Layout.even(130, size)
    query, key, value = (layout.local(t, rank, 2) for t in tensors)
    with context_parallel(layout), pytest.raises(ValueError, match="must begin at a multiple of 16, got one"):
        sa.block_select(query, key, 4, is_causal=True, **sizes)
    layout = tiled(size)["crossed"]
    query, key, value = (layout.local(t, rank, 2) for t in inputs(batch=1, queries=130, keys=130))
    with (
        context_parallel(layout, cu_seq=torch.tensor([0, 50, 130])),
        pytest.raises(NotImplementedError, match="no key_starts and no documents"),
    ):
        sa.block_select(query, key, 4, is_causal=True, **sizes)
    with context_parallel(layout):
        with pytest.raises(NotImplementedError, match="does not know whose positions"):
            sa.block_select(query, key, 4, is_causal=True, causal_offset=3, **sizes)
        with pytest.raises(NotImplementedError, match="Hierarchical does not work inside"):
            sa.selection.Hierarchical().select(query, key, 64, sa.selection.Rule(is_causal=True))


@check
def inside_a_model(rank, size):
    """nn.TopKAttention under context_parallel, parameters' gradients summed: those of one process."""
    torch.manual_seed(1)
    indexer = sa.nn.Indexer(32)
    for options in (
        {},
        {"share": "all", "num_kv_heads": 2},
        {"selector": indexer},
        {"selector": sa.selection.Rounded()},
    ):
        attention = sa.nn.TopKAttention(32, 4, 6, window=2, sinks=1, **options)
        hidden, weights = torch.randn(2, T, 32), torch.randn(2, T, 32)
        out = attention(hidden)
        (out * weights).sum().backward()
        right = [p.grad for p in attention.parameters() if p.grad is not None]
        attention.zero_grad()
        for layout, way in (
            (Layout.zigzag(T, size), "gather"),
            (Layout.even(T, size), "merge"),
            (Layout.zigzag(T, size), "index"),
            (Layout.zigzag(T, size), "fetch"),
        ):
            if way in ("merge", "index") and "share" in options:
                continue
            with context_parallel(layout, way=way):
                ours = attention(layout.local(hidden, rank, 1))
                (ours * layout.local(weights, rank, 1)).sum().backward()
            torch.testing.assert_close(ours, layout.local(out, rank, 1), rtol=1e-5, atol=1e-5)
            for p, grad in zip((p for p in attention.parameters() if p.grad is not None), right, strict=True):
                torch.distributed.all_reduce(p.grad)
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)
            attention.zero_grad()


@check
def blocks_inside_a_model(rank, size):
    torch.manual_seed(1)
    blocks = sa.selection.Blocks(16, 16)
    for selector in (blocks, sa.selection.Refined(2, blocks)):
        attention = sa.nn.TopKAttention(32, 4, 48, num_kv_heads=2, selector=selector)
        hidden, weights = torch.randn(2, 130, 32), torch.randn(2, 130, 32)
        out = attention(hidden)
        (out * weights).sum().backward()
        right = [p.grad for p in attention.parameters()]
        attention.zero_grad()
        layout = tiled(size)["crossed"]
        with context_parallel(layout):
            ours = attention(layout.local(hidden, rank, 1))
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(out, rank, 1), rtol=1e-5, atol=1e-5)
        for p, grad in zip(attention.parameters(), right, strict=True):
            torch.distributed.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@check
def a_hugging_face_model(rank, size):
    """Its layers on parts of a sequence: logits and gradients of one process; what cannot be is a sentence."""
    if size > 2:  # two show it, and four would import transformers twice as often
        return
    transformers = pytest.importorskip("transformers")
    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, head_dim=8, **shape)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(40)[None] * 7 % 50
    cu_seq = torch.tensor([0, 11, 12, 40])
    places = torch.cat([torch.arange(int(n)) for n in cu_seq.diff()])
    weights = torch.randn(1, 40, 50)

    def here(layout, positions):
        at = {"position_ids": layout.local(positions, rank, 0)[None]}
        part = layout.local(ids, rank, 1)
        return model(part, attention_mask=torch.ones_like(part), **at).logits

    def gradients():
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    kinds = (
        ({"share": "none"}, "zigzag", "gather", None),
        ({"share": "kv", "window": 3, "sinks": 1}, "uneven", "gather", None),
        ({"selector": "int8"}, "zigzag", "fetch", None), ({"residual": True}, "zigzag", "gather", None),
        ({"share": "none", "sinks": 2}, "even", "merge", cu_seq),
        ({"share": "none", "sinks": 2}, "even", "index", cu_seq),
        ({"selector": "indexer"}, "zigzag", "fetch", cu_seq),
        ({"selector": "low_rank"}, "zigzag", "fetch", cu_seq),
        ({"top_k": 64}, "even", "gather", None),
    )  # fmt: skip
    for options, layout, way, documents in kinds:
        if options.get("selector") == "indexer":
            integration.add_indexers(model)
        if options.get("selector") == "low_rank":
            integration.fit_low_rank(model, [ids], rank=4)
        integration.configure(model, **{"top_k": 6, **options})
        positions = torch.arange(40) if documents is None else places
        right = model(ids, position_ids=positions[None]).logits
        (right * weights).sum().backward()
        wanted = gradients()
        layout = layouts(40, size)[layout]
        with context_parallel(layout, way=way, cu_seq=documents):
            ours = here(layout, positions)
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5, msg=str(options))
        for grad, all_grad in zip(gradients(), wanted, strict=True):
            torch.distributed.all_reduce(grad)
            torch.testing.assert_close(grad, all_grad, rtol=1e-3, atol=1e-4, msg=str(options))

    layout = Layout.zigzag(40, size)
    part, positions = layout.local(ids, rank, 1), layout.positions(rank)[None]
    ones = torch.ones_like(part)
    plain = {"attention_mask": ones, "position_ids": positions}
    padded = torch.arange(20)[None] >= 2
    apart, anew = torch.arange(20)[None] // 10 * 20 + torch.arange(20)[None], torch.arange(20)[None] % 10
    refused = (
        ({"top_k": None}, plain, "sparse in every layer"),
        ({"layers": [1]}, plain, "sparse in every layer"),
        ({}, {"position_ids": apart, "use_cache": False}, "attention_mask of ones"),
        ({}, {**plain, "attention_mask": padded}, "padding"),
        ({}, {**plain, "position_ids": anew}, "position_ids that begin anew"),
    )
    for options, given, words in refused:
        integration.configure(model, **{"top_k": 6, **options})
        with context_parallel(layout), pytest.raises(NotImplementedError, match=words):
            model(part, **given)
    integration.configure(model, top_k=6)
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    bounds = torch.tensor([0, 20], dtype=torch.int32)
    chosen = torch.zeros(1, 20, 3, dtype=torch.int32)
    for given, words in (
        ({"indices": chosen}, "takes no indices of a model's own, which LlamaAttention gives"),
        ({"is_causal": False}, "is causal, which LlamaAttention is not"),
        ({"cu_seq_lens_q": bounds}, "not by cu_seq_lens_q"),
        ({"cu_seq_lens_k": bounds}, "not by cu_seq_lens_q"),
    ):
        with context_parallel(layout), pytest.raises(NotImplementedError, match=words):
            integration.attention_forward(layer, query, key, key, None, **given)
    cache = transformers.DynamicCache()
    model(part[:, :3], past_key_values=cache)
    with (
        context_parallel(layout),
        pytest.raises(NotImplementedError, match="20 queries and 23 keys: no decoding"),
    ):
        model(part, past_key_values=cache, position_ids=positions, attention_mask=torch.ones(1, 23))
    with context_parallel(layout), pytest.raises(NotImplementedError, match="configure does not work inside"):
        integration.configure(model, top_k=6)

    # Whole blocks, and their best tokens: longer sequences, whose ranges begin at multiples of 64.
    ids, weights = torch.arange(256)[None] * 7 % 50, torch.randn(1, 256, 50)
    layout = Layout.zigzag(256, size)
    for selector in ("blocks", "refined_blocks"):
        integration.configure(model, top_k=192, selector=selector)
        right = model(ids).logits
        (right * weights).sum().backward()
        wanted = gradients()
        with context_parallel(layout):
            ours = here(layout, torch.arange(256))
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5, msg=selector)
        for grad, all_grad in zip(gradients(), wanted, strict=True):
            torch.distributed.all_reduce(grad)
            torch.testing.assert_close(grad, all_grad, rtol=1e-3, atol=1e-4, msg=selector)
    with (
        context_parallel(layout, cu_seq=torch.tensor([0, 100, 256])),
        pytest.raises(NotImplementedError, match="no documents"),
    ):
        here(layout, torch.arange(256))


@check
def inside_torch_context_parallel(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    length = 8 * size
    q, k, v = (t.contiguous() for t in inputs(queries=length, keys=length))
    right = sa.topk_attention(q, k, v, 4, is_causal=True)
    mesh = init_device_mesh("cpu", (size,))
    layout = Layout.zigzag(length, size)
    with torch_context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        with pytest.raises(
            NotImplementedError, match=r"sparse_attn.distributed.context_parallel inside it does"
        ):
            sa.topk_attention(q, k, v, 4, is_causal=True)
        with context_parallel(layout):
            ours = sa.topk_attention(q, k, v, 4, is_causal=True)
    torch.testing.assert_close(ours, layout.local(right, rank, 2))


@check
def a_hugging_face_model_inside_torch_context_parallel(rank, size):
    """As accelerate's context parallelism has it: torch splits the inputs, and knows no attention but its own."""
    if size > 2:
        return
    transformers = pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **shape))
    integration.configure(model, top_k=5)
    ids, positions, ones = torch.arange(32)[None] * 7 % 50, torch.arange(32)[None], torch.ones(1, 32)
    right = model(ids, position_ids=positions).logits
    layout = Layout.zigzag(32, size)
    buffers = [ids, positions, ones]
    with torch_context_parallel(init_device_mesh("cpu", (size,)), buffers=buffers, buffer_seq_dims=[1, 1, 1]):
        with pytest.raises(NotImplementedError, match="context_parallel inside it does"):
            model(ids, position_ids=positions, attention_mask=ones)
        with context_parallel(layout):
            ours = model(ids, position_ids=positions, attention_mask=ones).logits
    torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5)
