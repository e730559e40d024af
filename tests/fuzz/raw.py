"""Calls of `torch.ops.sparse_attn.<op>.cpu` with arguments that Python would not let through: refused, or of no harm.

A right call, of which one or two arguments are then spoiled. What the process dies of is a failure, and so is a wrong
dtype, a tensor on another device or a rule of another length that is taken without a word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers.embeddings import make_tables
from helpers.inputs import index_rows, normal
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparse_attn
from fuzz.case import VIEWS, Case, Draw, Fuzzed, bits, fuzzed

INTEGERS = (-1, 0, 1, 2, 7, 2**31, -(2**31) - 1, 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e300)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
RULES = ([0, 0, 0, 0, 4], [1, 4, 2, 1, 2], [1, 4, 0, 0, 1])


def attention(draw: Draw) -> list[Tensor]:
    """query [2, 4, 5, 6], key [2, 2, 9, 6], value [2, 2, 9, 3]."""
    dtype = draw.choice(FLOAT_DTYPES)
    return [normal(*shape, dtype=dtype) for shape in ((2, 4, 5, 6), (2, 2, 9, 6), (2, 2, 9, 3))]


def rule(draw: Draw, *, numbers: list[int] | None = None, masked: bool = True) -> list:
    numbers = list(numbers or draw.choice(RULES))
    mask = torch.ones(2, numbers[4], 5, 9, dtype=torch.bool) if masked and draw.random() < 0.3 else None
    lengths = (
        torch.tensor([9, 4], dtype=draw.choice((torch.int32, torch.int64))) if draw.random() < 0.3 else None
    )
    starts = torch.arange(10).view(2, 5) if draw.random() < 0.3 else None
    offsets = torch.arange(10).view(2, 5).flip(1) if draw.random() < 0.3 else None
    return [mask, lengths, starts, offsets, numbers, *scoring(draw)]


def scoring(draw: Draw) -> list:
    """scale, softcap and sink_logits [4]."""
    return [0.3, draw.choice((0.0, 2.0)), torch.arange(4.0) if draw.random() < 0.3 else None]


def select(draw: Draw) -> list:
    query, key, _ = attention(draw)
    arguments = rule(draw)
    blocks = index_rows((2, arguments[4][4], 3, 2), 3) if draw.random() < 0.5 else None
    return [query, key, 4, *arguments, draw.random() < 0.3, blocks, 4, 2]


def attend(draw: Draw) -> list:
    return [*attention(draw), 4, *rule(draw)]


def gathered(draw: Draw) -> list:
    return [*attention(draw), index_rows((2, draw.choice((1, 2, 4)), 5, 3), 9, garbage=True), *scoring(draw)]


def gradients(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 4, 5, 3, dtype=query.dtype), normal(2, 4, 5), normal(2, 4, 5)


def bits_backward(draw: Draw) -> list:
    query, key, value, _, scale, softcap, sinks = gathered(draw)
    grad_out, grad_lse, lse = gradients(query)
    words = (key.shape[2] + 31) // 32
    bits = torch.randint(-(2**31), 2**31, (*query.shape[:3], words), dtype=torch.int32)
    out = torch.empty_like(grad_out)
    grads = grad_out, draw.choice((grad_lse, None))
    return [*grads, query, key, value, bits, out, lse, scale, softcap, sinks]


def gathered_backward(draw: Draw) -> list:
    *inputs, indices, scale, softcap, sinks = gathered(draw)
    grad_out, grad_lse, lse = gradients(inputs[0])
    return [
        grad_out,
        draw.choice((grad_lse, None)),
        *inputs,
        indices,
        torch.empty_like(grad_out),
        lse,
        scale,
        softcap,
        sinks,
        False,
    ]


def tail(draw: Draw) -> list:
    query, key, value = attention(draw)
    groups = draw.choice((1, 2, 4))
    numbers = [draw.choice((0, 1)), 4, 0, 0, groups]
    indices = index_rows((2, groups, 5, 3), 9, garbage=draw.random() < 0.5)
    return [query, key, value, indices, *rule(draw, numbers=numbers, masked=False)]


def tail_backward(draw: Draw) -> list:
    *inputs, indices = tail(draw)[:4]
    grad_out, grad_lse, lse = gradients(inputs[0])
    options = rule(draw, numbers=[1, 4, 0, 0, indices.shape[1]], masked=False)
    results = torch.zeros_like(grad_out), lse, torch.rand(2, 4, 5)
    return [grad_out, draw.choice((grad_lse, None)), *inputs, indices, *results, *options]


def block_tail(draw: Draw) -> list:
    """9 means of 32 keys each."""
    *inputs, indices = tail(draw)[:4]
    options = rule(draw, numbers=[draw.choice((0, 1)), 290, 0, 0, indices.shape[1]], masked=False)
    return [*inputs, indices * 32, 300, 32, *options]


def block_tail_backward(draw: Draw) -> list:
    *inputs, indices, length, size = block_tail(draw)[:6]
    grad_out, grad_lse, lse = gradients(inputs[0])
    options = rule(draw, numbers=[1, 290, 0, 0, indices.shape[1]], masked=False)
    results = torch.zeros_like(grad_out), lse
    return [grad_out, draw.choice((grad_lse, None)), *inputs, indices, *results, length, size, *options]


def joined(draw: Draw) -> list:
    """40 keys and the mean of their whole block of 32."""
    query, key, value, indices, *options = tail(draw)
    key, value = (t.float().repeat(1, 1, 5, 1)[:, :, :40] for t in (key, value))
    means = [t[:, :, :32].mean(2, keepdim=True) for t in (key, value)]
    own = normal(2, 4, 5, value.shape[3]), normal(2, 4, 5)
    if as_bits := draw.random() < 0.3:
        indices = torch.randint(-(2**31), 2**31, (*query.shape[:3], 2), dtype=torch.int32)
    return [query.float(), key, value, *means, indices, as_bits, *own, 40, 32, *options]


def joined_backward(draw: Draw) -> list:
    *inputs, indices, as_bits, out, lse = joined(draw)[:9]
    options = rule(draw, numbers=[1, 35, 0, 0, indices.shape[1]], masked=False)
    grad_out, grad_lse, _ = gradients(inputs[0])
    return [grad_out, draw.choice((grad_lse, None)), *inputs, indices, as_bits, out, lse, 40, 32, *options]


def blocks(draw: Draw) -> list:
    groups = draw.choice((1, 2, 4))
    numbers = [draw.choice((0, 1)), 4, 0, 0, groups]
    chosen = index_rows((2, groups, 3, 2), 3, garbage=draw.random() < 0.5)
    return [*attention(draw), chosen, 4, 2, *rule(draw, numbers=numbers, masked=False)]


def blocks_backward(draw: Draw) -> list:
    query, key, value, chosen, *options = blocks(draw)
    grad_out, grad_lse, lse = gradients(query)
    return [grad_out, grad_lse, query, key, value, chosen, torch.zeros_like(grad_out), lse, *options]


def indexer(draw: Draw) -> list:
    query, key, _ = attention(draw)
    return [query, key, normal(2, 4, 5), 4, *rule(draw, numbers=[1, 4, 2, 1, 2]), draw.random() < 0.5]


def index(draw: Draw) -> tuple[Tensor, list]:
    """(keys [2, 2, 9, 6], the parts of their index, which has room for 32)."""
    _, key, _ = attention(draw)
    made = sparse_attn.KeyIndex.of(key, capacity=32)
    return key, list(made.tensors())


def index_keys(draw: Draw) -> list:
    key, parts = index(draw)
    return [key, *parts, draw.choice((0, 9, 23))]


def indexed(draw: Draw) -> list:
    key, parts = index(draw)
    query = normal(2, 4, 5, 6, dtype=key.dtype)
    return [query, key, 4, *rule(draw, numbers=[1, 4, 2, 1, 4]), *parts]


def indexed_attention(draw: Draw) -> list:
    query, key, *others = indexed(draw)
    return [query, key, normal(2, 2, 9, 3, dtype=key.dtype), *others]


def pages(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, list]:
    """query [1, 4, 3, 6], 5 pages of key and value, the table of 2 sequences, and the rule of a pack of them."""
    dtype, size = draw.choice(FLOAT_DTYPES), draw.choice((1, 16))
    query, key, value = (
        normal(*shape, dtype=dtype) for shape in ((1, 4, 3, 6), (5, 2, size, 6), (5, 2, size, 3))
    )
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    room = 2 * size
    starts = torch.tensor([[0, 0, room]])  # the first two queries are of one sequence
    last = torch.tensor([[room - 2, room - 1, 2 * room - 1]])
    numbers = [1, 0, draw.choice((0, 1)), draw.choice((0, 1)), draw.choice((1, 2, 4))]
    return query, key, value, table, [None, None, starts, last - torch.arange(3), numbers, *scoring(draw)]


def index_of_pages(draw: Draw, key: Tensor) -> list:
    """The parts of an index of the pages [P, Hkv, page size, D], where there can be one."""
    count, _, size, _ = key.shape
    if size % 16 or draw.random() < 0.4:
        return [None, None, None]
    made = sparse_attn.PagedKeyIndex.of(key.transpose(1, 2), torch.arange(count * size))
    return [made.codes, made.bounds, made.shift]


def paged_select(draw: Draw) -> list:
    query, key, _, table, options = pages(draw)
    return [query, key, table, 4, *options, *index_of_pages(draw, key)]


def paged_attention(draw: Draw) -> list:
    query, key, value, table, options = pages(draw)
    return [query, key, value, table, 4, *options, *index_of_pages(draw, key)]


def index_pages(draw: Draw) -> list:
    key = normal(3, 2, 6, dtype=draw.choice(FLOAT_DTYPES))
    made = sparse_attn.PagedKeyIndex.of(key.new_zeros(5, 16, 2, 6))
    slots = torch.tensor([70, 3, 20])
    return [key, slots, made.codes, made.bounds, torch.zeros(2, 6)]


def embedding(draw: Draw) -> list:
    e = make_tables(6, (6, 3), (4, 7), dtype=draw.choice(FLOAT_DTYPES))
    projections = [e.tables[0].new_empty(0, 0) if p is None else p for p in e.projections]
    ids = torch.tensor([[0, 10, 3], [3, 7, 7]], dtype=draw.choice((torch.int32, torch.int64)))
    return [
        ids,
        e.tables,
        projections,
        e.token_band,
        e.token_row.int(),
        draw.choice((-1, 3)),
        draw.random() < 0.5,
    ]


def embedding_backward(draw: Draw) -> list:
    ids, tables, *others = embedding(draw)
    return [
        normal(2, 3, 6, dtype=tables[0].dtype),
        ids,
        tables,
        *others,
        draw.random() < 0.8,
        draw.random() < 0.8,
    ]


def loss(draw: Draw) -> list:
    _, tables, projections, band, row, *_ = embedding(draw)
    hidden, targets = normal(5, 6, dtype=tables[0].dtype), torch.tensor([0, 10, -100, 4, 4])
    weight = torch.rand(11) if draw.random() < 0.3 else None
    return [hidden, targets, tables, projections, band, row, weight, -100, draw.choice((0.0, 0.1))]


def loss_backward(draw: Draw) -> list:
    *inputs, ignore_index, smoothing = loss(draw)
    return [normal(5), normal(5), *inputs, normal(5), ignore_index, smoothing]


RIGHT = {
    "topk_select": select,
    "topk_attention": attend,
    "topk_attention_output": attend,
    "topk_attention_bits": attend,
    "topk_attention_bits_backward": bits_backward,
    "gathered_attention": gathered,
    "gathered_attention_backward": gathered_backward,
    "tail_attention": tail,
    "tail_attention_backward": tail_backward,
    "block_tail": block_tail,
    "block_tail_backward": block_tail_backward,
    "attention_with_blocks": joined,
    "attention_with_blocks_backward": joined_backward,
    "block_attention": blocks,
    "block_attention_backward": blocks_backward,
    "indexer_select": indexer,
    "index_keys": index_keys,
    "indexed_select": indexed,
    "indexed_attention": indexed_attention,
    "paged_select": paged_select,
    "paged_attention": paged_attention,
    "index_pages": index_pages,
    "variable_width_embedding": embedding,
    "variable_width_embedding_backward": embedding_backward,
    "variable_width_cross_entropy": loss,
    "variable_width_cross_entropy_backward": loss_backward,
}
WRITES = {"index_keys": (1, 2), "index_pages": (2, 3)}  # what they write into
UNREAD = (("gathered_attention_backward", 6),)  # `out`: other wings need it


def spoil(draw: Draw, value: Any) -> tuple[Any, str | None]:
    """Something else in its place; and what it is, where it must be refused."""
    if isinstance(value, Tensor):
        return spoil_tensor(draw, value)
    if isinstance(value, bool):
        return not value, None
    if isinstance(value, int):
        return draw.choice(INTEGERS), None
    if isinstance(value, float):
        return draw.choice(FLOATS), None
    if isinstance(value, list) and value and isinstance(value[0], int):
        if draw.random() < 0.4:
            return draw.choice((value[:-1], value + [0], [], value * 2)), "a rule of another length"
        place = draw.randrange(len(value))
        return [draw.choice(INTEGERS) if i == place else n for i, n in enumerate(value)], None
    if isinstance(value, list) and value:
        if draw.random() < 0.4:
            return draw.choice((value[:-1], value + value[-1:], [], value[::-1])), None
        place = draw.randrange(len(value))
        changed, must = spoil(draw, value[place])
        return [changed if i == place else t for i, t in enumerate(value)], must
    return draw.choice((normal(2, 4, 5, 9), torch.zeros(0), torch.zeros(3, 3, dtype=torch.int32))), None


def spoil_tensor(draw: Draw, tensor: Tensor) -> tuple[Tensor, str | None]:
    how = draw.choice(
        ("dtype", "half", "device", "layout", "view", "dims", "size", "size", "values", "values", "expand")
    )
    if how == "dtype":
        dtype = draw.choice([d for d in OTHER_DTYPES if d != tensor.dtype])
        integers = (torch.int32, torch.int64, torch.uint8)
        both = tensor.dtype in integers and dtype in integers
        return tensor.to(dtype), None if both or not tensor.numel() else f"{dtype} for {tensor.dtype}"
    if how == "half" and tensor.is_floating_point():
        return tensor.to(draw.choice(FLOAT_DTYPES)), None
    if how == "device":
        return tensor.to("meta"), "a tensor on another device"
    if how == "layout" and tensor.dim() == 2:
        return tensor.to_sparse(), "a sparse tensor" if tensor.numel() else None
    if how == "view" and tensor.dim() == 4:
        return VIEWS[draw.choice(list(VIEWS))](tensor), None
    if how == "dims":
        wide = (tensor.flatten(), tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.sum())
        return draw.choice(wide).to(tensor.dtype), None
    if how == "size" and tensor.dim():
        dim = draw.randrange(tensor.dim())
        size = tensor.shape[dim]
        wanted = draw.choice((0, max(0, size - 1), size + 1, 2 * size + 3))
        pieces = [tensor] * (wanted // max(1, size) + 1) if size else [tensor]
        return torch.cat(pieces, dim).narrow(dim, 0, min(wanted, size * len(pieces))), None
    if how == "expand" and tensor.dim() and tensor.numel():
        dim = draw.randrange(tensor.dim())
        return tensor.narrow(dim, 0, 1).expand(tensor.shape), None
    if tensor.dtype == torch.bool:
        return ~tensor, None
    values = (math.nan, math.inf, -math.inf, 1e38) if tensor.is_floating_point() else INTEGERS
    spoiled, limits = tensor.clone(), None if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
    if spoiled.numel():
        number = draw.choice(values)
        number = number if limits is None else min(max(number, limits.min), limits.max)
        spoiled.view(-1)[draw.randrange(spoiled.numel())] = number
    return spoiled, None


@fuzzed
class Raw(Fuzzed):
    name = "torch.ops"
    wings = ("cpu",)
    dtypes = ("float32",)

    def draw(self, draw: Draw) -> Case:
        return {"called": draw.choice(list(RIGHT)), "spoiled": draw.choice((1, 1, 2))}

    def check(self, case: Case) -> None:
        op = getattr(getattr(torch.ops.sparse_attn, case["called"]), "cpu", None)
        if op is None:  # built without the extension
            return
        draw = Draw(str(case["seed"]))
        arguments = RIGHT[case["called"]](draw)
        op(*arguments)  # right as it is: else all that follows would be refused for another reason
        must = []
        for place in draw.sample(range(len(arguments)), case["spoiled"]):
            arguments[place], wrong = spoil(draw, arguments[place])
            if wrong is not None and (case["called"], place) not in UNREAD:
                must.append(f"argument {place}: {wrong}")
        read = [a for i, a in enumerate(arguments) if i not in WRITES.get(case["called"], ())]
        before = [t.clone() for t in tree_leaves(read) if isinstance(t, Tensor) and t.device.type == "cpu"]
        try:
            results = op(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            if not str(error).strip():
                raise AssertionError("an error without a word") from error
            return
        assert not must, f"{case['called']} took {must[0]} without a word"
        after = [t for t in tree_leaves(read) if isinstance(t, Tensor) and t.device.type == "cpu"]
        for one, other in zip(before, after, strict=True):
            assert one.is_sparse or torch.equal(bits(one), bits(other)), "an argument was changed"
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                result.clone()
