"""Every Triton kernel compiled for GPUs that are not here: no spills where it matters, shared memory within limits."""

from __future__ import annotations

import pytest

from sparse_attn.wings import triton as triton_wing
from triton_wing import aot, first_call

pytestmark = [
    pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton_wing.interpreted, reason="this session interprets the kernels"),
]


@pytest.mark.slow
@pytest.mark.parametrize("op", aot.ops())
def test_compiles_without_spills(op, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an object of another Triton would prove nothing
    rows = list(aot.compile_jobs(aot.main_jobs([op])))
    print(f"\n{aot.table(rows)}")  # pytest -s shows it
    bad = [f"{r.case} on {r.target}: {fault}" for r in rows for fault in r.faults]
    assert not bad, "\n".join(bad)
    assert {r.target for r in rows} == set(aot.TARGETS)


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


def test_main_jobs_leave_no_kernel_and_no_target_out():
    for op in aot.ops():
        full, some = aot.all_jobs([op]), aot.main_jobs([op])
        assert {(aot.cases(op)[i].kernel, t) for _, i, t in full} == {
            (aot.cases(op)[i].kernel, t) for _, i, t in some
        }
        assert len(set(some)) == len(some) <= len(full)
