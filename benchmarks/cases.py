"""What is measured: the comparisons, their targets, and the lengths of the scaling curves.

`faster` is the rival's time over ours, so 1 means equally fast, 2 twice as fast, and 0.5 half as fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Case:
    """One call: which op, on what. The setting of the targets is B1 H8 D64, causal, K=64."""

    op: str  # topk_select, gathered_attention, topk_attention
    length: int
    dtype: str = "float32"
    backward: bool = False  # time forward + backward
    inputs: str = "random"
    top_k: int = 64
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    query_length: int | None = None  # None: as many queries as keys
    window: int = 0
    sinks: int = 0
    share: str = "none"

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"

    def __str__(self) -> str:
        """A short name for tables and test ids, with what differs from the usual setting."""
        parts = [
            self.op,
            f"T={self.length}",
            self.dtype,
            "fwd+bwd" if self.backward else "fwd",
            "" if self.inputs == "random" else self.inputs,
            "" if self.top_k == 64 else f"K={self.top_k}",
            "" if self.heads == self.kv_heads else f"heads={self.heads}/{self.kv_heads}",
            "" if self.head_dim == 64 else f"D={self.head_dim}",
            "" if self.query_length is None else f"Tq={self.query_length}",
            f"window={self.window}" if self.window else "",
            f"sinks={self.sinks}" if self.sinks else "",
            "" if self.share == "none" else f"share={self.share}",
        ]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """Ours against rivals on one case; `targets` maps a rival to the least acceptable `faster`."""

    case: Case
    rivals: tuple[str, ...]
    targets: dict[str, float] = field(default_factory=dict)
    note: str = ""  # why a user should care
    rounds: int = 15  # most interleaved rounds


DENSE = ("sdpa", "flex")
PLAIN = ("plain", "plain_tuned")


def headline(quick: bool = False) -> list[Comparison]:
    """The comparisons that have targets, and the same in the other dtype; quick: what has a target, alone."""
    topk = Case("topk_attention", 4096)
    given = Case("gathered_attention", 8192)
    half = {"dtype": "bfloat16"}
    rows = [
        Comparison(topk, (*PLAIN, *DENSE), {"plain": 25}),
        Comparison(replace(topk, **half), (*PLAIN, *DENSE)),
        Comparison(replace(topk, length=8192), DENSE, {"sdpa": 1.0}),
        Comparison(replace(topk, length=8192, **half), DENSE, {"sdpa": 1 / 1.3}),
        Comparison(replace(topk, backward=True), ("plain_tuned", "sdpa"), {"sdpa": 1.0}),
        Comparison(replace(topk, backward=True, **half), ("sdpa",)),
        Comparison(given, DENSE, {"sdpa": 6}),
        Comparison(replace(given, backward=True), ("sdpa",), {"sdpa": 5}),
        Comparison(replace(given, **half), DENSE),
        Comparison(replace(given, backward=True, **half), ("sdpa",)),
        Comparison(Case("topk_select", 4096), (*PLAIN, "scores")),
        Comparison(Case("topk_select", 4096, **half), (*PLAIN, "scores")),
    ]
    return [replace(row, rivals=tuple(row.targets)) for row in rows if row.targets] if quick else rows


def on_real_inputs(quick: bool = False) -> list[Comparison]:
    """The headline comparisons with dense attention once more, on a language model's own queries and keys."""
    return [
        replace(row, case=replace(row.case, inputs="real"), rivals=("sdpa",), targets={})
        for row in headline(quick)
        if "sdpa" in row.rivals
    ]


def know_before_use() -> list[Comparison]:
    """Where it pays little or nothing, and the options that change the price; always against dense SDPA."""
    base = Case("topk_attention", 4096)
    gqa = replace(base, kv_heads=2)
    rows = [
        *((replace(base, length=n), "short") for n in (64, 128, 256, 512, 1024)),
        *((replace(base, length=n, backward=True), "short, training") for n in (256, 1024)),
        (replace(base, length=2048, dtype="bfloat16"), ""),
        (replace(base, top_k=256), "large K"),
        (replace(base, top_k=512), "large K"),
        (replace(base, top_k=1024), "large K"),
        (replace(base, top_k=512, backward=True), "large K, training"),
        (replace(base, length=1024, top_k=1024), "top_k ≥ T, the same result as dense"),
        (replace(base, head_dim=128), "wide heads"),
        (replace(base, window=32, sinks=4), "a third of the budget is fixed"),
        (gqa, "GQA, a selection per query head"),
        (replace(gqa, share="kv"), "GQA, a selection per key head: ranks by attention mass"),
        (replace(gqa, share="all"), "one selection for all heads: ranks by attention mass"),
        (replace(base, length=8192, query_length=1), "one decoding step"),
        (replace(base, inputs="ascending"), "worst order: every later key is better"),
    ]
    return [Comparison(case, ("sdpa",), note=note, rounds=7) for case, note in rows]


# op → lengths; the dense rival stops where one call takes over a second.
SCALING = {
    "topk_attention": (1024, 2048, 4096, 8192, 16384, 32768),
    "gathered_attention": (1024, 2048, 4096, 8192, 16384, 32768),
    "sdpa": (1024, 2048, 4096, 8192, 16384),
}

MEMORY_LENGTH = 32768
MEMORY_TARGET_MB = 400
OVERHEAD_LENGTH = 16
OVERHEAD_TARGET_US = 60


def suite(op: str) -> list[Case]:
    """The cases of `bench_<op>.py`."""
    directions = (False,) if op == "topk_select" else (False, True)
    return [
        Case(op, length, dtype=dtype, backward=backward, inputs=inputs)
        for length in (1024, 4096, 8192)
        for dtype in ("float32", "bfloat16")
        for backward in directions
        for inputs in (("random", "real") if length == 4096 else ("random",))
    ]
