"""What becomes of a row of candidates (csrc/cuda/kernels/lib/candidates.cuh) while keys in random order stream past."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

CHUNK = 256  # candidates that a warp looks at together; a row with more is read again in every round


@dataclass(frozen=True)
class Sample:
    """A first threshold: the score of place `budget` among every `stride`-th key, as sample_keys() has it in CUDA."""

    stride: int
    budget: int
    fails: float  # the chance that a row is left with too few candidates

    @staticmethod
    def of(budget: int) -> Sample | None:
        if budget < 32:
            return None
        stride = 63 if budget < 192 else 21
        expected = budget / stride
        place = int(expected + 4 * math.sqrt(expected) + 3)
        # As many of the best keys or more are in the sample: their number is that of Poisson's law, or less spread.
        below = sum(math.exp(-expected + n * math.log(expected) - math.lgamma(n + 1)) for n in range(place))
        return Sample(stride, place, max(1 - below, 0.0))


@dataclass
class Stream:
    """Of one row, on the average; chunks are those of all cuts together."""

    passes: float = 0.0
    scored: float = 0.0  # keys
    appended: float = 0.0  # candidates
    grouped: float = 0.0  # keys whose group of 128 has a candidate
    cuts: float = 0.0
    long_cuts: float = 0.0  # of rows of more than one chunk
    cut_chunks: float = 0.0
    kept_chunks: float = 0.0  # that are written again: all but those of a sample's last cut
    last_chunks: float = 0.0  # of the row at its end
    last_long: float = 0.0

    def add(self, other: Stream, factor: float) -> None:
        for field in fields(self):
            value = getattr(self, field.name) + factor * getattr(other, field.name)
            setattr(self, field.name, value)

    def cut(self, held: float, to_go_on: bool = True) -> None:
        chunks = math.ceil(held / CHUNK)
        self.cuts += 1
        self.long_cuts += held > CHUNK
        self.cut_chunks += chunks
        self.kept_chunks += chunks * to_go_on

    def end(self, held: float) -> None:
        self.last_chunks, self.last_long = math.ceil(held / CHUNK), float(held > CHUNK)

    def run(self, budget: int, keys: float, room: int, chance: float = 1.0) -> float:
        """One pass over the keys, of which each is a candidate with that chance until the row is full; what it holds.

        A full row keeps its budget and up to an eighth more, and from then on a key passes with the chance that it is
        among the best `budget` of those seen so far.
        """
        seen = held = 0.0
        self.passes += 1
        self.scored += keys
        while True:
            part = min(keys - seen, (room - held) / chance)
            self.appended += part * chance
            self.grouped += part * (1 - (1 - chance) ** 128)
            held += part * chance
            seen += part
            if seen >= keys:
                return held
            self.cut(room)
            held = budget * (1 + 1 / 16)
            chance = min(1.0, budget / seen)


def streamed(budget: int, keys: float, room: int, sample: Sample | None = None) -> Stream:
    """A row of `keys` keys that keeps the best `budget` of them, in `room` slots."""
    stream, plain = Stream(), Stream()
    plain.end(plain.run(budget, keys, room))
    if sample is None or keys / sample.stride <= 1.25 * sample.budget:
        return plain
    held = stream.run(sample.budget, keys / sample.stride, room)
    if held > sample.budget:
        stream.cut(held, to_go_on=False)
    held = stream.run(budget, keys, room, chance=sample.stride * sample.budget / keys)
    stream.end(held)
    again = 1 - (1 - sample.fails) ** 64  # the rows of a block are done again together
    last = stream.last_chunks, stream.last_long
    stream.add(plain, again)
    stream.last_chunks, stream.last_long = last
    return stream


def rows_of_all_lengths(keys: float, causal: bool, budget: int, room: int, sample: Sample | None) -> Stream:
    """The mean of rows that see `keys` keys, or if causal anything up to that."""
    lengths = [keys * (i + 0.5) / 32 for i in range(32)] if causal else [keys]
    mean = Stream()
    for length in lengths:
        mean.add(streamed(budget, length, room, sample), 1 / len(lengths))
    return mean
