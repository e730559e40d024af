"""Every Triton kernel compiled for GPUs that are not here: no spills where it matters, shared memory within limits."""

from __future__ import annotations

import pytest

from sparse_attn import triton_wing
from triton_wing import aot

pytestmark = [
    pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton_wing.interpreted, reason="this session interprets the kernels"),
]


@pytest.mark.parametrize("op", aot.ops())
def test_compiles_without_spills(op, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an object of another Triton would prove nothing
    rows = list(aot.compile_jobs(aot.main_jobs([op])))
    print(f"\n{aot.table(rows)}")  # pytest -s shows it
    bad = [f"{r.case} on {r.target}: {fault}" for r in rows for fault in r.faults]
    assert not bad, "\n".join(bad)
    assert {r.target for r in rows} == set(aot.TARGETS)
