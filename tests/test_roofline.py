"""Speed by count (benchmarks/gpu/roofline.py): the reader of machine code, the model, and ceilings on what it finds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks.gpu import gpus, roofline, roofline_cuda, roofline_triton, sass, streams
finally:
    sys.path.remove(str(ROOT))


def code(*texts: str) -> list[tuple[int, str]]:
    return [(16 * n, text) for n, text in enumerate(texts)]


NESTED = code(
    "MOV R1, 0x0",
    "LDG.E R2, [R4]",  # 0x10: the outer loop
    "@P0 BRA 0x40",  # past the branch
    "FADD R2, R2, R3",
    "IADD3 R1, R1, 0x1, RZ",  # 0x40: the inner loop
    "@!P1 BRA 0x40",
    "BRA.DIV UR4, 0xb0",
    "NOP",
    "@P2 BRA P3, 0x10",
    "EXIT",
    "BRA 0xa0",
    "WARPSYNC.COLLECTIVE R1, 0x80",  # 0xb0: where threads that diverge would go
    "BRA 0x70",
)


def test_loops_are_found_by_their_back_edges():
    (outer,) = sass.loops(NESTED)
    assert outer.header == 0x10
    assert [inner.header for inner in outer.inner] == [0x40]
    assert dict(outer.always) == {"LDG.E": 1, "BRA": 2, "BRA.DIV": 1}
    assert [dict(b) for b in outer.branches] == [{"FADD": 1}]
    assert dict(outer.inner[0].always) == {"IADD3": 1, "BRA": 1}
    assert outer.inner[0].branches == []
    assert [loop.header for loop in outer] == [0x10, 0x40]


def test_a_kernel_without_loops():
    assert sass.loops(code("MOV R1, 0x0", "@P0 EXIT", "STG.E [R2], R1", "EXIT")) == []
    assert sass.loops([]) == []


def test_what_a_row_appends_is_what_it_appends_on_random_keys():
    """The model of cuts and candidates against the thing itself, over 200 rows of 4,096 keys in random order."""
    budget, room, slack = 32, 160, 4
    cuts = appended = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores = torch.rand(4096, generator=generator).tolist()
        bar, row = -1.0, []
        for score in scores:
            if score > bar:
                if len(row) == room:
                    cuts += 1
                    row = sorted(row)[-(budget + slack // 2) :]
                    bar = sorted(row)[-budget]
                    if score <= bar:
                        continue
                row.append(score)
                appended += 1
    expected = streams.streamed(budget, 4096, room)
    assert cuts / 200 == pytest.approx(expected.cuts, abs=0.6)
    assert appended / 200 == pytest.approx(expected.appended, rel=0.05)


@pytest.mark.parametrize("budget", [64, 512])
def test_what_a_sample_lets_pass_is_what_it_lets_pass_on_random_keys(budget):
    """The number of keys that beat the threshold, over 2,000 rows; and hardly any row has too few of them."""
    keys, rows, sample = 8192, 2000, streams.Sample.of(budget)
    scores = torch.rand(rows, keys, generator=torch.Generator().manual_seed(0))
    threshold = scores[:, sample.stride // 2 :: sample.stride].topk(sample.budget).values[:, -1:]
    passed = (scores >= threshold).sum(1).float()
    expected = streams.streamed(budget, keys, 10**6, sample)
    seen = keys / sample.stride  # the sample's own are appended, too, and thrown away
    assert passed.mean().item() == pytest.approx(expected.appended - seen, rel=0.05)
    assert sample.fails < 1e-4
    assert (passed < budget).float().mean() <= 0.002
    assert expected.passes == pytest.approx(2, abs=0.01)


def test_a_sample_is_left_out_where_it_would_not_pay():
    assert streams.Sample.of(31) is None
    assert streams.streamed(64, 400, 192, streams.Sample.of(64)).passes == 1


def test_registers_and_shared_memory_bound_the_warps():
    h100 = gpus.GPUS[1]
    assert gpus.resident(32, 0, 4, h100) == 64
    assert gpus.resident(128, 0, 4, h100) == 16
    assert gpus.resident(129, 0, 4, h100) == 12  # registers are given out by eights
    assert gpus.resident(32, 100 * 1024, 4, h100) == 8


# (warp instructions for 4,096 scores, warps of a multiprocessor): what was counted when each was last made faster, and
# a tenth more, as a compiler may differ; and no fewer warps.
BOUNDS = {
    "topk_select bf16 H16 D128 K64 T16k causal": (3700, 12),
    "topk_select bf16 H16 D128 K128 T16k causal": (4080, 12),
    "topk_select bf16 H16 D128 K512 T16k causal": (5170, 12),
    "topk_select bf16 H16 D128 K2048 T16k causal": (8310, 12),
    "topk_select bf16 H16 D64 K64 T16k causal": (3420, 12),
    "topk_select bf16 H16 D128 K64 Tq1 Tk128k, 24 pieces": (2590, 12),
    "topk_select bf16 H32/8 D128 K64 Tq1 Tk128k, 49 pieces": (2910, 12),
    "topk_select bf16 H16 D128 K64 T16k causal, 4 heads share": (5710, 8),
    "topk_select bf16 H16 D128 T16k causal, log-sum-exp": (5180, 12),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.skipif(
    sass.tool("cuobjdump") is None, reason="cuobjdump is neither beside Triton nor on the PATH"
)
def test_selection_stays_as_fast_as_counted():
    rows = {row.label.removeprefix("cuda "): row for row in roofline_cuda.cuda_rows("cuda topk_select bf16")}
    for label, (most, warps) in BOUNDS.items():
        row = rows[label]
        assert row.per_unit <= most, f"{label}: {row.per_unit:.0f} warp instructions, at most {most}"
        assert row.stack == 0, f"{label} spills {row.stack} bytes"
        assert row.warps >= warps, f"{label}: only {row.warps} warps fit a multiprocessor of an H100"
    assert "topk_select bf16" in roofline.table(list(rows.values()))
    together, apart = (
        rows[f"topk_select bf16 H32/8 D128 K64 Tq1 Tk128k, {pieces}"]
        for pieces in ("49 pieces", "12 pieces, heads apart")
    )
    assert together.cache_bytes < 0.3 * apart.cache_bytes  # four heads read each key once
    assert together.instructions < 0.35 * apart.instructions


# The same of Triton's kernels, by the main loop alone; and bytes of the stack, on which LLVM packs long rows of bits.
TRITON_BOUNDS = {
    "tail_attention attend_tiles bf16 D128 H16/4 G16": (11210, 8, 0),
    "tail_attention tile_queries bf16 D128 H16/4 G16": (10980, 8, 0),
    "tail_attention tile_keys bf16 D128 H16/4 G16": (15670, 8, 0),
    "indexed_select select_tiles by the index bf16 D128 H32/8 K64": (12460, 8, 24),
}


@pytest.mark.slow
@pytest.mark.skipif(
    sass.tool("cuobjdump") is None, reason="cuobjdump is neither beside Triton nor on the PATH"
)
def test_kernels_of_triton_stay_as_fast_as_counted():
    pytest.importorskip("triton")
    for label, (most, warps, stack) in TRITON_BOUNDS.items():
        (row,) = roofline_triton.triton_rows(f"triton {label}")
        assert row.per_unit <= most, f"{label}: {row.per_unit:.0f} warp instructions, at most {most}"
        assert row.stack <= stack, f"{label} has {row.stack} bytes on the stack, at most {stack}"
        assert row.warps >= warps, f"{label}: only {row.warps} warps fit a multiprocessor of an H100"
