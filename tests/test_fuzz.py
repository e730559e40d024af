"""A few seconds of the fuzzer (tests/fuzz), the same cases every time, and that it finds what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import shrink, worker
from fuzz.case import OPS, draw_case, load

import sparse_attn
from sparse_attn.ops import gathered_attention

TESTS = Path(__file__).parent


def fuzz(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_same_cases_every_time():
    """Every op, wing and instruction set of this machine; in processes, so that one that dies is a failure.

    .ci/run goes on from there for a minute: `make fuzz` draws the same cases first.
    """
    result = fuzz("--seed", "0", "--cases", "400", "--jobs", "1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "400 cases in" in result.stdout


def test_a_wrong_result_is_found_and_made_small(monkeypatch):
    """Of a selection that forgets the last key."""
    load()
    right = sparse_attn.topk_select

    def wrong(query, key, top_k, **options):
        return right(query, key[:, :, : max(1, key.shape[2] - 1)], top_k, **options)

    monkeypatch.setattr(sparse_attn, "topk_select", wrong)
    cases = (draw_case(0, number, ["topk_select"]) for number in range(300))
    case = next(c for c in cases if c["B"] and c["Tk"] > 3 and worker.failure(c))
    small, problem = shrink.shrink(case)
    assert problem is not None
    assert small["B"] * small["Tq"] * small["D"] <= case["B"] * case["Tq"] * case["D"]
    assert small["B"] == small["Tq"] == small["Hq"] == 1
    assert OPS[small["op"]].name == "topk_select"


def test_a_failure_comes_with_its_command():
    """Here every call fails: there is no such instruction set."""
    result = fuzz("--seed", "3", "--cases", "3", "--ops", "topk_select", "--isas", "no_such_set")
    assert result.returncode == 1
    assert "SPARSE_ATTN_CPU_ISA must be" in result.stdout
    command = "SPARSE_ATTN_CPU_ISA=no_such_set python -m fuzz --seed 3 --ops topk_select --case "
    assert command in result.stdout


def other_softcap(options):
    return options | {"softcap": options["softcap"] * 1.05} if "softcap" in options else options


def other_sinks(options):
    return options | {"sink_logits": options["sink_logits"] + 0.05} if "sink_logits" in options else options


def other_offset(options):
    offset = options.get("causal_offset")
    return options | {"causal_offset": offset + 1} if isinstance(offset, torch.Tensor) else options


def other_starts(options):
    return options | {"key_starts": options["key_starts"] + 1} if "key_starts" in options else options


def other_used(options):
    used = options.get("seqused_k")
    return options if used is None else options | {"seqused_k": (used - 1).clamp(min=0)}


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("topk_attention", other_softcap),
        ("topk_attention", other_sinks),
        ("topk_attention_with_residual", other_softcap),
        ("topk_attention_with_residual", other_sinks),
        ("gathered_attention", other_sinks),
        ("block_attention", other_sinks),
        ("topk_select", other_offset),
        ("topk_select", other_starts),
        ("varlen_topk_attention", other_softcap),
        ("varlen_topk_attention", other_used),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_part_that_is_a_little_wrong_is_found(monkeypatch, op, change):
    load()
    right = getattr(sparse_attn, op)
    monkeypatch.setattr(sparse_attn, op, lambda *tensors, **options: right(*tensors, **change(options)))
    found = (worker.failure(draw_case(0, number, [op], large=0.0)) for number in range(250))
    assert any(isinstance(f, str) and f.startswith("AssertionError") for f in found)


@pytest.mark.parametrize("op", ["gathered_attention", "block_attention"])
def test_a_gradient_that_is_a_little_wrong_is_found(monkeypatch, op):
    load()
    right = gathered_attention.sink_gradient
    monkeypatch.setattr(gathered_attention, "sink_gradient", lambda *given: right(*given) * 1.01)
    found = (worker.failure(draw_case(0, number, [op], large=0.0)) for number in range(250))
    assert any(f is not None and "gradient of sink_logits" in f for f in found)
