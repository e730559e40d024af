"""A smaller case that fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.case import EXACT, Case
from fuzz.rules import OPTIONS
from fuzz.worker import failure

_SIZES = (
    "B",
    "Hkv",
    "Hq",
    "Tq",
    "Tk",
    "D",
    "Dv",
    "K",
    "M",
    "V",
    "top_k",
    "block_size",
    "query_tile",
    "hidden",
    "Hi",
    "Di",
)


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one place; not each of them is possible."""
    for name in OPTIONS:
        if name in case:
            yield {n: v for n, v in case.items() if n != name}
    for name, plain in (
        ("again", False),
        ("threads", 1),
        ("grads", None),
        ("garbage", False),
        ("dtype", "float32"),
    ):
        if name in case and case[name] != plain:
            yield case | {name: plain}
    for name, value in case.items():
        if name.endswith("_view") and value != "contiguous":
            yield case | {name: "contiguous"}
        if name.endswith("_values") and value != "normal":
            yield from (case | {name: kind} for kind in ("normal", *EXACT) if kind != value)
    for name in _SIZES:
        if isinstance(case.get(name), int):
            for smaller in sorted({1, case[name] // 2, case[name] - 1}):
                if 1 <= smaller < case[name]:
                    changed = case | {name: smaller}
                    if name == "Hkv":  # the heads that share stay as many
                        changed["Hq"] = case["Hq"] // case["Hkv"] * smaller
                    yield changed


def shrink(case: Case, attempts: int = 600) -> tuple[Case, str | None]:
    """The case and what is wrong with it, made small as long as the same check fails."""
    problem = failure(case)
    if problem is None:
        return case, None
    kind = problem.split(":")[:2]
    progress = True
    while progress and attempts > 0:
        progress = False
        for candidate in simpler(case):
            attempts -= 1
            found = failure(candidate)
            if (
                found is not None
                and found.split(":")[0] == kind[0]
                and found.split(":")[1][:24] == kind[1][:24]
            ):
                case, problem, progress = candidate, found, True
                break
            if attempts <= 0:
                break
    return case, problem
