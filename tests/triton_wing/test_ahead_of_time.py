"""Every Triton kernel compiled for GPUs that are not here: no spills where it matters, shared memory within limits."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

import sparse_attn
from sparse_attn.wings import triton as triton_wing
from triton_wing import aot, first_call

pytestmark = [
    pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton_wing.interpreted, reason="this session interprets the kernels"),
]


@pytest.mark.slow
@pytest.mark.parametrize("op", aot.ops())
def test_compiles_without_spills(op, tmp_path, monkeypatch):
    """What the record does not have is compiled: every kernel that changed, and all of another Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an object of another Triton would prove nothing
    rows, missing = aot.looked_up(aot.main_jobs([op]), aot.read_record())
    rows += aot.compile_jobs(missing)
    print(f"\n{aot.table(rows)}\n{len(missing)} compiled")  # pytest -s shows it
    bad = [f"{r.case} on {r.target}: {fault}" for r in rows for fault in r.faults]
    assert not bad, "\n".join(bad)
    assert {r.target for r in rows} == set(aot.TARGETS)


@pytest.mark.slow
def test_the_record_is_what_the_compiler_makes(tmp_path, monkeypatch):
    """Of each op one case, compiled here and now: what a fingerprint stands for, the compiler still says."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    jobs, record = aot.sample(aot.main_jobs(aot.ops())), aot.read_record()
    known = [job for job in jobs if aot.fingerprint(job) in record]
    if not known:
        pytest.skip("the record is of another Triton: everything is compiled above")
    for job, row in zip(known, aot.compile_jobs(known), strict=True):
        assert (row.registers, row.spilled, row.shared) == record[aot.fingerprint(job)], row


def test_a_fingerprint_changes_with_all_that_is_compiled(monkeypatch):
    """Another target, another size, another source: nothing of the record is taken for it."""
    op, number, target = job = aot.main_jobs(["topk_select"])[0]
    before = aot.fingerprint(job)
    assert aot.fingerprint(job) == before
    assert aot.fingerprint((op, number, "sm_80")) != aot.fingerprint((op, number, "sm_90"))
    case = aot.cases(op)[number]
    wider = case.arguments | {"CAPACITY": 2 * case.arguments["CAPACITY"]}
    for change in ({"num_warps": case.num_warps * 2}, {"arguments": wider}):
        monkeypatch.setattr(aot, "cases", lambda op, change=change: [replace(case, **change)])
        assert aot.fingerprint((op, 0, target)) != before
    monkeypatch.undo()
    monkeypatch.setattr(type(case.kernel), "cache_key", "the source of another kernel")
    assert aot.fingerprint(job) != before


def test_a_compiler_that_ends_its_process_is_a_fault_of_its_case_alone(monkeypatch):
    jobs = aot.main_jobs(["topk_select"])[:5]

    def compiled(some, processes):
        for op, number, target in some:
            if (op, number, target) in (jobs[1], jobs[3]):
                raise BrokenProcessPool
            yield aot.Resources(op, aot.cases(op)[number].name, target)

    monkeypatch.setattr(aot, "_compiled", compiled)
    found = list(aot.compile_jobs(jobs))
    assert [(r.case, r.target) for r in found] == [(aot.cases(op)[i].name, t) for op, i, t in jobs]
    assert [bool(r.faults) for r in found] == [False, True, False, True, False]


def test_every_launch_is_compiled_ahead_of_time():
    """What the ops launch, forward and backward, are kernels that the lists beside this file have."""
    listed = {case.kernel for op in aot.ops() for case in aot.cases(op)}
    for name, steps in first_call.CALLS.items():
        for direction, step in steps():
            found = []
            with first_call.launches(found):
                step()
            missing = {case.kernel.__name__ for case in found if case.kernel not in listed}
            assert not missing, f"{name}, {direction}: {missing}"
            assert found, f"{name}, {direction}: nothing was launched"
            for case in found:
                case.source()  # every argument is there


def compiled(call) -> set[tuple]:
    """What a call's launches would compile: one entry for each kernel and way in which it is specialised."""
    found: list[aot.Case] = []
    with first_call.launches(found):
        call()
    return {(c.kernel.__name__, c.source().hash(), c.num_warps, c.num_stages, str(c.options)) for c in found}


@pytest.mark.parametrize("share", ["none", "all"])
def test_a_growing_cache_compiles_once(share):
    """Lengths that 16 divides and others: numbers that change from step to step are no constants."""

    def step(length):
        query = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
        key, value = torch.zeros(2, 1, 2, length, 64, dtype=torch.bfloat16).unbind(0)
        options = {"is_causal": True, "causal_offset": length - 1, "window": 3, "sinks": 1, "share": share}
        return compiled(
            lambda: sparse_attn.topk_attention(query, key, value, 16, backend="triton", **options)
        )

    kernels = step(17)
    for length in (16, 18, 31, 32, 33, 100, 128, 1001):
        assert step(length) <= kernels, f"{length} keys"
    # Keys split over programs are merged at the next power of two of what all pieces keep.
    split = [step(length) - kernels for length in (4096, 4097, 5000, 8000)]
    assert len(set().union(*split)) <= 2 + 2


@pytest.mark.parametrize("share", ["none", "kv"])
@pytest.mark.parametrize("paged", [False, True])
def test_steps_of_a_server_compile_once(share, paged):
    """Sequences come and go, and caches grow: a step of any of them, of few tokens each."""

    def step(sequences, used):
        query = torch.zeros(sequences, 8, 64, dtype=torch.bfloat16)
        cu_seq = torch.arange(sequences + 1)
        options = {"is_causal": True, "window": 2, "sinks": 1, "share": share, "backend": "triton"}
        if paged:
            table = torch.zeros(sequences, -(-used // 16) + 1, dtype=torch.int32)
            key = torch.zeros(7 + sequences, 16, 2, 64, dtype=torch.bfloat16)
            options |= {"seqused_k": torch.full((sequences,), used), "block_table": table}
            where = cu_seq, None, 1, used
        else:
            key = torch.zeros(sequences * used, 2, 64, dtype=torch.bfloat16)
            where = cu_seq, cu_seq * used, 1, used
        return compiled(lambda: sparse_attn.varlen_topk_attention(query, key, key, *where, 16, **options))

    # Tiles of 16, 32 and more rows; keys split over programs and not.
    known = set().union(*(step(n, used) for n, used in ((1, 64), (8, 64), (16, 64), (16, 32))))
    for sequences, used in ((1, 33), (16, 48), (2, 100), (5, 96), (16, 17)):
        assert step(sequences, used) <= known, f"{sequences} sequences of {used} keys"


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_batches_and_lengths_compile_once(kv_heads):
    """Forward and backward of training on sequences and batches of any size."""

    def step(batch, length):
        query = torch.zeros(batch, 4, length, 64, dtype=torch.bfloat16, requires_grad=True)
        key, value = (
            torch.zeros(batch, kv_heads, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
        )
        indices = torch.zeros(batch, kv_heads, length, 16, dtype=torch.int32)
        call = lambda: sparse_attn.gathered_attention(query, key, value, indices, backend="triton")  # noqa: E731
        return compiled(lambda: call().sum().backward())

    kernels = step(3, 100)
    for batch, length in ((1, 100), (2, 96), (5, 97), (16, 1), (3, 1000)):
        assert step(batch, length) <= kernels, f"{batch} sequences of {length}"


def test_main_jobs_leave_no_kernel_and_no_target_out():
    for op in aot.ops():
        full, some = aot.all_jobs([op]), aot.main_jobs([op])
        assert {(aot.cases(op)[i].kernel, t) for _, i, t in full} == {
            (aot.cases(op)[i].kernel, t) for _, i, t in some
        }
        assert len(set(some)) == len(some) <= len(full)
