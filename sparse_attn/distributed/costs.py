"""What the ways of context parallelism send and cost, by count, beside ring attention: a model, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_attn import analysis, checks

CANDIDATES = 2  # keys that 8 bits leave for each that is chosen (docs/performance.md)


@dataclass(frozen=True)
class ContextCost:
    """Of one attention layer, on one of the ranks.

    Args:
        way: "gather", "merge", "index", or "ring" (dense ring attention, for comparison).
        forward_bytes, backward_bytes: what the rank sends.
        memory: bytes held beyond its own queries, keys, values and outputs.
        flops: its operations in the forward pass.
        seconds: forward, if arithmetic and links ran at the rates given; of the ring the longer of the two, which it
            overlaps, of the others the sum.
    """

    way: str
    forward_bytes: int
    backward_bytes: int
    memory: int
    flops: int
    seconds: float


def context_costs(
    shape: analysis.Shape,
    ranks: int,
    top_k: int,
    *,
    queries: int | None = None,
    rates: analysis.Rates | None = None,
    link: float = 50e9,
) -> dict[str, ContextCost]:
    """Bytes and time of each way for one layer, `shape.layers` times as much for several.

    What "index" sends depends on the keys: it is counted as if 8 bits left 2·K keys to a query and no two queries of a
    key head shared one, which is the most that is to be expected; more than all keys are never fetched.

    Args:
        shape: of the whole sequence; `length` is that of the keys.
        ranks: that share it evenly.
        top_k: keys per query.
        queries: how many there are, if fewer than the keys: the last ones (decoding). None: as many.
        rates: of one rank; None takes an H100's peaks, 4.0e14 operations and 3.3e12 bytes per second, and a quarter of
            that for gathered rows.
        link: bytes per second that a rank sends: 50e9 is one 400 Gb/s link, 450e9 NVLink.

    Example:
        >>> from sparse_attn.analysis import Shape
        >>> from sparse_attn.distributed import context_costs
        >>> costs = context_costs(Shape(131072, 32, 128, 8, itemsize=2), 8, 2048)
        >>> costs["gather"].forward_bytes == costs["ring"].forward_bytes
        True
    """
    ranks = int(checks.integer("ranks", ranks, 2))
    top_k = int(checks.top_k_of(top_k))
    if rates is None:
        rates = analysis.Rates(flops=4.0e14, stream=3.3e12, gather=8e11)
    length, heads, kv_heads, dim, size = (
        shape.length, shape.num_heads, shape.kv_heads, shape.head_dim, shape.itemsize,
    )  # fmt: skip
    asked = length if queries is None else int(checks.integer("queries", queries, 1, length))
    times, others = shape.sequences, ranks - 1
    # Of the pairs that one process scores and attends to: queries are the last of the sequence.
    pairs = (asked * length - (asked * (asked - 1) // 2 if shape.is_causal else 0)) * heads * times
    kept = asked * min(top_k, length) * heads * times
    key_part, query_part = -(-length // ranks), -(-asked // ranks)
    keys = key_part * kv_heads * 2 * dim * size * times  # a rank's keys and values
    rows = query_part * heads * times  # a rank's rows of queries
    choices = min(top_k, key_part)

    def cost(way: str, forward: int, backward: int, memory: int, flops: int, gathered: int) -> ContextCost:
        arithmetic = rates.seconds(
            analysis.Cost(select_flops=flops // ranks, gather_bytes=gathered // ranks, attend_flops=0)
        )
        wire = forward / link
        seconds = max(arithmetic, wire) if way == "ring" else arithmetic + wire
        return ContextCost(way, forward, backward, memory, flops // ranks, seconds)

    gathered = kept * 2 * dim * size
    # Sent: queries, choices (a number of 8 bytes, a score of 8), indices to all, partial outputs.
    to_keys = others * rows * (dim * size + 16 * choices + 4 * min(top_k, length) + 4 * (dim + 1))
    back = others * rows * (dim * size + 4 * (dim + 1))
    # 8-bit rows with three numbers, their mean; then rows that others have, each asked for by 8 bytes and a byte.
    index = others * kv_heads * times * (key_part * (dim + 12) + 4 * dim)
    elsewhere = others * key_part
    chosen = min(elsewhere, min(top_k, length) * query_part * (heads // kv_heads) * others // ranks)
    left = min(elsewhere, CANDIDATES * chosen)
    rows_sent = kv_heads * times * (left * (dim * size + 9) + chosen * dim * size) + 8 * others
    scored = min(length, CANDIDATES * min(top_k, length) * query_part * (heads // kv_heads))  # by each query
    found = (
        cost("gather", others * keys, others * keys, others * keys, (2 * pairs + 4 * kept) * dim, gathered),
        # Each rank chooses for itself, and keeps queries and choices of all.
        cost(
            "merge", to_keys, back, ranks * rows * (dim * size + 20 * min(top_k, length)),
            (2 * pairs + 4 * kept + 2 * ranks * asked * choices * heads * times) * dim, gathered,
        ),
        cost(
            "index", index + rows_sent, kv_heads * times * chosen * 2 * dim * size,
            index + kv_heads * times * (left + chosen) * dim * size,
            (2 * pairs + 2 * asked * scored * heads * times + 4 * kept) * dim, gathered,
        ),
        cost("ring", others * keys, 2 * others * keys, 2 * keys, 4 * pairs * dim, 0),
    )  # fmt: skip
    return {each.way: each for each in found}
