"""The cases: each file is a whole op, ours computes the right thing, and what does not is not timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import sparse_attn
from sparse_attn.bench import cases, registry, runner
from sparse_attn.bench.attention import AttentionCase

pytestmark = pytest.mark.torch_defaults


@pytest.mark.parametrize("name", registry.names())
def test_each_file_is_an_op(name):
    op = registry.op(name)
    assert op in registry.suite(op.suite)
    planned = op.comparisons(quick=False)
    assert planned
    for comparison in planned:
        assert comparison.case.op == name
        assert {*comparison.rivals, *comparison.targets} <= {*op.labels} - {"ours"}
    assert len({str(case) for case in op.cases()}) == len(op.cases())


def test_a_new_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "an_op_of_tomorrow.py").write_text(
        "from sparse_attn.bench.registry import Op\n\n"
        "class Tomorrow(Op):\n"
        "    name, suite, labels = 'an_op_of_tomorrow', 'attention', {'ours': 'sparse_attn'}\n\n"
        "OP = Tomorrow()\n"
    )
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    try:
        assert "an_op_of_tomorrow" in registry.names()
        assert registry.op("an_op_of_tomorrow") in registry.suite("attention")
    finally:
        registry.op.cache_clear()
        sys.modules.pop(f"{cases.__name__}.an_op_of_tomorrow", None)


TINY = {"heads": 4, "kv_heads": 2, "head_dim": 16}
KINDS = [
    {},
    {"direction": "both"},
    {"dtype": "bfloat16"},
    {"query_length": 1},
    {"query_length": 40},
    {"causal": False, "query_length": 100},
    {"batch": 2},
]


@pytest.mark.parametrize("name", ["topk_attention", "gathered_attention", "topk_select"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_contenders_compute_the_right_thing(name, kind):
    op = registry.op(name)
    if name == "topk_select" and kind.get("direction"):
        pytest.skip("a selection has no gradient")
    case = AttentionCase(name, 72, top_k=9, **{**TINY, **kind})
    inputs = op.inputs(case)
    for contender in op.labels:
        if contender != "flex" and (contender != "sdpa_rows" or op.problem(contender, case) is None):
            op.check(contender, case, inputs, op.prepare(contender, case, inputs))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (
            "block_attention",
            AttentionCase("block_attention", 256, top_k=128, heads=2, kv_heads=2, direction="both"),
        ),
        ("indexer_select", AttentionCase("indexer_select", 96, top_k=8, heads=2, kv_heads=2)),
    ],
)
def test_selections_compute_the_right_thing(name, case):
    op = registry.op(name)
    inputs = op.inputs(case)
    for contender in op.labels:
        op.check(contender, case, inputs, op.prepare(contender, case, inputs))


def test_packed_and_paged_contenders_compute_the_right_thing():
    packed, paged = registry.op("varlen_topk_attention"), registry.op("paged_attention")
    small = replace(packed.cases()[0], length=130, documents=7, top_k=9)
    assert sum(small.lengths) == 130
    assert sorted(small.lengths)[-1] == pytest.approx(130 / sum(1 / n for n in range(1, 8)), abs=1)
    step = replace(paged.cases()[0], length=160, batch=3, top_k=9, **TINY)
    for op, case in (
        (packed, small),
        (packed, replace(small, direction="forward", dtype="bfloat16")),
        (paged, step),
        (paged, replace(step, page_size=32, key_index=True)),
    ):
        inputs = op.inputs(case)
        for contender in op.labels:
            if op.problem(contender, case) is None:
                op.check(contender, case, inputs, op.prepare(contender, case, inputs))


def test_documents_that_see_each_other_are_a_wrong_result(monkeypatch):
    op = registry.op("varlen_topk_attention")
    case = replace(op.cases()[0], length=130, documents=7, top_k=9)
    inputs = op.inputs(case)
    together = lambda q, k, v: sparse_attn.topk_attention(q, k, v, 9, is_causal=True)  # noqa: E731
    with pytest.raises(registry.WrongResult):
        op.check("ours", case, inputs, registry.Work(together, inputs))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_rows(direction):
    """Two top_k's share the dense rival; a row has the names that the tables are made from."""
    op = registry.op("topk_attention")
    case = AttentionCase("topk_attention", 64, direction=direction, **TINY)
    both = [replace(case, top_k=k) for k in (4, 8)]
    rows = runner.measure(
        op, both, op.inputs(case), ("sdpa", "plain_tuned"), budget=0.01, targets={"sdpa": 1e-9}
    )
    assert [row["case"]["top_k"] for row in rows] == [4, 8]
    assert rows[0]["rivals"]["sdpa"]["milliseconds"] == rows[1]["rivals"]["sdpa"]["milliseconds"]
    for row in rows:
        rival = row["rivals"]["sdpa"]
        assert rival["faster"] == pytest.approx(rival["milliseconds"] / row["milliseconds"])
        assert rival["met"] is True
        assert row["case"]["backward"] == (direction != "forward")


def test_a_wrong_result_is_never_timed(monkeypatch):
    op = registry.op("topk_attention")
    monkeypatch.setattr(type(op), "ours", lambda self, case, tensors: lambda q, k, v: 2 * torch.ones_like(q))
    case = AttentionCase("topk_attention", 64, **TINY)
    with pytest.raises(registry.WrongResult, match="ours: output of topk_attention T=64"):
        runner.measure(op, [case], op.inputs(case), (), budget=0.01)


def test_peak_memory_in_a_process_of_this_package(tmp_path, monkeypatch):
    """The current folder holds another `sparse_attn`, which must not be taken."""
    from sparse_attn.bench import memory

    (tmp_path / "sparse_attn").mkdir()
    (tmp_path / "sparse_attn" / "__init__.py").write_text("raise ImportError('another version')")
    monkeypatch.chdir(tmp_path)
    case = AttentionCase("topk_attention", 512, **TINY)
    row = memory.measure(registry.Peak(case), 1)
    assert row["extra_mb"] > 0
    assert row["of_which_returned_mb"] == pytest.approx(512 * 4 * 16 * 4 / 1e6)
