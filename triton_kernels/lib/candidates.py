"""The candidates of a tile of queries while their keys stream past: append what beats the threshold, cut to the best.

Each query owns a row of slots in scratch memory, filled in ascending key order; a slot packs the score's bits (high
half) and the key index (low half) in 64 bits. A row is cut by bisection over an integer that orders like the score,
several rows in registers at once: no sort, and no order of arrival that could differ from run to run. The slots'
order is kept throughout, so ties fall to the smaller index and the output ascends.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-(2**31))  # below every key
FORCED = tl.constexpr(2**31 - 1)  # above every key
NAN_KEY = tl.constexpr(2**31 - 2)
INFINITY_KEY = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def order_key(score):
    """float32 → int32 that orders −inf < … < +inf < NaN; −0 and +0 are one."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, 0 - magnitude, bits)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFE, key)


@triton.jit
def threshold_of(key):
    """The float32 that a later score must beat (or be NaN) where at least K seen keys are at or above `key`."""
    bits = tl.where(key < 0, (0 - key) | HIDDEN, tl.minimum(key, INFINITY_KEY))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pack(score, index):
    """(float32, int32) → int64 slot."""
    high = score.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    return (high | index.to(tl.uint32, bitcast=True).to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit
def score_of(slot):
    return (slot >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def index_of(slot):
    return slot.to(tl.int32)


@triton.jit
def count_passes(score_a, count_a, score_b, count_b):
    """For a scan over (score, passes): the scores ride along unchanged, the passes are counted.

    Riding along makes the compiler move the scores to the layout of the scan and of the store behind it, one thread
    per query, instead of moving positions, masks and pointers from and to the layout of the matrix product.
    """
    return score_b, count_a + count_b


@triton.jit
def load_keys(rows, column, count, first_kept, window_start):
    """(int32 [Q, C] keys, which slots are filled, slots) of the columns; HIDDEN where a slot is empty.

    `first_kept` is one number for all rows, or [Q, 1].
    """
    inside = column[None, :] < count[:, None]
    slot = tl.load(rows[:, None] + column[None, :], mask=inside, other=-1)
    index = index_of(slot)
    filled = inside & (index >= 0)
    forced = (index < first_kept) | (index >= window_start[:, None])
    key = tl.where(forced, FORCED, order_key(score_of(slot)))
    return tl.where(filled, key, HIDDEN), filled, slot


@triton.jit
def _count_in_memory(rows, count, first_kept, window_start, bound, longest, CHUNK: tl.constexpr):
    """How many keys of each row are >= bound, and > bound: for rows that no register tile holds."""
    at_least = tl.zeros_like(count)
    above = tl.zeros_like(count)
    for first in range(0, longest, CHUNK):
        column = first + tl.arange(0, CHUNK)
        key, filled, slot = load_keys(rows, column, count, first_kept, window_start)
        at_least += tl.sum((key >= bound[:, None]).to(tl.int32), 1)
        above += tl.sum((key > bound[:, None]).to(tl.int32), 1)
    return at_least, above


@triton.jit
def _half_way(low, high):
    """low + ⌈(high − low) / 2⌉ for low < high, whose distance may not fit int32."""
    distance = high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)
    half = (distance >> 1) + (distance & 1)
    return (low.to(tl.uint32, bitcast=True) + half).to(tl.int32, bitcast=True)


@triton.jit
def find_cut(
    rows,  # pointer to each row of slots, [Q]
    count,  # int32 [Q]: filled slots (some of them may hold index −1)
    first_kept,
    window_start,  # int32 [Q]
    budget,
    slack,  # stop when between budget and budget + slack are left: exact only where it is 0
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(lowest key to keep, how many keys equal to it to keep, filled slots): int32 [Q] each."""
    longest = tl.max(count, 0)
    if CAPACITY <= CHUNK:
        column = tl.arange(0, CAPACITY)
        key, filled, slot = load_keys(rows, column, count, first_kept, window_start)
        size = tl.sum(filled.to(tl.int32), 1)
        low = tl.min(tl.where(filled, key, LARGEST), 1)
        high = tl.max(key, 1)
    else:
        low = tl.zeros_like(count) + (HIDDEN + 1)
        high = tl.zeros_like(count) + FORCED
        size, above = _count_in_memory(rows, count, first_kept, window_start, low, longest, CHUNK)
    at_least = size
    wide = (at_least > budget + slack) & (low < high)
    while tl.max(wide.to(tl.int32), 0) > 0:
        middle = tl.where(wide, _half_way(low, high), low)
        if CAPACITY <= CHUNK:
            kept = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        else:
            kept, above = _count_in_memory(rows, count, first_kept, window_start, middle, longest, CHUNK)
        enough = kept >= budget
        high = tl.where(wide & (kept < budget), middle - 1, high)
        low = tl.where(wide & enough, middle, low)
        at_least = tl.where(wide & enough, kept, at_least)
        wide = (at_least > budget + slack) & (low < high)
    if CAPACITY <= CHUNK:
        above = tl.sum((key > low[:, None]).to(tl.int32), 1)
    else:
        kept, above = _count_in_memory(rows, count, first_kept, window_start, low, longest, CHUNK)
    equal = tl.where(at_least > budget + slack, budget - above, at_least)
    return low, equal, size


@triton.jit
def kept_slots(rows, column, count, first_kept, window_start, low, equal, equal_seen):
    """(slots, which to keep, ties seen so far) of a chunk of columns."""
    key, filled, slot = load_keys(rows, column, count, first_kept, window_start)
    tie = filled & (key == low[:, None])
    rank = equal_seen[:, None] + tl.cumsum(tie.to(tl.int32), 1)
    keep = filled & ((key > low[:, None]) | (tie & (rank <= equal[:, None])))
    return slot, keep, equal_seen + tl.sum(tie.to(tl.int32), 1)


@triton.jit
def cut_in_place(
    rows,  # pointer to each row of slots, [Q]
    count,  # int32 [Q]
    first_kept,
    window_start,  # int32 [Q]
    budget,
    slack,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Cuts rows to their best. Returns (count, threshold): int32 and float32 [Q].

    Between a load and the store that may overwrite it, and at the end, the threads of the program meet: a row may
    belong to several of them. A store never reaches the columns of a later load.
    """
    low, equal, size = find_cut(rows, count, first_kept, window_start, budget, slack, CAPACITY, CHUNK)
    written = tl.zeros_like(count)
    equal_seen = tl.zeros_like(count)
    for first in range(0, tl.max(count, 0), STEP):
        column = first + tl.arange(0, STEP)
        slot, keep, equal_seen = kept_slots(
            rows, column, count, first_kept, window_start, low, equal, equal_seen
        )
        place = written[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        written += tl.sum(keep.to(tl.int32), 1)
        tl.debug_barrier()
        tl.store(rows[:, None] + place, slot, mask=keep)
    tl.debug_barrier()
    # Where fewer than the budget were seen everything still passes: not (x <= NaN).
    threshold = tl.where(size >= budget, threshold_of(low), float("nan"))
    return written, threshold
