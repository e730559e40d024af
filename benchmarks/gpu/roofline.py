"""Speed by count, where no GPU is: `python -m benchmarks.gpu.roofline [--only TEXT] [--json FILE]`.

For each kernel and case: what one warp issues, read from the machine code (loops by their back edges, sass.py), and how
often each loop turns, from the sizes; registers, spills, shared memory and the warps that fit; bytes and products by
formula; and the time that follows on each GPU, the longest of four: instructions at four a clock and multiprocessor,
products, second-level cache, memory. Nothing here is measured: such a time is a floor.

Machine code is that of sm_90 for all GPUs. The rates of mma.sync, which the kernels of csrc/cuda use, are 62% of
wgmma's on Hopper, and taken as half of those on Blackwell; the cache's rates are rounded from what others measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.gpus import GPUS
from benchmarks.gpu.roofline_cuda import cuda_rows
from benchmarks.gpu.roofline_model import Row
from benchmarks.gpu.roofline_triton import triton_rows


def table(rows: list[Row]) -> str:
    width = max(len(r.label) for r in rows)
    lines = [
        f"{'':{width}}  regs stack  shared warps    loop    most   warp instructions    TFLOP   L2 GB  HBM GB"
        + "".join(f"{g.name + ' ms':>16}" for g in GPUS)
    ]
    for r in rows:
        times_ = "".join(f"{f'{r.milliseconds[g.name]:.3g} {r.bound[g.name]}':>16}" for g in GPUS)
        lines.append(
            f"{r.label:{width}} {r.registers:5} {r.stack:5} {r.shared:7} {r.warps:5} {r.loop:7} {r.loop_most:7} "
            f"{r.per_unit:7.4g} / {r.unit:13} {r.operations / 1e12:5.3g} {r.cache_bytes / 1e9:7.3g} "
            f"{r.memory_bytes / 1e9:7.3g}{times_}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.roofline", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose label has this text, such as topk_select")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args()
    rows = []
    for name, of in (("cuda", cuda_rows), ("triton", triton_rows)):
        try:
            rows += of(args.only)
        except (FileNotFoundError, ImportError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not rows:
        print(f"no case has {args.only!r} in its label")
        return 1
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
