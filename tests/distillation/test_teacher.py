"""What is noted of a teacher: the tensors themselves, one batch at a time, and the model left as it was."""

import pytest
import torch
from helpers import oracle

from distillation.models import BATCH, LENGTH, Teacher, batches
from sparse_attn.distillation import attention_layers, collect, observe

NAMES = ["blocks.0.attention", "blocks.1.attention"]


def by_hand(attention, hidden):
    """Query, key, value [B, H, T, D] of the fused projection's rows: query heads, key heads, value heads."""
    dim = attention.head_dim
    rows = [n * dim for n in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)]
    parts = (hidden @ attention.qkv.weight.T).split(rows, dim=-1)
    return [part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in parts]


@pytest.mark.parametrize("top_k", [None, 3])
def test_it_notes_what_the_layers_computed(top_k):
    teacher, (ids,) = Teacher(top_k=top_k).eval(), batches(1)
    seen = observe(teacher, ids)
    assert list(seen.layers) == NAMES
    torch.testing.assert_close(seen.logits, teacher(ids).logits)
    for name, attention in attention_layers(teacher).items():
        heads = seen.layers[name]
        for tensor, want in zip(
            (heads.query, heads.key, heads.value), by_hand(attention, heads.hidden), strict=True
        ):
            torch.testing.assert_close(tensor, want)
        options = {"is_causal": True}
        want, _, _ = oracle.topk_attention(heads.query, heads.key, heads.value, top_k or LENGTH, **options)
        torch.testing.assert_close(heads.output.double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.result, attention(heads.hidden))
        assert not any(tensor.requires_grad for tensor in vars(heads).values())


def test_scores_of_a_block_are_those_of_the_whole():
    heads = observe(Teacher(), batches(1)[0]).layers[NAMES[1]]
    whole = oracle.scores(heads.query, heads.key)
    whole = whole.masked_fill(~oracle.visible(heads.query, heads.key, is_causal=True), -torch.inf)
    torch.testing.assert_close(heads.scores(slice(5, 9)).double(), whole[:, :, 5:9], rtol=1e-5, atol=1e-5)


def test_blocks_cover_the_queries(monkeypatch):
    heads = observe(Teacher(), batches(1)[0]).layers[NAMES[0]]
    monkeypatch.setattr("sparse_attn.wings.reference.chunks._ELEMENTS", 7 * BATCH * 4 * LENGTH)
    blocks = list(heads.blocks())
    assert [(rows.start, rows.stop) for rows in blocks] == [(0, 7), (7, 14), (14, 21), (21, 24)]


def test_the_model_is_left_as_it_was():
    teacher = Teacher().train()
    teacher.blocks[0].eval()
    modes = [module.training for module in teacher.modules()]
    observe(teacher, batches(1)[0])
    with pytest.raises(IndexError):
        observe(teacher, torch.full((1, 4), 99))  # no such token: the forward fails halfway
    assert [module.training for module in teacher.modules()] == modes
    for module in teacher.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_dropout_is_off():
    teacher, (ids,) = Teacher().train(), batches(1)
    assert torch.equal(observe(teacher, ids).logits, observe(teacher, ids).logits)


def test_collect_takes_one_batch_at_a_time():
    taken = []

    def stream():
        for ids in batches(3):
            taken.append(ids)
            yield ids

    seen = collect(Teacher(), stream(), NAMES[:1])
    assert len(taken) == 0
    assert list(next(seen).layers) == NAMES[:1]
    assert len(taken) == 1
    assert len(list(seen)) == 2


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda ids: observe(torch.nn.Linear(2, 2), ids), ValueError, "model must have attention .* got Linear"),
        (lambda ids: observe(Teacher(), ids, ["x"]), ValueError, "layers must be among blocks.0.attention, .* got 'x'"),
        (lambda ids: observe(Teacher().blocks[0].attention, torch.zeros(1, 2, 2)), ValueError, "hidden must have"),
    ],
)  # fmt: skip
def test_errors(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(batches(1)[0])


def test_a_model_without_logits():
    teacher = Teacher()
    teacher.forward = lambda ids: None
    with pytest.raises(TypeError, match=r"model must return logits \[B, T, V\] or .* got None"):
        observe(teacher, batches(1)[0])
