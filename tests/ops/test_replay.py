"""Selections that were returned and are replayed: the same bits alone, in a batch or packed, on any threads."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.inputs import normal
from helpers.wings import DTYPES, WingUnderTest

import sparse_attn
from sparse_attn.wings import extension

cpu = WingUnderTest("cpu", "cpu", DTYPES[:3])
natively = pytest.mark.skipif(extension.module is None, reason=str(extension.load_error))
LENGTHS = (33, 1, 70, 20)
RULES = [{}, {"window": 3, "sinks": 2}, {"share": "kv", "softcap": 2.0}, {"share": "all", "window": 2}]


def digest(dtype: torch.dtype, rule: dict) -> list[list]:
    """(out, lse, indices) of a few documents, each alone, as exact numbers."""
    query, key, value = inputs(dtype)
    found = []
    for part in parts():
        each = [t[part].transpose(0, 1)[None] for t in (query, key, value)]
        out, lse, indices = sparse_attn.topk_attention(
            *each, 6, is_causal=True, return_lse=True, return_indices=True, backend="cpu", **rule
        )
        replayed, again = sparse_attn.gathered_attention(
            *each, indices, return_lse=True, backend="cpu", softcap=rule.get("softcap")
        )
        assert torch.equal(out, replayed)
        assert torch.equal(lse, again)
        found.append([t[0].transpose(0, 1).double().tolist() for t in (out, lse, indices)])
    return found


def inputs(dtype):
    total = sum(LENGTHS)
    return tuple(
        normal(total, h, d, dtype=dtype, seed=s) for s, (h, d) in enumerate(((4, 16), (2, 16), (2, 8)))
    )


def parts():
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@natively
@pytest.mark.parametrize("dtype", cpu.dtypes, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_selection_one_result(dtype, rule):
    """Alone, packed, in a padded batch, replayed there, with one thread and with four."""
    alone = digest(dtype, rule)
    query, key, value = inputs(dtype)
    cu_seq = torch.tensor([0, *LENGTHS]).cumsum(0)
    where = cu_seq, None, max(LENGTHS), max(LENGTHS)
    flags = {"return_lse": True, "return_indices": True, "backend": "cpu", "is_causal": True}
    scoring = {"softcap": rule.get("softcap"), "backend": "cpu", "return_lse": True}
    batch = [
        torch.zeros(len(LENGTHS), t.shape[1], max(LENGTHS), t.shape[2], dtype=dtype)
        for t in (query, key, value)
    ]
    for rows, t in zip(batch, (query, key, value), strict=True):
        for b, part in enumerate(parts()):
            rows[b, :, : LENGTHS[b]] = t[part].transpose(0, 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            packed = sparse_attn.varlen_topk_attention(query, key, value, *where, 6, **flags, **rule)
            again = sparse_attn.varlen_gathered_attention(query, key, value, packed[2], *where, **scoring)
            lengths = torch.tensor(LENGTHS)
            padded = sparse_attn.topk_attention(*batch, 6, key_lengths=lengths, **flags, **rule)
            replayed = sparse_attn.gathered_attention(*batch, padded[2], **scoring)
            for b, part in enumerate(parts()):
                rows = slice(0, LENGTHS[b])
                in_batch = [t[b].transpose(0, 1)[rows] for t in (*padded[:2], padded[2])]
                repeated = [t[b].transpose(0, 1)[rows] for t in replayed]
                for out, lse in (
                    [t[part] for t in packed[:2]],
                    [t[part] for t in again],
                    in_batch[:2],
                    repeated,
                ):
                    assert out.double().tolist() == alone[b][0]
                    assert lse.double().tolist() == alone[b][1]
                for indices in (packed[2][part], in_batch[2]):
                    width = len(alone[b][2][0][0])
                    assert indices[..., :width].double().tolist() == alone[b][2]
    finally:
        torch.set_num_threads(before)


@natively
@pytest.mark.parametrize("dtype", cpu.dtypes, ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (40, 48), (24, 10)], ids=str)
def test_rows_that_go_together_have_the_bits_of_each_alone(dtype, widths):
    """Queries that keep all that they see are taken a few at a time; infinities behind a query's last key included."""
    heads, kv_heads, length, first = 4, 2, 45, 3
    query, key = (normal(1, h, length, widths[0], dtype=dtype, seed=h) for h in (heads, kv_heads))
    value = normal(1, kv_heads, length, widths[1], dtype=dtype)
    value[0, 1, 30, 0], value[0, 0, 37, 1] = float("inf"), float("nan")
    rule = {"is_causal": True, "key_starts": torch.tensor([first])}
    for scoring in ({}, {"softcap": 2.0, "sink_logits": normal(heads)}):
        flags = {"return_lse": True, "backend": "cpu", **scoring}
        out, lse, indices = sparse_attn.topk_attention(
            query, key, value, length, return_indices=True, **rule, **flags
        )
        for i in range(length):
            one = query[:, :, i : i + 1]
            alone = sparse_attn.gathered_attention(one, key, value, indices[:, :, i : i + 1], **flags)
            decoded = sparse_attn.topk_attention(
                one, key, value, length, **rule | {"causal_offset": i}, **flags
            )
            for found in (alone, decoded):
                for mine, whole in zip(found, (out[:, :, i : i + 1], lse[:, :, i : i + 1]), strict=True):
                    torch.testing.assert_close(mine, whole, rtol=0, atol=0, equal_nan=True)


@natively
def test_one_result_in_each_process_of_an_instruction_set():
    """Indices of exact scores are the same in all of them; outputs are those of one's own kind, run after run."""
    program = "import json, torch; from ops import test_replay as t; "
    program += "print(json.dumps(t.digest(torch.float32, t.RULES[1])))"
    tests = os.path.dirname(os.path.dirname(__file__))
    found = {}
    lowest, *others = extension.module.build_info()["isas"]
    for isa in (lowest, *2 * others[:1]):
        environment = os.environ | {
            "SPARSE_ATTN_CPU_ISA": isa,
            "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)]),
        }
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if result.returncode and "SPARSE_ATTN_CPU_ISA" in result.stderr:
            continue  # this machine has not got it
        assert result.returncode == 0, result.stderr[-2000:]
        answer = json.loads(result.stdout.splitlines()[-1])
        assert found.setdefault(isa, answer) == answer
    assert lowest in found
