"""The rule as one object: what it checks, what it becomes, and that it means what the functions' arguments mean."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.inputs import mask, normal, qkv

import sparse_attn
from sparse_attn.rule import PARTS, SCHEMA, PackedRule, Rule
from sparse_attn.wings.base import Wing

QUERY, KEY, VALUE = qkv(2, 4, 2, 9, 13, 8, 5)
FULL = Rule(
    is_causal=True,
    causal_offset=4,
    attn_mask=mask(2, 2, 9, 13).repeat_interleave(2, dim=1),
    key_lengths=torch.tensor([13, 7]),
    window=2,
    sinks=1,
    share="kv",
    scale=0.5,
    key_starts=torch.tensor([2, 0]),
)


def test_its_parts_are_those_of_the_schema_and_come_back():
    packed = FULL.packed(QUERY, KEY, 5)
    parts = packed.parts()
    assert len(parts) == PARTS == SCHEMA.count(",") + 1
    again = PackedRule.of_parts(*parts)
    assert again.attn_mask is packed.attn_mask
    assert again.key_lengths is packed.key_lengths
    assert again[2:-1] == packed[2:-1] == (True, 4, 2, 1, 2, 0.5)
    assert again.key_starts is packed.key_starts
    assert again.key_starts.tolist() == [[2] * 9, [0] * 9]


def test_what_was_left_out_has_its_value():
    packed = Rule(is_causal=True).packed(QUERY[:, :, :5], KEY[:, :, :5])
    assert packed == (None, None, True, 0, 0, 0, 4, 1 / math.sqrt(8), None)


def test_its_arguments_are_those_of_the_functions():
    arguments = FULL.arguments()
    for function in (sparse_attn.topk_select, sparse_attn.topk_attention, sparse_attn.explain):
        assert set(arguments) <= set(inspect.signature(function).parameters)
    direct = sparse_attn.topk_select(QUERY, KEY, 5, **arguments)
    assert torch.equal(direct, sparse_attn.selection.Exact().select(QUERY, KEY, 5, FULL).indices)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(is_causal=1), "is_causal must be True or False"),
        (Rule(window=2), "window needs is_causal=True"),
        (Rule(is_causal=True), "needs causal_offset"),
        (Rule(share="heads"), "share must be one of"),
        (Rule(sinks=6), "top_k is the whole budget"),
        (Rule(scale="big"), "scale must be a float"),
        (Rule(key_lengths=torch.tensor([1, 99])), "key_lengths must lie in"),
        (Rule(attn_mask=torch.ones(3, 13, dtype=torch.bool)), "attn_mask must broadcast"),
    ],
)
def test_errors_name_the_part(rule, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rule.packed(QUERY, KEY, 5)


def test_key_heads_as_groups():
    packed = Rule(share="all").packed(normal(1, 6, 3, 4), normal(1, 3, 3, 4), per_group=True)
    assert packed.groups == 3


def test_a_wing_refuses_what_it_does_not_know():
    """A part that a wing's kernels have not learned is refused, or the call goes to a wing that has it."""
    wing = Wing("toy", "CPU", {"topk_select": None}, lambda *call: None, rule=frozenset(("is_causal",)))
    refusal = partial(wing.refusal, "topk_select", "cpu", torch.float32, {})
    assert refusal(Rule(is_causal=True)) is None
    assert refusal(replace(FULL, is_causal=False)).startswith("it has no ")
    assert refusal(Rule(window=1, sinks=2, is_causal=True)) == "it has no sinks and window"


def test_only_names_what_is_not_kept():
    rule = Rule(is_causal=True, sinks=2, window=1)
    rule.only("toys", "is_causal", "sinks", "window")
    with pytest.raises(ValueError, match="toys know of a rule only is_causal, scale; got sinks and window"):
        rule.only("toys", "is_causal", "scale")
    rule.visibility().only("toys", "is_causal")
