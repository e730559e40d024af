"""One process of a run: takes ranges of cases from its input, and answers with what came of them."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from fuzz.case import Case, check_case, draw_case, load


def prepare() -> None:
    """As the tests run: what is allocated without a value holds NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # without loading Inductor
    warnings.filterwarnings("ignore")
    load()


def failure(case: Case) -> str | None:
    """What is wrong with the case, in a line; None where nothing is."""
    try:
        check_case(case)
    except AssertionError as error:
        return f"AssertionError: {' '.join(str(error).split()) or traceback.format_exc().splitlines()[-3].strip()}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:300]} ({Path(place.filename).name}:{place.lineno})"
    return None


def main(seed: int, large: float, ops: list[str], marker: str) -> None:
    """`marker`: a file of 8 bytes in which the running case's number stands, should the process die of it."""
    prepare()
    with open(marker, "r+b") as file:
        place = mmap.mmap(file.fileno(), 8)
    for line in sys.stdin:
        start, stop, step, deadline = json.loads(line)
        found: dict = {"failures": [], "counts": Counter(), "done": 0}
        for number in range(start, stop, step):
            if time.time() > deadline:
                break
            place[:] = number.to_bytes(8, "little")
            case = draw_case(seed, number, ops, large)
            problem = failure(case)
            found["counts"][f"{case['op']} {case['wing']} {case['dtype']}"] += 1
            found["done"] += 1
            if problem is not None:
                found["failures"].append((number, problem))
        place[:] = (2**64 - 1).to_bytes(8, "little")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3].split(","), sys.argv[4])
